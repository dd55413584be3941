// gfast::weighted_rows on CUDA: checks, then rows_kernel.cu on the current stream, without a host synchronisation.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "cuda/rows_kernel.h"
#include "extent.h"
#include "grad_dots_plan.h"

namespace gfast {

namespace {

using at::Tensor;

void check_here(const char* what, const Tensor& x, const Tensor& logits, at::ScalarType type) {
  TORCH_CHECK_VALUE(x.device() == logits.device(), "gfast: weighted_rows: ", what, " is on ", x.device(),
                    " but the logits are on ", logits.device(), "; move all to one device");
  TORCH_CHECK_TYPE(x.scalar_type() == type, "gfast: weighted_rows: ", what, " must be ", type, ", not ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(has_memory(x), "gfast: weighted_rows: ", what, " has lost its memory");
}

void check_matrix(const char* what, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "gfast: weighted_rows: ", what,
                    " must be [N, V] with neighbouring columns, not ", x.sizes(), " with strides ", x.strides());
}

// Contiguous values of rows, [N] on the device of the logits.
Tensor check_values(const char* what, const Tensor& x, const Tensor& logits, at::ScalarType type) {
  check_here(what, x, logits, type);
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == logits.size(0), "gfast: weighted_rows: ", what, " must be [",
                    logits.size(0), "], not ", x.sizes());
  return x.contiguous();
}

float check_number(const char* what, double x, bool allowed) {
  TORCH_CHECK_VALUE(allowed && std::fabs(x) <= std::numeric_limits<float>::max(), "gfast: weighted_rows: ", what, " = ",
                    x, " is out of range");
  return static_cast<float>(x);
}

int64_t row_stride(const Tensor& x) { return x.size(0) <= 1 ? x.size(1) : x.stride(0); }

uintptr_t address(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()); }

std::tuple<Tensor, Tensor> weighted_rows_cuda(const Tensor& logits, const Tensor& labels,
                                              const std::optional<Tensor>& ref_logp, double sign, double p_pow,
                                              double q_pow, double beta, const Tensor& coef_scale, double scale,
                                              double softcap, std::optional<Tensor> out) {
  check_matrix("logits", logits);
  const int type = element_type(logits);
  TORCH_CHECK_TYPE(type >= 0 && type != kDouble, "gfast: weighted_rows: the kernel takes float32, bfloat16 and float16, "
                   "not ", logits.scalar_type());
  check_here("logits", logits, logits, logits.scalar_type());
  TORCH_CHECK_VALUE(softcap == 0, "gfast: weighted_rows: the CUDA kernel has no soft cap; Triton's has");
  const int64_t rows = logits.size(0), vocab = logits.size(1), itemsize = logits.element_size();
  const int64_t stride = row_stride(logits);
  const bool aligned = address(logits) % 16 == 0 && stride * itemsize % 16 == 0;
  const int blocks = cuda::row_blocks(cuda::row_vectors(vocab, itemsize, aligned));
  TORCH_CHECK_VALUE(vocab > 0 && blocks > 0 && rows <= std::numeric_limits<int>::max() / blocks,
                    "gfast: weighted_rows: a cluster holds rows of up to ", cuda::kMaxBlocks * cuda::kPartBytes,
                    " bytes, not ", logits.sizes(), " of ", logits.scalar_type(), "; Triton's kernel takes those");
  const c10::cuda::CUDAGuard guard(logits.device());
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, logits.device().index()));
  TORCH_CHECK_VALUE(major >= 9, "gfast: weighted_rows: the CUDA kernel needs a GPU with clusters (sm_90 or later); "
                    "Triton's does not");

  cuda::RowsArgs args{};
  args.logits = logits.const_data_ptr();
  args.stride = stride;
  const Tensor y = check_values("labels", labels, logits, at::kLong);
  args.labels = y.const_data_ptr<int64_t>();
  args.rows = rows;
  args.vocab = static_cast<int>(vocab);
  args.sign = check_number("sign", sign, true);
  args.p_pow = check_number("p_pow", p_pow, true);
  args.q_pow = check_number("q_pow", q_pow, true);
  args.beta = check_number("beta", beta, beta >= 0);
  args.scale = check_number("scale", scale, static_cast<float>(scale) > 0);
  Tensor ref;
  if (beta > 0) {
    TORCH_CHECK_VALUE(ref_logp.has_value(), "gfast: weighted_rows: beta = ", beta,
                      " weighs tokens against a reference model, so ref_logp is needed");
    ref = check_values("ref_logp", *ref_logp, logits, at::kFloat);
    args.ref_logp = ref.const_data_ptr<float>();
  }
  Tensor coef = coef_scale;
  args.coef_by_row = coef_scale.dim() > 0;
  if (args.coef_by_row)
    coef = check_values("coef_scale", coef_scale, logits, at::kFloat);
  else
    check_here("coef_scale", coef_scale, logits, at::kFloat);
  args.coef_scale = coef.const_data_ptr<float>();
  if (out.has_value()) {
    check_matrix("out", *out);
    check_here("out", *out, logits, logits.scalar_type());
    const int64_t out_stride = row_stride(*out);
    TORCH_CHECK_VALUE(out->sizes() == logits.sizes() && out_stride >= vocab, "gfast: weighted_rows: out must have the "
                      "shape of logits ", logits.sizes(), " and rows apart from each other, not ", out->sizes(),
                      " with strides ", out->strides());
    TORCH_CHECK_VALUE((address(*out) - address(logits)) % 16 == 0 && (out_stride - stride) * itemsize % 16 == 0,
                      "gfast: weighted_rows: rows of out must begin at the same address modulo 16 as those of logits; "
                      "Triton's kernel takes any");
    const bool same = out->const_data_ptr() == logits.const_data_ptr() && out_stride == stride;
    TORCH_CHECK_VALUE(same || address(*out) + extent(*out) <= address(logits) ||
                          address(logits) + extent(logits) <= address(*out),
                      "gfast: weighted_rows: out must be the logits themselves or memory of its own");
    args.out = out->mutable_data_ptr();
    args.out_stride = out_stride;
  }
  const auto options = logits.options().dtype(at::kFloat).requires_grad(false);
  Tensor logp = at::empty({rows}, options), weight = at::empty({rows}, options);
  args.logp = logp.mutable_data_ptr<float>();
  args.weight = weight.mutable_data_ptr<float>();
  C10_CUDA_CHECK(cuda::launch_weighted_rows(args, type, aligned, c10::cuda::getCurrentCUDAStream()));
  return {logp, weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CUDA, m) { m.impl("weighted_rows", &weighted_rows_cuda); }

}  // namespace gfast
