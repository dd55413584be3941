// Gradients of a 16-bit head on CPUs that cannot multiply 16 bits: head_grad_hidden, head_grad_weight. As in mixed_mm, a
// factor is widened on its way into the cache and multiplied there by oneDNN's kernels; dW is rounded on its way out.
// Each thread works alone on its part of the vocabulary: nobody waits between a product and its conversion.
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/kernels/pack.h"
#include "cpu/parallel.h"
#include "cpu/tasks.h"

#ifdef CPUBLAS_BRGEMM_F32F32F32  // else the ops have no implementation, and nobody calls them

namespace gfast {

GFAST_DECLARE_KERNEL(void, pack_columns, (const Factor&, int64_t, int64_t, int64_t, int64_t, float*, int64_t))
GFAST_DECLARE_KERNEL(void, pack_rows, (const Factor&, int64_t, int64_t, int64_t, int64_t, float*))
GFAST_DECLARE_KERNEL(void, write_bf16, (const float*, int64_t, int64_t, void*, int64_t))

namespace {

using at::Tensor;

constexpr int64_t kRows = 64;           // rows of a product at a time
constexpr int64_t kPad = 16;            // added to row strides, so that rows do not fall on the same cache sets
// dH
constexpr int64_t kDepth = 256;         // vocabulary entries at a time: with kGroup columns of W, half of a core's 1 MiB or more
constexpr int64_t kGroup = 512;         // about so many columns a task
// dW
constexpr int64_t kMostColumns = 256;      // of the logits' gradient at a time
constexpr int64_t kColumnBytes = 1 << 19;  // of those, as packed
constexpr int64_t kMostDepth = 1024;       // rows of logits that a product takes
// Rows of logits come in any number, and torch keeps a kernel for each depth it has multiplied: this bounds them.
constexpr int64_t kStep = 8;

void check_product(const char* op, Named a, Named b, const Tensor& out, at::ScalarType type, bool fits) {
  check_memory(op, "out", out);
  TORCH_CHECK_TYPE(out.scalar_type() == type, "gfast: ", op, ": out must be ", type, ", not ", out.scalar_type());
  TORCH_CHECK_VALUE(fits && out.is_contiguous(), "gfast: ", op, ": ", a.x.sizes(), " and ", b.x.sizes(),
                    " do not make a contiguous ", out.sizes());
  check_apart(op, {"out", out}, {a, b});
}

// out [n, D] fp32 = grad_logits [n, V] fp32 times weight [V, D]. Up to `most` parts of the vocabulary have a sum of
// their own. The parts, and with them the order of the sum, follow from that and the shapes alone.
void head_grad_hidden_cpu(const Tensor& grad_logits, const Tensor& weight, int64_t most, Tensor out) {
  const char* op = "head_grad_hidden";
  const Factor grad = check_wide_factor(op, "grad_logits", grad_logits), w = check_factor(op, "weight", weight);
  const int64_t n = grad_logits.size(0), vocab = grad_logits.size(1), width = weight.size(1);
  check_product(op, {"grad_logits", grad_logits}, {"weight", weight}, out, at::kFloat,
                out.dim() == 2 && weight.size(0) == vocab && out.size(0) == n && out.size(1) == width);
  TORCH_CHECK_VALUE(most >= 1, "gfast: ", op, ": most must be 1 or more parts of the vocabulary, not ", most);
  if (out.numel() == 0) return;
  if (vocab == 0) {
    out.zero_();
    return;
  }
  most = std::min(most, at::divup(vocab, kDepth));  // no part is smaller
  const int64_t part_size = up(at::divup(vocab, most), kDepth), parts = at::divup(vocab, part_size);
  const int64_t groups = std::max<int64_t>(1, (width + kGroup / 2) / kGroup);
  const int64_t group_size = up(at::divup(width, groups), kPanel), stride = kDepth + kPad;
  const Tensor sums = parts == 1 ? out : at::empty({parts, n, width}, out.options());
  float* sum = sums.mutable_data_ptr<float>();
  auto* pack = GFAST_KERNEL(pack_rows);
  const auto body = [&](int64_t task, float* scratch) {
    const int64_t part = task / groups, left = task % groups * group_size;
    const int64_t right = std::min(left + group_size, width), last = std::min((part + 1) * part_size, vocab);
    float* rows_packed = scratch;                     // [kRows, stride]
    float* panels = scratch + kRows * stride;         // [columns / kPanel, kDepth, kPanel]
    for (int64_t k = part * part_size; k < last; k += kDepth) {
      const int64_t depth = std::min(kDepth, last - k);
      for (int64_t c = left; c < right; c += kPanel)
        pack(w, k, depth, c, std::min(kPanel, right - c), panels + (c - left) * kDepth);
      for (int64_t row = 0; row < n; row += kRows) {
        const int64_t rows = std::min(kRows, n - row);
        for (int64_t i = 0; i < rows; ++i)
          std::copy_n(static_cast<const float*>(grad.data) + (row + i) * grad.stride + k, depth, rows_packed + i * stride);
        for (int64_t c = left; c < right; c += kPanel)
          at::native::cpublas::brgemm(rows, std::min(kPanel, right - c), depth, stride, kPanel, width,
                                      k > part * part_size, rows_packed, panels + (c - left) * kDepth,
                                      sum + (part * n + row) * width + c);
      }
    }
  };
  for_tasks(parts * groups, kRows * stride + group_size * kDepth, body);
  if (parts > 1) at::sum_out(out, sums, {0});
}

// out [V, D] bf16 = grad_logits [n, V]^T hidden [n, D], both fp32.
void head_grad_weight_cpu(const Tensor& grad_logits, const Tensor& hidden, Tensor out) {
  const char* op = "head_grad_weight";
  const Factor grad = check_wide_factor(op, "grad_logits", grad_logits), h = check_wide_factor(op, "hidden", hidden);
  const int64_t n = grad_logits.size(0), vocab = grad_logits.size(1), width = hidden.size(1);
  check_product(op, {"grad_logits", grad_logits}, {"hidden", hidden}, out, at::kBFloat16,
                out.dim() == 2 && hidden.size(0) == n && out.size(0) == vocab && out.size(1) == width);
  if (out.numel() == 0 || n == 0) {
    out.zero_();
    return;
  }
  auto* pack = GFAST_KERNEL(pack_rows);
  auto* pack_transposed = GFAST_KERNEL(pack_columns);
  auto* write = GFAST_KERNEL(write_bf16);
  const int64_t depth = up(n, kStep);  // rows beyond n are zero in both factors
  const Floats panels(up(width, kPanel) * depth);  // [D / kPanel, depth, kPanel]
  parallel_for(0, at::divup(width, kPanel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float* panel = panels.get() + p * depth * kPanel;
      pack(h, 0, n, p * kPanel, std::min(kPanel, width - p * kPanel), panel);
      std::fill(panel + n * kPanel, panel + depth * kPanel, 0.0f);
    }
  });
  const int64_t stride = up(n, kPanel) + kPad;
  const int64_t columns = std::clamp(kColumnBytes / (4 * stride) / kRows * kRows, kRows, kMostColumns);
  const auto body = [&](int64_t task, float* scratch) {
    const int64_t first = task * columns, count = std::min(columns, vocab - first);
    float* product = scratch;                   // [kRows, kPanel]
    float* packed = scratch + kRows * kPanel;   // [columns, stride]
    for (int64_t row = 0; row < n; row += kPanel)
      pack_transposed(grad, row, std::min(kPanel, n - row), first, count, packed + row, stride);
    for (int64_t v = 0; v < count; v += kRows)
      for (int64_t c = 0; c < width; c += kPanel) {
        const int64_t rows = std::min(kRows, count - v), wide = std::min(kPanel, width - c);
        for (int64_t k = 0; k < depth; k += kMostDepth)
          at::native::cpublas::brgemm(rows, wide, std::min(kMostDepth, depth - k), stride, kPanel, kPanel, k > 0,
                                      packed + v * stride + k, panels.get() + c * depth + k * kPanel, product);
        write(product, rows, wide, static_cast<at::BFloat16*>(out.mutable_data_ptr()) + (first + v) * width + c, width);
      }
  };
  for_tasks(at::divup(vocab, columns), kRows * kPanel + columns * stride, body);
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CPU, m) {
  m.impl("head_grad_hidden", &head_grad_hidden_cpu);
  m.impl("head_grad_weight", &head_grad_weight_cpu);
}

}  // namespace gfast

#endif
