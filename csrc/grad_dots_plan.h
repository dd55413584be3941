// What the CPU and the CUDA grad_dots share: the order of the work. Tensors are sorted by group (stable) and cut into
// chunks of a fixed number of elements, so every sum has one order, whatever runs it.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

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

// xs: T tensors; ys: T * num_dirs tensors, direction d of tensor t at ys[d * T + t]; groups: T indices. All checked.
inline DotPlan plan_grad_dots(at::TensorList xs, at::TensorList ys, at::IntArrayRef groups, int64_t num_dirs,
                              int64_t chunk_size) {
  const int64_t T = static_cast<int64_t>(xs.size());
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
