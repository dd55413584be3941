// row_dots: b_t . (G a_t) for every row t. Blocks of G are packed into the cache, multiplied there by blocks of b, with
// oneDNN's kernels that torch brings, and the product is dotted with a before the next one: b G exists nowhere.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels/pack.h"
#include "cpu/tasks.h"

#ifdef CPUBLAS_BRGEMM_F32F32F32  // else the op has no implementation, and nobody calls it

namespace gfast {

GFAST_DECLARE_KERNEL(void, pack_rows, (const Factor&, int64_t, int64_t, int64_t, int64_t, float*))
GFAST_DECLARE_KERNEL(void, panel_dots, (const float*, const float*, int64_t, int64_t, int64_t, float*))
GFAST_DECLARE_KERNEL(void, lane_totals, (float*, int64_t, double*))

namespace {

using at::Tensor;

// Rows of a product. torch keeps a kernel for every shape it has multiplied: heights and widths are multiples of kUnit,
// if there are so many rows, and a last product overlaps the one before.
constexpr int64_t kRows = 64, kUnit = 16;
constexpr int64_t kDepth = 320, kGroup = 384;  // of G, about so many rows and columns at a time: half of a core's 1 MiB or more
constexpr int64_t kSlice = 16;   // rows of G packed in all their columns before the next ones: they are read in order
constexpr int64_t kLeast = 64;   // rows of G that a task takes at least
constexpr int64_t kTasks = 8;    // so many tasks a thread even out by themselves
constexpr int64_t kLanes = 16;   // of the widest instruction set

// Into how many parts the depth is cut, so that `groups` times as many tasks are an equal share for every thread.
int64_t parts_of(int64_t depth, int64_t groups, int64_t threads) {
  const int64_t even = threads / std::gcd(groups, threads);
  return std::max<int64_t>(1, std::min({even, at::divup(kTasks * threads, groups), depth / kLeast}));
}

// a [n, D_in], b [n, D_out] fp32, direction [D_out, D_in] fp32, bf16 or fp16 -> fp64 [n].
Tensor row_dots_cpu(const Tensor& a, const Tensor& b, const Tensor& direction) {
  const Factor of_a = check_wide_factor("row_dots", "a", a), of_b = check_wide_factor("row_dots", "b", b);
  const Factor g = check_factor("row_dots", "direction", direction);
  const int64_t n = a.size(0), width = a.size(1), height = b.size(1);
  TORCH_CHECK_VALUE(b.size(0) == n && direction.size(0) == height && direction.size(1) == width, "gfast: row_dots: a ",
                    a.sizes(), " and b ", b.sizes(), " must have equally many rows, and direction ", direction.sizes(),
                    " a row for each column of b, a column for each of a");
  Tensor out = at::zeros({n}, a.options().dtype(at::kDouble));
  if (n == 0 || width == 0 || height == 0) return out;
  const int64_t group_size = up(at::divup(width, at::divup(width, kGroup)), kPanel), groups = at::divup(width, group_size);
  const int64_t part_size = at::divup(height, parts_of(height, groups, at::get_num_threads()));
  const int64_t parts = at::divup(height, part_size);
  const float *inputs = static_cast<const float*>(of_a.data), *grads = static_cast<const float*>(of_b.data);
  std::vector<double> sums(check_size("row_dots", "sums by task", {groups, parts, n}));  // by task: who takes which does not change the order of the sum
  auto* pack = GFAST_KERNEL(pack_rows);
  auto* dots = GFAST_KERNEL(panel_dots);
  auto* add = GFAST_KERNEL(lane_totals);
  for_tasks(groups * parts, group_size * kDepth + kRows * (kPanel + kLanes), [&](int64_t task, float* scratch) {
    const int64_t left = task / parts * group_size, right = std::min(left + group_size, width);
    const int64_t first = task % parts * part_size, last = std::min(first + part_size, height);
    float* product = scratch;                    // [kRows, kPanel]
    float* lanes = product + kRows * kPanel;     // [kRows, kLanes]
    float* panels = lanes + kRows * kLanes;      // [columns / kPanel, kDepth, kPanel]
    std::fill_n(lanes, kRows * kLanes, 0.0f);
    const int64_t step = at::divup(last - first, at::divup(last - first, kDepth));
    for (int64_t k = first; k < last; k += step) {
      const int64_t depth = std::min(step, last - k);
      for (int64_t d = 0; d < depth; d += kSlice)
        for (int64_t c = left; c < right; c += kPanel)
          pack(g, k + d, std::min(kSlice, depth - d), c, std::min(kPanel, right - c),
               panels + (c - left) * kDepth + d * kPanel);
      for (int64_t row = 0; row < n; row += kRows) {
        const int64_t rows = std::min(kRows, n - row), tall = std::min(up(rows, kUnit), n), start = row + rows - tall;
        for (int64_t c = left; c < right; c += kPanel) {
          const int64_t columns = std::min(kPanel, right - c);
          at::native::cpublas::brgemm(tall, up(columns, kUnit), depth, of_b.stride, kPanel, kPanel, false,
                                      grads + start * of_b.stride + k, panels + (c - left) * kDepth, product);
          dots(product + (row - start) * kPanel, inputs + row * of_a.stride + c, of_a.stride, rows, columns, lanes);
        }
        add(lanes, rows, sums.data() + task * n + row);
      }
    }
  });
  double* total = out.mutable_data_ptr<double>();
  for (int64_t task = 0; task < groups * parts; ++task)
    for (int64_t t = 0; t < n; ++t) total[t] += sums[task * n + t];
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CPU, m) { m.impl("row_dots", &row_dots_cpu); }

}  // namespace gfast

#endif
