// gfast::grad_dots before it goes to a device: all checks of its lists, which Python would take a millisecond for.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

#include "extent.h"
#include "grad_dots_plan.h"

namespace gfast {
namespace {

std::string shape(const at::Tensor& x) {
  std::string text = "(";
  for (int64_t d = 0; d < x.dim(); ++d) text += std::to_string(x.size(d)) + (d + 1 < x.dim() ? ", " : "");
  return text + (x.dim() == 1 ? ",)" : ")");
}

// Tensor t of xs (list -1) or of direction `list`.
void check_operand(const at::Tensor& x, int64_t list, int64_t t, const at::Tensor& like, const at::Device& device) {
  const auto what = [&] {
    const std::string index = std::to_string(t);
    return "gfast: grad_dot: " + (list < 0 ? "xs[" + index + "]" : "direction " + std::to_string(list) + "'s tensor " + index);
  };
  TORCH_CHECK_VALUE(x.layout() == at::kStrided, what(), " is not a strided tensor (torch.", x.layout(),
                    "); make it dense first");
  TORCH_CHECK_VALUE(element_type(x) >= 0, what(), " has dtype ", x.scalar_type(),
                    "; take one of float32, bfloat16, float16 and float64");
  TORCH_CHECK_VALUE(x.sizes() == like.sizes(), what(), " has shape ", shape(x), " but xs[", t, "] has ", shape(like));
  TORCH_CHECK_VALUE(x.device() == device, what(), " is on ", x.device(), " but xs[0] is on ", device);
  TORCH_CHECK_VALUE(has_memory(x), what(), " of shape ", shape(x), " has lost its memory: its storage has ",
                    x.storage().nbytes(), " bytes (a sharded parameter must be gathered first)");
}

void check(at::TensorList xs, at::TensorList ys, at::IntArrayRef groups, int64_t num_groups, int64_t num_dirs) {
  const int64_t T = static_cast<int64_t>(xs.size());
  TORCH_CHECK_VALUE(num_dirs >= 0, "gfast: grad_dot: num_dirs must not be negative, got ", num_dirs);
  TORCH_CHECK_VALUE(num_groups >= 0, "gfast: grad_dot: num_groups must not be negative, got ", num_groups);
  const int64_t given = static_cast<int64_t>(ys.size());  // divided, as T * num_dirs may not fit in 64 bits
  TORCH_CHECK_VALUE(T == 0 || num_dirs == 0 ? given == 0 : given / T == num_dirs && given % T == 0,
                    "gfast: grad_dot: got ", given, " direction tensors for ", T, " tensors and ", num_dirs,
                    " directions; expected one for each tensor and direction");
  TORCH_CHECK_VALUE(T > 0, "gfast: grad_dot: got no tensors");
  TORCH_CHECK_VALUE(static_cast<int64_t>(groups.size()) == T, "gfast: grad_dot: got ", groups.size(),
                    " group indices for ", T, " tensors");
  for (int64_t t = 0; t < T; ++t) {
    TORCH_CHECK_VALUE(groups[t] >= 0 && groups[t] < num_groups, "gfast: grad_dot: groups[", t, "] = ", groups[t],
                      " is outside [0, ", num_groups, ")");
    for (int64_t list = -1; list < num_dirs; ++list)
      check_operand(list < 0 ? xs[t] : ys[list * T + t], list, t, xs[t], xs[0].device());
  }
}

at::Tensor checked(c10::DispatchKeySet keys, at::TensorList xs, at::TensorList ys, at::IntArrayRef groups,
                   int64_t num_groups, int64_t num_dirs) {
  check(xs, ys, groups, num_groups, num_dirs);
  using Op = at::Tensor(at::TensorList, at::TensorList, at::IntArrayRef, int64_t, int64_t);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gfast::grad_dots", "").typed<Op>();
  const c10::DispatchKeySet behind(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect);
  return op.redispatch(keys & behind, xs, ys, groups, num_groups, num_dirs);
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, BackendSelect, m) { m.impl("grad_dots", &checked); }

}  // namespace gfast
