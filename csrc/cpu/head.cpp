// What the output head needs besides matrix products on the CPU: fold_rows, accumulate.
#include "cpu/kernels/head.h"

#include <torch/library.h>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gfast {

GFAST_DECLARE_KERNEL(void, fold_rows, (const FoldArgs&, int64_t, int64_t))
GFAST_DECLARE_KERNEL(void, accumulate, (float*, const void*, Dtype, int64_t, int64_t))

namespace {

using at::Tensor;

void fold_rows_cpu(const Tensor& logits, const Tensor& labels, int64_t first, double scale, double softcap,
                   Tensor state) {
  const char* op = "fold_rows";
  FoldArgs args{};
  args.logits = check_matrix(op, "logits", logits, scale, softcap);
  args.rows = logits.size(0);
  args.tile = logits.size(1);
  args.first = first;
  check_memory(op, "labels", labels);
  check_memory(op, "state", state);
  TORCH_CHECK_VALUE(first >= 0, "gfast: ", op, ": first must be a vocabulary entry, not ", first);
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong && state.scalar_type() == at::kDouble, "gfast: ", op,
                   ": labels must be int64 and state float64, not ", labels.scalar_type(), " and ", state.scalar_type());
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == args.rows && labels.is_contiguous() && state.dim() == 2 &&
                        state.size(0) == 3 && state.size(1) == args.rows && state.is_contiguous(),
                    "gfast: ", op, ": logits ", logits.sizes(), " need contiguous labels [N] and state [3, N], not ",
                    labels.sizes(), " and ", state.sizes());
  check_apart(op, {"state", state}, {{"logits", logits}, {"labels", labels}});
  args.labels = labels.const_data_ptr<int64_t>();
  args.state = state.mutable_data_ptr<double>();
  auto* kernel = GFAST_KERNEL(fold_rows);
  // Each row is folded by one thread in the order of the vocabulary: the result does not depend on their number.
  parallel_for(0, args.rows, grain(1 << 13, args.tile),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void accumulate_cpu(Tensor total, const Tensor& share) {
  check_memory("accumulate", "total", total);
  check_memory("accumulate", "share", share);
  const auto type = share.scalar_type();
  TORCH_CHECK_TYPE(total.scalar_type() == at::kFloat && (type == at::kBFloat16 || type == at::kHalf),
                   "gfast: accumulate: total must be float32 and share bfloat16 or float16, not ", total.scalar_type(),
                   " and ", type);
  TORCH_CHECK_VALUE(total.sizes() == share.sizes() && total.is_contiguous() && share.is_contiguous(),
                    "gfast: accumulate: total ", total.sizes(), " and share ", share.sizes(),
                    " must be contiguous and of one shape");
  check_apart("accumulate", {"total", total}, {{"share", share}});
  float* sum = total.mutable_data_ptr<float>();
  const void* data = share.const_data_ptr();
  const Dtype dtype = type == at::kBFloat16 ? Dtype::bf16 : Dtype::f16;
  auto* kernel = GFAST_KERNEL(accumulate);
  parallel_for(0, total.numel(), 1 << 15,
               [&](int64_t begin, int64_t end) { kernel(sum, data, dtype, begin, end); });
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CPU, m) {
  m.impl("fold_rows", &fold_rows_cpu);
  m.impl("accumulate", &accumulate_cpu);
}

}  // namespace gfast
