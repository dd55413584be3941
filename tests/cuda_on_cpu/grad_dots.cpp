// Runs the kernel of grad_dots_kernel.cu on the CPU and compares with fp64.
//   harness cases                      all dtypes, alignments and sizes
//   harness orders [fence|barrier|exchange NUMBER]   many launches with sleeps; something left out, if given
#include "kernel.inc"  // grad_dots_kernel.cu, its launches, shared memory, fences and barriers spelled for the model

#include <random>
#include <string>

namespace {

using namespace gfast::cuda;

std::mt19937_64 draw(7);

// Exactly as much memory as the tensor takes: one byte too many is an error to AddressSanitizer.
struct Tensor {
  int type = 0;
  std::unique_ptr<char[]> memory;
  void* data = nullptr;
  std::vector<double> values;

  Tensor(int64_t n, int type_, int shift) : type(type_), values(n) {
    const int64_t size = type == kDouble ? 8 : type == kFloat ? 4 : 2;
    memory.reset(new char[(n + shift) * size]);
    data = memory.get() + shift * size;
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) {
      const float x = normal(draw);
      char* at = static_cast<char*>(data) + i * size;
      if (type == kDouble) {
        values[i] = x * 1.0000000123;
        memcpy(at, &values[i], 8);
      } else if (type == kFloat) {
        memcpy(at, &x, 4);
        values[i] = x;
      } else if (type == kBFloat16) {
        const uint32_t bits = std::bit_cast<uint32_t>(x) & 0xffff0000u;
        const uint16_t half = bits >> 16;
        memcpy(at, &half, 2);
        values[i] = std::bit_cast<float>(bits);
      } else {  // any number of fp16, subnormal ones too
        uint16_t bits = draw() & 0xffff;
        if ((bits >> 10 & 31) > 18) bits &= 0x8fff;
        memcpy(at, &bits, 2);
        values[i] = __half2float({bits});
      }
    }
  }
};

struct Case {
  const char* name;
  std::vector<int64_t> sizes;
  std::vector<int> groups;
  int num_groups;
  int x_type;
  std::vector<int> y_types;  // of each direction
  int shift = 0;             // entries by which tensors miss an aligned address
  bool mixed = false;        // types change from tensor to tensor
};

// As the launcher does it: records sorted by group, chunks counted through.
std::vector<DotRecord> records_of(const Case& c, const std::vector<std::vector<Tensor>>& all, int first, int count) {
  std::vector<DotRecord> records;
  int chunks = 0;
  for (int g = 0; g < c.num_groups; ++g) {
    const size_t begin = records.size();
    const int group_begin = chunks;
    for (size_t t = 0; t < c.sizes.size(); ++t) {
      if (c.groups[t] != g || c.sizes[t] == 0) continue;
      DotRecord r{};
      const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
      r.x = all[0][t].data, r.x_type = all[0][t].type, r.numel = c.sizes[t], r.chunk_start = chunks, r.group = g;
      bool vector = r.x_type != kDouble && aligned(r.x);
      for (int d = 0; d < count; ++d) {
        r.y[d] = all[1 + first + d][t].data, r.y_type[d] = all[1 + first + d][t].type;
        vector = vector && r.y_type[d] != kDouble && r.y_type[d] == r.y_type[0] && aligned(r.y[d]);
      }
      r.path = vector ? r.x_type * 3 + (count > 0 ? r.y_type[0] : r.x_type) : kGeneralPath;
      r.group_begin = group_begin;
      chunks += (c.sizes[t] + kChunk - 1) / kChunk;
      records.push_back(r);
    }
    for (size_t i = begin; i < records.size(); ++i) records[i].group_end = chunks;
  }
  return records;
}

// Products are rounded to fp32, and so are sums of up to 32 of them; all else is fp64.
bool right(const Case& c, const std::vector<std::vector<Tensor>>& all, const std::vector<double>& out) {
  const int dirs = static_cast<int>(c.y_types.size());
  for (int g = 0; g < c.num_groups; ++g)
    for (int d = 0; d <= dirs; ++d) {
      double expected = 0, slack = 0;
      for (size_t t = 0; t < c.sizes.size(); ++t) {
        if (c.groups[t] != g) continue;
        const Tensor &x = all[0][t], &y = d < dirs ? all[1 + d][t] : x;
        const bool wide = x.type == kDouble || y.type == kDouble;
        for (int64_t i = 0; i < c.sizes[t]; ++i) {
          expected += x.values[i] * y.values[i];
          slack += std::fabs(x.values[i] * y.values[i]) * (wide ? 0x1p-40 : 34 * 0x1p-24);
        }
      }
      const double found = out[g * (dirs + 1) + d];
      if (!(std::fabs(found - expected) <= slack)) {
        printf("%s: group %d, column %d: %.17g, not %.17g\n", c.name, g, d, found, expected);
        return false;
      }
    }
  return true;
}

bool run(const Case& c, int launches) {
  const int dirs = static_cast<int>(c.y_types.size());
  std::vector<std::vector<Tensor>> all(dirs + 1);
  for (int d = 0; d <= dirs; ++d)
    for (size_t t = 0; t < c.sizes.size(); ++t) {
      const int type = d == 0 ? c.x_type : c.y_types[d - 1];
      all[d].emplace_back(c.sizes[t], c.mixed ? int(type + t) % 4 : type, c.shift ? int(t + d) % 3 * c.shift : 0);
    }
  std::vector<unsigned> arrived(c.num_groups, 0);
  std::vector<double> before;
  for (int k = 0; k < launches; ++k) {
    std::vector<double> out(c.num_groups * (dirs + 1), 0.0);
    for (int first = 0; first == 0 || first < dirs; first += kMaxDirs) {
      const int count = std::min(kMaxDirs, dirs - first);
      const auto records = records_of(c, all, first, count);
      DotArgs args{};
      args.num_records = static_cast<int>(records.size());
      args.num_chunks = records.empty() ? 0 : records.back().group_end;
      if (args.num_chunks == 0) continue;
      std::vector<double> partial(args.num_chunks * (count + 1), NAN);
      for (const DotRecord& r : records)  // what must be written is poison
        for (int d = 0; d <= dirs; ++d)
          if (first == 0 || (d >= first && d < dirs)) out[r.group * (dirs + 1) + d] = NAN;
      args.partial = partial.data(), args.arrived = arrived.data(), args.out = out.data();
      args.out_columns = dirs + 1, args.first_column = first, args.write_squares = first == 0;
      if (args.num_records <= kInlineRecords)
        std::copy(records.begin(), records.end(), args.inline_records);
      else
        args.records = records.data();
      if (launch_grad_dots(args, count, nullptr) != cudaSuccess) return false;
    }
    if (!right(c, all, out)) return false;
    for (const unsigned count : arrived)
      if (count != 0) return printf("%s: a counter is left at %u\n", c.name, count), false;
    if (k > 0 && memcmp(before.data(), out.data(), out.size() * sizeof(double)) != 0)
      return printf("%s: launch %d differs from the first\n", c.name, k), false;
    before = out;
  }
  return true;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const std::vector<int64_t> edges = {1, kChunk * 3 + 7, kChunk - 1, kChunk, kChunk + 1, 0, 4 * kChunk};
  for (int x = 0; x < 3; ++x) {
    all.push_back({"no direction", edges, {0, 0, 1, 1, 2, 2, 2}, 3, x, {}});
    for (int y = 0; y < 3; ++y) all.push_back({"one direction", edges, {0, 0, 1, 1, 2, 2, 2}, 3, x, {y}});
    all.push_back({"two directions", edges, {2, 2, 1, 0, 2, 0, 2}, 3, x, {x, x}});
  }
  all.push_back({"two dtypes of directions", edges, {0, 0, 1, 1, 2, 2, 2}, 3, 1, {0, 1}});
  all.push_back({"three directions", edges, {0, 0, 1, 1, 2, 2, 2}, 3, 0, {1, 1, 1}});
  for (int x = 0; x < 3; ++x) all.push_back({"misaligned", {777, 2048, 3001, 15}, {0, 1, 1, 0}, 2, x, {0, 1}, 1});
  all.push_back({"all dtypes", {900, 33, 2500, 1, 64}, {2, 0, 2, 1, 0}, 3, 0, {3, 1}, 0, true});
  all.push_back({"empty groups", {0, 0, 10}, {3, 1, 5}, 8, 1, {1}});
  all.push_back({"nothing at all", {0, 0}, {0, 1}, 2, 1, {1}});
  Case many{"more tensors than kernel parameters hold", {}, {}, 40, 1, {1}};
  for (int i = 0; i < 2 * kInlineRecords; ++i) {
    many.sizes.push_back(i % 7 == 3 ? 0 : 1 + i * 37 % 300);
    many.groups.push_back(i * 13 % 40);
  }
  all.push_back(many);
  all.push_back({"one group of many chunks", {kChunk * 70 + 1, 99}, {0, 0}, 1, 1, {1}});
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "cases", left_out = argc > 2 ? argv[2] : "";
  const int number = argc > 3 ? atoi(argv[3]) : 0;
  if (what == "orders") {
    model::sleeps = true;
    model::resident = 3;
    if (left_out == "fence") model::without_fence = number;
    if (left_out == "barrier") model::without_barrier = number;
    model::plain_exchange = left_out == "exchange";
    for (int d = 0; d <= 1; ++d)
      if (!run({"orders", {kChunk * 5 + 3, 50, 70}, {0, 1, 0}, 2, 0, std::vector<int>(d, 1)}, 6)) return 1;
  } else {
    for (const Case& c : cases())
      if (!run(c, 2)) return 1;
  }
  puts("all right");
}
