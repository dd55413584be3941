// What the CPU and the CUDA grad_dots share: argument checks and the order of the work. Tensors are sorted by group
// (stable) and cut into chunks of a fixed number of elements, so every sum has one order, whatever runs it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "extent.h"

namespace gfast {

enum ElementType : int { kFloat = 0, kBFloat16 = 1, kHalf = 2, kDouble = 3 };

inline int element_type(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return ElementType::kFloat;
    case at::kBFloat16: return ElementType::kBFloat16;
    case at::kHalf: return ElementType::kHalf;
    case at::kDouble: return ElementType::kDouble;
    default: return -1;
  }
}

struct DotItem {
  at::Tensor x;                // dense memory, kept alive here
  std::vector<at::Tensor> ys;  // [num_dirs], same memory order as x
  int64_t group;
  int64_t chunk_start;  // chunks of all items before this one
};

struct DotPlan {
  std::vector<DotItem> items;  // sorted by group, without empty tensors
  int64_t num_chunks = 0;
};

inline void check_operand(const at::Tensor& t, const char* list, int64_t index, const at::Device& device) {
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, "gfast: ", list, "[", index, "] is not a strided tensor (layout ",
                    t.layout(), "); make it dense first");
  TORCH_CHECK_VALUE(element_type(t) >= 0, "gfast: ", list, "[", index, "] has dtype ", t.scalar_type(),
                    "; grad_dot takes float32, bfloat16, float16 and float64");
  TORCH_CHECK_VALUE(t.device() == device, "gfast: ", list, "[", index, "] is on ", t.device(), " but xs[0] is on ",
                    device, "; all tensors must be on one device");
  TORCH_CHECK_VALUE(has_memory(t), "gfast: ", list, "[", index, "] of shape ", t.sizes(), " has lost its memory: its ",
                    "storage has ", t.storage().nbytes(), " bytes (a sharded parameter must be gathered first)");
}

// xs: T tensors; ys: T * num_dirs tensors, direction d of tensor t at ys[d * T + t]; groups: T indices.
inline DotPlan plan_grad_dots(at::TensorList xs, at::TensorList ys, at::IntArrayRef groups, int64_t num_groups,
                              int64_t num_dirs, int64_t chunk_size) {
  const int64_t T = static_cast<int64_t>(xs.size());
  TORCH_CHECK_VALUE(num_dirs >= 0 && num_groups >= 0, "gfast: num_dirs (", num_dirs, ") and num_groups (", num_groups,
                    ") must not be negative");
  const int64_t given = static_cast<int64_t>(ys.size());  // divided, as T * num_dirs may not fit in 64 bits
  TORCH_CHECK_VALUE(T == 0 || num_dirs == 0 ? given == 0 : given / T == num_dirs && given % T == 0,
                    "gfast: grad_dots got ", given, " direction tensors for ", T, " tensors and ", num_dirs,
                    " directions; expected one for each tensor and direction");
  TORCH_CHECK_VALUE(T > 0, "gfast: grad_dots got no tensors");
  TORCH_CHECK_VALUE(static_cast<int64_t>(groups.size()) == T, "gfast: grad_dots got ", groups.size(),
                    " group indices for ", T, " tensors");
  for (int64_t t = 0; t < T; ++t) {
    check_operand(xs[t], "xs", t, xs[0].device());
    TORCH_CHECK_VALUE(groups[t] >= 0 && groups[t] < num_groups, "gfast: groups[", t, "] = ", groups[t],
                      " is outside [0, ", num_groups, ")");
    for (int64_t d = 0; d < num_dirs; ++d) {
      const at::Tensor& y = ys[d * T + t];
      check_operand(y, "ys", d * T + t, xs[0].device());
      TORCH_CHECK_VALUE(y.sizes() == xs[t].sizes(), "gfast: ys[", d * T + t, "] (direction ", d, " of tensor ", t,
                        ") has shape ", y.sizes(), " but xs[", t, "] has ", xs[t].sizes());
    }
  }

  std::vector<int64_t> order(T);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return groups[a] < groups[b]; });
  DotPlan plan;
  plan.items.reserve(T);
  for (const int64_t t : order) {
    if (xs[t].numel() == 0) continue;
    // Tensors in one common dense order (both transposed, say) are read as they lie; others are copied.
    bool same_order = xs[t].is_non_overlapping_and_dense();
    for (int64_t d = 0; d < num_dirs; ++d) same_order = same_order && ys[d * T + t].strides() == xs[t].strides();
    DotItem item{same_order ? xs[t] : xs[t].contiguous(), {}, groups[t], plan.num_chunks};
    for (int64_t d = 0; d < num_dirs; ++d)
      item.ys.push_back(same_order ? ys[d * T + t] : ys[d * T + t].contiguous());
    plan.num_chunks += (item.x.numel() + chunk_size - 1) / chunk_size;
    plan.items.push_back(std::move(item));
  }
  return plan;
}

}  // namespace gfast
