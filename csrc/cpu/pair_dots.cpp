// pair_dots: products of the gradients of samples, sums over their rows t, u of (a_t . c_u) (b_t . d_u). Tiles of pairs are
// multiplied and summed where they lie in the cache: the products [n, m] of b_t . d_u exist nowhere. Each thread works
// alone on its tiles, with oneDNN's kernels that torch brings, as in mixed_mm.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels/pack.h"
#include "cpu/tasks.h"

#ifdef CPUBLAS_BRGEMM_F32F32F32  // else the op has no implementation, and nobody calls it

namespace gfast {

GFAST_DECLARE_KERNEL(void, pack_columns, (const Factor&, int64_t, int64_t, int64_t, int64_t, float*, int64_t))
GFAST_DECLARE_KERNEL(void, panel_sums, (const float*, const float*, int64_t, double*))

namespace {

using at::Tensor;

constexpr int64_t kDepth = 1024;  // entries of the depth at a time: a panel takes 256 KiB, part of a core's 1 MiB or more
// Rows of a product, and of a tile at most. torch keeps a kernel for every shape and row stride it has multiplied, in
// every thread: all products are of so many, if there are, and a last one overlaps the one before.
constexpr int64_t kRows = 64, kTileRows = 512;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// About equal parts of [begin, end), of at most `most` each.
std::vector<Range> parts_of(int64_t begin, int64_t end, int64_t most) {
  const int64_t count = at::divup(end - begin, most), step = count > 0 ? at::divup(end - begin, count) : 1;
  std::vector<Range> parts;
  for (; begin < end; begin += step) parts.push_back({begin, std::min(begin + step, end)});
  return parts;
}

// Sums of a tile by the samples of its rows and columns, added to those of all samples.
class Sums {
 public:
  Sums(std::vector<int64_t> rows, std::vector<int64_t> columns) : rows_(std::move(rows)), columns_(std::move(columns)) {}

  // x, y [rows, kPanel]; with `both` each pair counts for the samples in either order.
  void add(const float* x, const float* y, Range rows, Range columns, bool both, double* out) const {
    auto* kernel = GFAST_KERNEL(panel_sums);
    const int64_t others = (int64_t)columns_.size() - 1;
    for (int64_t row = rows.begin, s = sample_of(rows_, row); row < rows.end; row = rows_[++s]) {
      const int64_t begin = row - rows.begin, end = std::min(rows_[s + 1], rows.end) - rows.begin;
      double sums[kPanel];
      kernel(x + begin * kPanel, y + begin * kPanel, end - begin, sums);
      for (int64_t column = columns.begin, t = sample_of(columns_, column); column < columns.end; ++column) {
        while (columns_[t + 1] <= column) ++t;
        out[s * others + t] += sums[column - columns.begin];
        if (both) out[t * others + s] += sums[column - columns.begin];
      }
    }
  }

 private:
  static int64_t sample_of(const std::vector<int64_t>& bounds, int64_t row) {
    return std::upper_bound(bounds.begin(), bounds.end(), row) - bounds.begin() - 1;
  }
  std::vector<int64_t> rows_, columns_;
};

struct Tile {
  Range rows, columns;
  int64_t first;  // entries of the tiles before it
};

// All pairs, or one of each two where both sides are the same. What is left after every thread has had equally many
// columns is cut into more tiles.
std::vector<Tile> tiles_of(int64_t n, int64_t m, bool same, int64_t threads) {
  std::vector<Tile> tiles;
  const int64_t panels = at::divup(m, kPanel);
  int64_t first = 0;
  for (int64_t p = 0; p < panels; ++p) {
    const Range columns{p * kPanel, std::min((p + 1) * kPanel, m)};
    const int64_t share = std::max(at::divup(n, threads), kRows);
    const int64_t most = p < panels - panels % threads ? kTileRows : std::min(share, kTileRows);
    std::vector<Range> blocks = parts_of(same ? columns.end : 0, n, most);
    if (same) blocks.insert(blocks.begin(), columns);  // every pair of a block with itself
    for (const Range rows : blocks) {
      tiles.push_back({rows, columns, first});
      first += rows.size() * kPanel;
    }
  }
  return tiles;
}

Factor factor(const char* what, const Tensor& x) {
  const Factor found = check_wide_factor("pair_dots", what, x);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) > 0, "gfast: pair_dots: ", what, " must be a matrix with columns, not ",
                    x.sizes());
  return found;
}

// out [rows, kPanel] = the tile's rows of x [n, depth] times its rows of y. scratch: a panel, and a product.
void multiply(const Factor& x, int64_t n, const Factor& y, int64_t depth, const Tile& tile, float* scratch, float* out) {
  auto* pack = GFAST_KERNEL(pack_columns);
  const int64_t height = std::min(kRows, n);
  float *panel = scratch + kRows * kPanel, *product = scratch;
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t some = std::min(kDepth, depth - k);
    pack(y, tile.columns.begin, tile.columns.size(), k, some, panel, kPanel);
    for (int64_t row = tile.rows.begin; row < tile.rows.end; row += kRows) {
      const int64_t rows = std::min(kRows, tile.rows.end - row), start = std::min(row, n - height);
      const bool whole = rows == height;
      float* to = out + (row - tile.rows.begin) * kPanel;
      at::native::cpublas::brgemm(height, kPanel, some, x.stride, kPanel, kPanel, whole && k > 0,
                                  static_cast<const float*>(x.data) + start * x.stride + k, panel, whole ? to : product);
      if (whole) continue;
      const float* from = product + (row - start) * kPanel;
      for (int64_t i = 0; i < rows * kPanel; ++i) to[i] = from[i] + (k > 0 ? to[i] : 0.0f);
    }
  }
}

// a [n, D_in], b [n, D_out], c [m, D_in], d [m, D_out], fp32; rows, columns: rows of each sample on either side -> fp64
// [samples, samples']. `same`: c and d are a and b. inputs, of n ceil(m / 64) 64 entries: a_t . c_u of the pairs, tile by
// tile, left there, or taken from there if `known`.
Tensor pair_dots_cpu(const Tensor& a, const Tensor& b, const Tensor& c, const Tensor& d, at::IntArrayRef rows,
                     at::IntArrayRef columns, bool same, const std::optional<Tensor>& inputs, bool known) {
  const Factor of_a = factor("a", a), of_b = factor("b", b), of_c = factor("c", c), of_d = factor("d", d);
  const int64_t n = a.size(0), m = c.size(0);
  const int64_t size = check_size("pair_dots", "the result", {(int64_t)rows.size(), (int64_t)columns.size()});
  TORCH_CHECK_VALUE(b.size(0) == n && d.size(0) == m && c.size(1) == a.size(1) && d.size(1) == b.size(1),
                    "gfast: pair_dots: a ", a.sizes(), " and b ", b.sizes(), " must have equally many rows, as must c ",
                    c.sizes(), " and d ", d.sizes(), "; a and c, b and d equally many columns");
  TORCH_CHECK_VALUE(!same || (rows == columns && n == m), "gfast: pair_dots: one side has other samples than itself");
  TORCH_CHECK_VALUE(!known || inputs, "gfast: pair_dots: known, but no inputs are given");
  const int64_t pairs = check_size("pair_dots", "inputs", {n, at::divup(m, kPanel), kPanel});
  if (inputs) {
    check_memory("pair_dots", "inputs", *inputs);
    TORCH_CHECK_VALUE(inputs->scalar_type() == at::kFloat && inputs->is_contiguous() && inputs->numel() >= pairs,
                      "gfast: pair_dots: inputs must be contiguous float32 of at least ", pairs, " entries");
    check_apart("pair_dots", {"inputs", *inputs}, {{"a", a}, {"b", b}, {"c", c}, {"d", d}});
  }
  const Sums sums(sample_bounds("pair_dots", "rows", rows, n), sample_bounds("pair_dots", "columns", columns, m));
  const auto tiles = tiles_of(n, m, same, at::get_num_threads());
  std::vector<double> parts(check_size("pair_dots", "sums by tile", {(int64_t)tiles.size(), size}));  // by tile: who takes which does not change the order of the sum
  float* kept = inputs ? inputs->mutable_data_ptr<float>() : nullptr;
  const int64_t panel = kPanel * std::min(kDepth, std::max(a.size(1), b.size(1))), tile_size = kTileRows * kPanel;
  for_tasks((int64_t)tiles.size(), 2 * tile_size + kRows * kPanel + panel, [&](int64_t i, float* scratch) {
    float *y = scratch, *own = y + tile_size, *rest = own + tile_size;
    const Tile& tile = tiles[i];
    float* x = kept ? kept + tile.first : own;
    if (!known) multiply(of_a, n, of_c, a.size(1), tile, rest, x);
    multiply(of_b, n, of_d, b.size(1), tile, rest, y);
    sums.add(x, y, tile.rows, tile.columns, same && tile.rows.begin != tile.columns.begin, parts.data() + i * size);
  });
  Tensor out = at::zeros({(int64_t)rows.size(), (int64_t)columns.size()}, a.options().dtype(at::kDouble));
  double* total = out.mutable_data_ptr<double>();
  for (size_t i = 0; i < tiles.size(); ++i)
    for (int64_t j = 0; j < size; ++j) total[j] += parts[i * size + j];
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CPU, m) { m.impl("pair_dots", &pair_dots_cpu); }

}  // namespace gfast

#endif
