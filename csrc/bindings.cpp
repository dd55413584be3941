// Every op schema of gfast, and build_info() for `gfast doctor`. Implementations register themselves:
// csrc/cpu/*.cpp for the CPU key, csrc/cuda/* for the CUDA key; fake tensors live in Python, and so do derivatives: the
// public functions have them, these ops refuse.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/isa.h"

#ifdef __clang__
#define GFAST_COMPILER "clang " __clang_version__
#else
#define GFAST_COMPILER "gcc " __VERSION__
#endif

TORCH_LIBRARY(gfast, m) {
  m.def("logp_rows(Tensor logits, Tensor labels, float scale, float softcap) -> (Tensor logp, Tensor stats)");
  m.def(
      "logp_rows_grad(Tensor logits, Tensor labels, Tensor logp, Tensor stats, Tensor coef, float scale, "
      "float softcap, Tensor(a!) out) -> ()");
  m.def(
      "weighted_rows(Tensor logits, Tensor labels, Tensor? ref_logp, float sign, float p_pow, float q_pow, "
      "float beta, Tensor coef_scale, float scale, float softcap, Tensor(a!)? out) -> (Tensor logp, Tensor weight)");
  m.def("label_factor(str op, Tensor labels, int vocab) -> Tensor");
  m.def(
      "kl_rows(Tensor logits, Tensor ref_logits, Tensor labels, Tensor coef_scale, float scale, float softcap, "
      "float ref_scale, float ref_softcap, Tensor(a!)? out) -> Tensor kl");
  m.def(
      "kl_parts(Tensor logits, Tensor ref_logits, Tensor labels, float scale, float softcap, float ref_scale, "
      "float ref_softcap) -> (Tensor kl, Tensor totals)");
  m.def(
      "kl_rows_grad(Tensor logits, Tensor ref_logits, Tensor labels, Tensor totals, Tensor coef_scale, float scale, "
      "float softcap, float ref_scale, float ref_softcap, Tensor(a!) out) -> ()");
  m.def(
      "soft_rows(Tensor logits, Tensor ref_logits, Tensor labels, Tensor lower, Tensor coef_scale, int kind, "
      "float scale, float softcap, float ref_scale, float ref_softcap, Tensor(a!)? out) -> Tensor value");
  m.def(
      "stat_rows(Tensor logits, Tensor labels, int top, float sharpness, bool soft, float scale, float softcap) -> "
      "(Tensor stats, Tensor values, Tensor ids)");
  m.def(
      "stat_rows_grad(Tensor logits, Tensor labels, Tensor stats, Tensor dense, Tensor columns, Tensor adds, "
      "bool soft, float scale, float softcap, Tensor(a!) out) -> ()");
  m.def("fold_rows(Tensor logits, Tensor labels, int first, float scale, float softcap, Tensor(a!) state) -> ()");
  m.def("mixed_mm(Tensor a, Tensor b, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("head_grad_hidden(Tensor grad_logits, Tensor weight, int most, Tensor(a!) out) -> ()");
  m.def("head_grad_weight(Tensor grad_logits, Tensor hidden, Tensor(a!) out) -> ()");
  m.def("accumulate(Tensor(a!) total, Tensor share) -> ()");
  m.def("used_rows(Tensor x) -> Tensor");
  m.def(
      "pair_dots(Tensor a, Tensor b, Tensor c, Tensor d, int[] rows, int[] columns, bool same, Tensor(a!)? inputs, "
      "bool known) -> Tensor");
  m.def("pair_sums(Tensor x, Tensor y, int[] rows, int[] columns) -> Tensor");
  m.def("row_dots(Tensor a, Tensor b, Tensor direction) -> Tensor");
  m.def("fresh(int[] size, ScalarType dtype) -> Tensor");
  m.def("unpooled(int[] size, ScalarType dtype) -> Tensor");
  m.def("empty_cache() -> int");
  m.def("scale_(Tensor(a!) x, Tensor factor) -> ()");
  m.def("grad_dots(Tensor[] xs, Tensor[] ys, int[] groups, int num_groups, int num_dirs) -> Tensor");
}

namespace {

bool requires_grad(const c10::IValue& value) {
  if (value.isTensor()) return value.toTensor().defined() && value.toTensor().requires_grad();
  if (!value.isTensorList()) return false;
  for (const at::Tensor& x : value.toTensorVector())
    if (x.defined() && x.requires_grad()) return true;
  return false;
}

// Without it a result would come out as a constant, and the gradient through it be missing without a word. What an op
// has written to counts as modified, as for torch's own ops: autograd notices where it has kept the old values.
void no_derivative(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = (*stack)[first + i];
    TORCH_CHECK(!at::GradMode::is_enabled() || !requires_grad(value), op.schema().name(), " has no derivative but ",
                arguments[i].name(), " requires grad: call the public function of gfast instead, which has one, "
                "detach() the argument, or use torch.no_grad()");
    const c10::AliasInfo* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite() && value.isTensor()) written.push_back(value.toTensor());
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const at::Tensor& x : written)
    if (x.defined() && !x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = GFAST_COMPILER;
  info["flags"] = GFAST_FLAGS;
  info["torch"] = GFAST_TORCH_VERSION;
#ifdef GFAST_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#ifdef INTRA_OP_PARALLEL  // what at::parallel_for itself asks
  info["threads"] = true;
#else
  info["threads"] = false;
#endif
  info["cuda_reason"] = GFAST_CUDA_REASON;
  pybind11::list isas;
  const std::string built = GFAST_ISAS;
  for (size_t start = 0; start <= built.size();) {
    const size_t end = std::min(built.find(',', start), built.size());
    isas.append(built.substr(start, end - start));
    start = end + 1;
  }
  info["instruction_sets"] = isas;
  info["instruction_set"] = gfast::isa_name();
  return info;
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, Autograd, m) {
  for (const char* name :
       {"logp_rows", "logp_rows_grad", "weighted_rows", "kl_rows", "kl_parts", "kl_rows_grad", "soft_rows", "stat_rows",
        "stat_rows_grad", "fold_rows", "mixed_mm", "head_grad_hidden", "head_grad_weight", "accumulate", "pair_dots",
        "pair_sums", "row_dots", "scale_",
        "grad_dots"})  // not used_rows, fresh, unpooled: booleans and new memory have no derivative to miss
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_derivative>());
  // without this they pass a fallback of torch's, which takes longer
  for (const char* name : {"label_factor", "fresh", "unpooled"})
    m.impl(name, torch::CppFunction::makeFallthrough());
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "gfast's compiled ops; they are reached through torch.ops.gfast";
  m.def("build_info", &build_info, "Compiler, flags, torch version, CUDA (or why not) and instruction sets built and picked.");
}
