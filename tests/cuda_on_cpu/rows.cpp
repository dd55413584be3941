// Runs the kernel of rows_kernel.cu on the CPU and compares with fp64.
//   harness cases [fp32|bf16|fp16]  layouts, families of weights, and rows that are not numbers; of all dtypes unless said
//   harness orders [WHAT NUMBER]    several launches with sleeps; a fence, barrier, wait or arrival left out, if given
#include "kernel.inc"  // rows_kernel.cu, its shared memory, barriers and waits spelled for the model

#include <random>
#include <string>

namespace {

using namespace gfast::cuda;

constexpr double kInf = INFINITY;
std::mt19937_64 draw(7);

struct Family {
  float sign, p_pow, q_pow, beta;
};
const Family kFamilies[] = {{1, 0, 0, 0}, {1, 0.5f, 0, 0}, {1, 2, 1, 0}, {1, 0, 0, 1}, {-1, 1, 0.5f, 0.3f}};

struct Case {
  int rows, vocab;
  int gap = 0;    // elements between the end of a row and the next
  int shift = 0;  // elements by which the first row misses an aligned address
  float scale = 1;
  bool in_place = false, forward = false;
  Family family = kFamilies[0];
  bool by_row = false;  // a factor a row
};

// [rows, vocab] in exactly as much memory as it takes: one byte too many is an error to AddressSanitizer.
template <typename T>
struct Matrix {
  int64_t stride;
  std::unique_ptr<char[]> memory;
  T* data;

  explicit Matrix(const Case& c) : stride(c.vocab + c.gap) {
    const size_t size = (c.rows - 1) * stride + c.vocab + c.shift;
    memory.reset(new char[size * sizeof(T)]);
    memset(memory.get(), 0xff, size * sizeof(T));  // NaN
    data = reinterpret_cast<T*>(memory.get()) + c.shift;
  }
  T* at(int row, int64_t column) { return data + row * stride + column; }
};

float rounded(float v, float) { return v; }
template <typename T>
T rounded(float v, T) {
  return T{to_bits(T{}, v)};
}

// Rows of what a model gives, and of what none should; `label` of row i.
template <typename T>
void fill(Matrix<T>& z, const Case& c, std::vector<int64_t>& labels) {
  std::normal_distribution<float> normal(0, 3);
  const int each = std::max(1, c.vocab / 8);
  for (int i = 0; i < c.rows; ++i) {
    for (int j = 0; j < c.vocab; ++j) *z.at(i, j) = rounded(normal(draw), T{});
    const auto set = [&](int from, int to, float v) {
      for (int j = std::max(from, 0); j < std::min(to, c.vocab); ++j) *z.at(i, j) = rounded(v, T{});
    };
    int64_t y = draw() % c.vocab;
    switch (i) {
      case 0: y = 0; break;
      case 1: y = -100; set(0, c.vocab, NAN); break;
      case 2: y = c.vocab - 1; set(y, y + 1, 25); break;
      case 3: y = c.vocab / 2; break;                               // where a block begins, with 2 of them or more
      case 4: y = c.vocab / 2 - (c.vocab > 1), set(0, y, -kInf); break;  // and ends; blocks with nothing in them
      case 5: set(each, 5 * each, sizeof(T) == 4 ? -FLT_MAX : -60000); break;
      case 6: set(0, c.vocab, -kInf); break;
      case 7: set(0, c.vocab, -kInf), set(y, y + 1, 2); break;      // p = 1
      case 8: set(y, y + 1, -kInf); break;
      case 9: set(c.vocab - 1, c.vocab, NAN); break;
      case 10: set(each, each + 1, kInf); break;
      case 11: y = c.vocab; break;
      case 12: y = -1; break;
      case 13: y = int64_t{1} << 40; break;
      case 14: set(0, c.vocab, sizeof(T) == 4 ? -FLT_MAX : -60000); break;  // masked, label and all: 1 / V each
      case 15: set(0, c.vocab, 512.0f); break;
    }
    labels.push_back(y);
  }
}

bool close(double found, double expected, double slack) {
  if (std::isnan(expected)) return std::isnan(found);
  return found == expected || std::fabs(found - expected) <= slack;
}

template <typename T>
bool run(const Case& c, int launches) {
  Matrix<T> z(c);
  std::vector<int64_t> labels;
  fill(z, c, labels);
  std::vector<float> ref(c.rows), coef = {0.37f}, logp, weight, before;
  for (float& x : ref) x = -3.0f * (draw() % 1000) / 1000;
  for (int i = 1; c.by_row && i < c.rows; ++i) coef.push_back(draw() % 5 == 0 ? 0.0f : 1.5f - 0.01f * (draw() % 300));
  const auto wrong = [&](const char* what, int i, int64_t j, double found, double expected) {
    printf("%d x %d, gap %d, shift %d, scale %g, %zu bytes: %s of row %d, column %d: %.9g, not %.9g\n", c.rows, c.vocab,
           c.gap, c.shift, c.scale, sizeof(T), what, i, static_cast<int>(j), found, expected);
    return false;
  };
  for (int k = 0; k < launches; ++k) {
    Matrix<T> input(c), fresh(c);
    memcpy(input.data, z.data, ((c.rows - 1) * z.stride + c.vocab) * sizeof(T));
    Matrix<T>& out = c.in_place ? input : fresh;
    logp.assign(c.rows, NAN), weight.assign(c.rows, NAN);
    RowsArgs args{input.data, input.stride, labels.data(), ref.data(), coef.data(), logp.data(), weight.data(),
                  c.forward ? nullptr : out.data, out.stride, c.rows, c.vocab, c.family.sign, c.family.p_pow,
                  c.family.q_pow, c.family.beta, c.scale, c.by_row};
    const bool aligned = reinterpret_cast<uintptr_t>(input.data) % 16 == 0 && input.stride * sizeof(T) % 16 == 0;
    const int type = sizeof(T) == 4 ? 0 : __is_same(T, BFloat16) ? 1 : 2;
    if (launch_weighted_rows(args, type, aligned, nullptr) != cudaSuccess) return wrong("launch", 0, 0, 1, 0);
    for (int i = 0; i < c.rows; ++i) {
      const int64_t y = labels[i];
      const bool valid = y != -100, inside = y >= 0 && y < c.vocab;
      double top = -kInf, others = 0, largest = 0;
      for (int j = 0; j < c.vocab; ++j) {
        const double v = c.scale * widen(*z.at(i, j));
        if (j != y && !(v <= top)) top = v;
        if (std::isnan(top)) break;
      }
      for (int j = 0; j < c.vocab; ++j) {
        const double v = c.scale * widen(*z.at(i, j));
        if (j != y && v != -kInf) others += std::exp(v - top);
        if (v != -kInf) largest = std::max(largest, std::min(std::fabs(v - top), 200.0));
      }
      const double z_y = inside ? c.scale * widen(*z.at(i, y)) : NAN;
      // relative to the label where that is the maximum: log p keeps its digits near 0
      double lp, q, log_q;
      if (z_y >= top && top != kInf) {
        const double rest = others * std::exp(top == -kInf ? -kInf : top - z_y);
        lp = z_y == -kInf ? NAN : -std::log1p(rest);
        q = rest / (1 + rest), log_q = (top - z_y) + std::log(others) + lp;
      } else {
        const double e_y = std::exp(z_y - top), total = others + e_y;
        lp = (z_y - top) - std::log(total);
        q = others / total, log_q = std::log(others) - std::log(total);
      }
      if (z_y == kInf) lp = q = NAN;
      const Family& f = c.family;
      double log_w = 0;
      if (f.p_pow != 0) log_w += f.p_pow * lp;
      if (f.q_pow != 0) log_w += f.q_pow * log_q;
      double w = f.sign * std::exp(log_w);
      if (f.beta > 0) w *= 2 / (1 + std::exp(-f.beta * (lp - ref[i])));
      if (!valid) lp = w = 0;
      const double of_row = coef[c.by_row ? i : 0];
      const double digits = 2e-7 * (6 + largest), factor = std::fabs(of_row * w * c.scale);
      const double w_digits = digits * (2 + (f.p_pow + f.beta) * std::min(std::fabs(lp), 1e3) +
                                        f.q_pow * (2 + std::min(std::fabs(log_q), 1e3)));
      if (!close(logp[i], lp, digits * std::fabs(lp) + 1e-37)) return wrong("logp", i, y, logp[i], lp);
      if (!close(weight[i], w, w_digits * std::fabs(w) + 1e-37)) return wrong("weight", i, y, weight[i], w);
      if (c.forward) continue;
      const double unit = sizeof(T) == 4 ? 0x1p-24 : __is_same(T, BFloat16) ? 0x1p-8 : 0x1p-11;
      const double least = sizeof(T) == 2 && !__is_same(T, BFloat16) ? 0x1p-25 : 1.2e-38;
      const double total = z_y >= top ? 1 + others * std::exp(top - z_y) : others + std::exp(z_y - top);
      for (int j = 0; j < c.vocab; ++j) {
        const double v = c.scale * widen(*z.at(i, j));
        double g = j == y ? q : -std::exp(v - std::max(top, z_y)) / total;
        g = !valid ? 0 : std::isnan(lp) ? NAN : of_row * w * c.scale * g;
        const double found = widen(*out.at(i, j)), slack = std::fabs(g) * (unit + w_digits) + least * (1 + factor);
        if (!close(found, g, slack)) return wrong("gradient", i, j, found, g);
      }
      for (int j = c.vocab; i + 1 < c.rows && j < c.vocab + c.gap; ++j)
        if (!std::isnan(widen(*out.at(i, j)))) return wrong("gap", i, j, widen(*out.at(i, j)), NAN);
    }
    if (k > 0 && memcmp(before.data(), logp.data(), logp.size() * 4) != 0) return wrong("repeated logp", 0, 0, 1, 0);
    before = logp;
  }
  return true;
}

template <typename T>
bool all_cases() {
  constexpr int K = 16 / sizeof(T), part = kPartBytes / sizeof(T);
  for (const int vocab : {1, 7, K, 2 * K + 3, part - 1, part, part + 1, 3 * part - 5, 4 * part, 8 * part - K}) {
    const int rows = vocab > 1 ? 5 : 2;
    if (!run<T>({rows, vocab, (K - vocab % K) % K}, 1)) return false;  // rows at multiples of 16 bytes
    if (!run<T>({rows, vocab, 0, 0, 0.5f, true, false, kFamilies[4]}, 1)) return false;
  }
  for (int shift = 1; shift < K; shift += K == 4 ? 1 : 3)
    if (!run<T>({14, part + 3, 5, shift, 1, shift % 2 == 0, false, kFamilies[1]}, 1)) return false;
  for (const Family& family : kFamilies)
    if (!run<T>({16, part + 1, 0, 0, 1.5f, false, false, family, family.q_pow != 0}, 1)) return false;
  for (int n = 0; n < 15; ++n) {
    Case c{2 + int(draw() % 14), 1 + int(draw() % (n % 2 ? 3 * K : 2 * part))};
    c.gap = draw() % 2 ? draw() % (2 * K) : 0, c.shift = draw() % K;
    c.in_place = draw() % 2, c.scale = draw() % 2 ? 1 : 0.7f, c.family = kFamilies[draw() % 5];
    if (!run<T>(c, 1)) return false;
  }
  return run<T>({16, part + 9, 0, 0, 1, false, true, kFamilies[2]}, 2);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "cases", left_out = argc > 2 ? argv[2] : "";
  const int number = argc > 3 ? atoi(argv[3]) : 0;
  bool right;
  if (what == "orders") {
    model::sleeps = true;
    if (left_out == "barrier") model::without_barrier = number;
    if (left_out == "wait") model::without_wait = number;
    if (left_out == "arrival") model::without_arrival = number;
    if (left_out == "bulk fence") model::without_bulk_fence = number;
    right = run<BFloat16>({5, 2 * kPartBytes / 2 + 3, 0, 0, 1, true, false, kFamilies[1]}, 3);
  } else {
    RowsArgs args{};
    args.rows = 1, args.vocab = kMaxBlocks * kPartBytes / 4 + 1;
    right = launch_weighted_rows(args, 0, true, nullptr) == cudaErrorInvalidValue;
    const bool any = left_out.empty();
    right = right && (!(any || left_out == "fp32") || all_cases<float>());
    right = right && (!(any || left_out == "bf16") || all_cases<BFloat16>());
    right = right && (!(any || left_out == "fp16") || all_cases<Half>());
  }
  if (right) puts("all right");
  return right ? 0 : 1;
}
