// mixed_mm: out = a b^T + bias in fp32 where a factor may have 16 bits, on CPUs that cannot multiply those. It is widened
// block by block on its way into the cache, never in memory, and multiplied there by oneDNN's kernels that torch brings.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/kernels/pack.h"

#ifdef CPUBLAS_BRGEMM_F32F32F32  // else the op has no implementation, and nobody calls it

namespace gfast {

GFAST_DECLARE_KERNEL(void, pack_columns, (const Factor&, int64_t, int64_t, int64_t, int64_t, float*))
GFAST_DECLARE_KERNEL(void, widen_rows, (const Factor&, int64_t, int64_t, int64_t, int64_t, float*))

namespace {

using at::Tensor;

constexpr int64_t kDepth = 1024;  // entries of the depth at a time: a panel takes 256 KiB, part of a core's own cache
// Rows at a time. torch keeps a kernel for every shape it has multiplied: blocks bound their number.
constexpr int64_t kRows = 64;

struct Product {
  Factor a, b;                   // [rows, depth], [columns, depth]
  int64_t rows, columns, depth;
  float* out;                    // [rows, columns]
  int64_t out_stride;
  const float* bias;             // [columns], or [rows] with bias_of_rows, or null
  bool bias_of_rows;
};

// Aligned to cache lines: a vector that straddles two takes two loads.
struct Floats {
  explicit Floats(int64_t n) : memory(c10::GetCPUAllocator()->allocate(n * sizeof(float))) {}
  float* data() const { return static_cast<float*>(memory.get()); }
  c10::DataPtr memory;
};

Factor factor(const char* what, const Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "gfast: mixed_mm: ", what,
                   " must be float32, bfloat16 or float16, not ", type);
  TORCH_CHECK_VALUE(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "gfast: mixed_mm: ", what,
                    " must be a matrix with contiguous rows, not ", x.sizes(), " with strides ", x.strides());
  return {x.const_data_ptr(), x.stride(0),
          type == at::kFloat ? Dtype::f32 : type == at::kBFloat16 ? Dtype::bf16 : Dtype::f16};
}

// out [row.., column..] += a [rows, depth] times panel [depth, kPanel]; the first depth starts from the bias.
void block(const Product& p, const float* a, int64_t a_stride, const float* panel, int64_t k, int64_t depth,
           int64_t row, int64_t rows, int64_t column) {
  const int64_t columns = std::min(kPanel, p.columns - column);
  float* c = p.out + row * p.out_stride + column;
  if (k == 0 && p.bias)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        c[i * p.out_stride + j] = p.bias_of_rows ? p.bias[row + i] : p.bias[column + j];
  at::native::cpublas::brgemm(rows, columns, depth, a_stride, kPanel, p.out_stride, k > 0 || p.bias, a, panel, c);
}

// Few rows in fp32, many columns: each panel is packed once and meets all rows.
void by_columns(const Product& p) {
  auto* pack = GFAST_KERNEL(pack_columns);
  at::parallel_for(0, at::divup(p.columns, kPanel), 1, [&](int64_t begin, int64_t end) {
    const Floats panel(kPanel * std::min(kDepth, p.depth));
    for (int64_t column = begin * kPanel; column < std::min(end * kPanel, p.columns); column += kPanel)
      for (int64_t k = 0; k < p.depth; k += kDepth) {
        const int64_t depth = std::min(kDepth, p.depth - k);
        pack(p.b, column, std::min(kPanel, p.columns - column), k, depth, panel.data());
        const float* a = static_cast<const float*>(p.a.data) + k;
        for (int64_t row = 0; row < p.rows; row += kRows)
          block(p, a + row * p.a.stride, p.a.stride, panel.data(), k, depth, row, std::min(kRows, p.rows - row), column);
      }
    at::native::cpublas::brgemm_release(false);
  });
}

// Many rows: all panels are packed first, [depth blocks][panels][depth, kPanel]; each block of rows is widened once.
void by_rows(const Product& p) {
  const int64_t panels = at::divup(p.columns, kPanel), all = panels * kPanel;
  const Floats packed(all * p.depth);
  auto *pack = GFAST_KERNEL(pack_columns), *widen = GFAST_KERNEL(widen_rows);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = 0; k < p.depth; k += kDepth) {
        const int64_t depth = std::min(kDepth, p.depth - k), column = i * kPanel;
        pack(p.b, column, std::min(kPanel, p.columns - column), k, depth, packed.data() + k * all + column * depth);
      }
  });
  at::parallel_for(0, at::divup(p.rows, kRows), 1, [&](int64_t begin, int64_t end) {
    const Floats wide(kRows * std::min(kDepth, p.depth));
    for (int64_t row = begin * kRows; row < std::min(end * kRows, p.rows); row += kRows)
      for (int64_t k = 0; k < p.depth; k += kDepth) {
        const int64_t depth = std::min(kDepth, p.depth - k), rows = std::min(kRows, p.rows - row);
        widen(p.a, row, rows, k, depth, wide.data());
        for (int64_t column = 0; column < p.columns; column += kPanel)
          block(p, wide.data(), depth, packed.data() + k * all + column * depth, k, depth, row, rows, column);
      }
    at::native::cpublas::brgemm_release(false);
  });
}

// a [M, K], b [N, K]; bias [N] or [M, 1] fp32 or none; out [M, N] fp32, rows contiguous, apart from the others.
void mixed_mm_cpu(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, Tensor out) {
  Product p{};
  p.a = factor("a", a);
  p.b = factor("b", b);
  p.rows = a.size(0), p.columns = b.size(0), p.depth = a.size(1);
  factor("out", out);
  TORCH_CHECK_VALUE(b.size(1) == p.depth && out.size(0) == p.rows && out.size(1) == p.columns &&
                        out.scalar_type() == at::kFloat,
                    "gfast: mixed_mm: a ", a.sizes(), " and b ", b.sizes(), " need a float32 out [", p.rows, ", ",
                    p.columns, "], not ", out.scalar_type(), " ", out.sizes());
  p.out = out.mutable_data_ptr<float>();
  p.out_stride = out.stride(0);
  if (bias) {
    p.bias_of_rows = bias->dim() == 2;
    TORCH_CHECK_VALUE(bias->scalar_type() == at::kFloat && bias->is_contiguous() &&
                          (p.bias_of_rows ? bias->size(0) == p.rows && bias->size(1) == 1
                                          : bias->dim() == 1 && bias->size(0) == p.columns),
                      "gfast: mixed_mm: bias must be contiguous float32 of shape [", p.columns, "] or [", p.rows,
                      ", 1], not ", bias->scalar_type(), " ", bias->sizes());
    p.bias = bias->const_data_ptr<float>();
  }
  if (p.rows == 0 || p.columns == 0) return;
  if (p.depth == 0) {
    if (bias)
      out.copy_(*bias);
    else
      out.zero_();
    return;
  }
  // Every entry is computed by one thread, over the depth in order: results do not depend on their number.
  if (p.columns >= p.rows && p.a.dtype == Dtype::f32)
    by_columns(p);
  else
    by_rows(p);
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CPU, m) { m.impl("mixed_mm", &mixed_mm_cpu); }

}  // namespace gfast

#endif
