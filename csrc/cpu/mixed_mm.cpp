// mixed_mm: out = a b^T + bias in fp32 where b has 16 bits, on CPUs that cannot multiply those. It is widened block by
// block on its way into the cache, never in memory, and multiplied there by oneDNN's kernels that torch brings (where
// oneDNN is off torch falls back to a library call a block: right, but slow).
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels/pack.h"
#include "cpu/parallel.h"

#ifdef CPUBLAS_BRGEMM_F32F32F32  // else the op has no implementation, and nobody calls it

namespace gfast {

GFAST_DECLARE_KERNEL(void, pack_columns, (const Factor&, int64_t, int64_t, int64_t, int64_t, float*, int64_t))

namespace {

using at::Tensor;

constexpr int64_t kDepth = 1024;  // entries of the depth at a time: a panel takes 256 KiB, part of a core's 1 MiB or more
// Rows at a time. torch keeps a kernel for every shape and row stride it has multiplied, in every thread: blocks bound
// the shapes, and callers give out few different strides.
constexpr int64_t kRows = 64;

struct Product {
  const float* a;                // [rows, depth]
  int64_t a_stride;
  Factor b;                      // [columns, depth]
  int64_t rows, columns, depth;
  float* out;                    // [rows, columns]
  int64_t out_stride;
  const float* bias;             // [columns] or null
};

// out [row.., column..] += a [row.., k..] times panel [depth, kPanel]; the first depth starts from the bias.
void block(const Product& p, const float* panel, int64_t k, int64_t depth, int64_t row, int64_t column) {
  const int64_t rows = std::min(kRows, p.rows - row);
  const int64_t columns = std::min(kPanel, p.columns - column);
  float* c = p.out + row * p.out_stride + column;
  if (k == 0 && p.bias)
    for (int64_t i = 0; i < rows; ++i) std::copy_n(p.bias + column, columns, c + i * p.out_stride);
  at::native::cpublas::brgemm(rows, columns, depth, p.a_stride, kPanel, p.out_stride, k > 0 || p.bias,
                              p.a + row * p.a_stride + k, panel, c);
}

// Each panel is packed once and meets all rows. Every entry is computed by one thread, over the depth in order: results
// do not depend on their number.
void multiply(const Product& p) {
  auto* pack = GFAST_KERNEL(pack_columns);
  parallel_for(0, at::divup(p.columns, kPanel), 1, [&](int64_t begin, int64_t end) {
    // aligned to cache lines: a vector that straddles two takes two loads
    const auto memory = c10::GetCPUAllocator()->allocate(kPanel * std::min(kDepth, p.depth) * sizeof(float));
    float* panel = static_cast<float*>(memory.get());
    for (int64_t column = begin * kPanel; column < std::min(end * kPanel, p.columns); column += kPanel)
      for (int64_t k = 0; k < p.depth; k += kDepth) {
        const int64_t depth = std::min(kDepth, p.depth - k);
        pack(p.b, column, std::min(kPanel, p.columns - column), k, depth, panel, kPanel);
        for (int64_t row = 0; row < p.rows; row += kRows) block(p, panel, k, depth, row, column);
      }
  });
}

// a [M, K] fp32, b [N, K] fp32 or 16 bits; bias [N] fp32 or none; out [M, N] fp32; rows contiguous, out apart from them.
void mixed_mm_cpu(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, Tensor out) {
  Product p{};
  const Factor left = check_factor("mixed_mm", "a", a), target = check_factor("mixed_mm", "out", out);
  check_rows_apart("mixed_mm", "a", a);
  check_rows_apart("mixed_mm", "out", out);
  p.b = check_factor("mixed_mm", "b", b);
  p.rows = a.size(0), p.columns = b.size(0), p.depth = a.size(1);
  TORCH_CHECK_VALUE(b.size(1) == p.depth && out.size(0) == p.rows && out.size(1) == p.columns &&
                        left.dtype == Dtype::f32 && target.dtype == Dtype::f32,
                    "gfast: mixed_mm: a ", a.scalar_type(), " ", a.sizes(), " and b ", b.sizes(),
                    " must be float32 [M, K] and [N, K], and out float32 [M, N], not ", out.scalar_type(), " ",
                    out.sizes());
  check_apart("mixed_mm", {"out", out}, {{"a", a}, {"b", b}});
  p.a = static_cast<const float*>(left.data), p.a_stride = left.stride;
  p.out = out.mutable_data_ptr<float>(), p.out_stride = target.stride;
  if (bias) {
    check_memory("mixed_mm", "bias", *bias);
    check_apart("mixed_mm", {"out", out}, {{"bias", *bias}});
    TORCH_CHECK_VALUE(bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->dim() == 1 &&
                          bias->size(0) == p.columns,
                      "gfast: mixed_mm: bias must be contiguous float32 of shape [", p.columns, "], not ",
                      bias->scalar_type(), " ", bias->sizes());
    p.bias = bias->const_data_ptr<float>();
  }
  if (p.rows == 0 || p.columns == 0) return;
  if (p.depth > 0)
    multiply(p);
  else if (bias)
    out.copy_(*bias);
  else
    out.zero_();
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CPU, m) { m.impl("mixed_mm", &mixed_mm_cpu); }

}  // namespace gfast

#endif
