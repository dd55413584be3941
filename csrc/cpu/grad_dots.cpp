// gfast::grad_dots on the CPU: fixed chunks in parallel, then one ordered fp64 sum a group.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "grad_dots_plan.h"

namespace gfast {

GFAST_DECLARE_KERNEL(void, grad_dots_block,
                     (const void* x, int x_type, const void* const* ys, const int* y_types, int num_dirs, int64_t start,
                      int64_t count, double* lanes, double* out))

namespace {

constexpr int64_t kChunk = 16384;  // 64 KiB of fp32: x stays in L2 between directions
constexpr int kLanes = 32;

at::Tensor grad_dots_cpu(at::TensorList xs, at::TensorList ys, at::IntArrayRef groups, int64_t num_groups,
                         int64_t num_dirs) {
  const DotPlan plan = plan_grad_dots(xs, ys, groups, num_dirs, kChunk);
  const int64_t cols = num_dirs + 1;
  at::Tensor out = at::zeros({num_groups, cols}, at::kDouble);  // [G, D + 1]
  std::vector<double> partial(plan.num_chunks * cols);          // [chunks, D + 1]
  auto* block = GFAST_KERNEL(grad_dots_block);

  parallel_for(0, plan.num_chunks, 8, [&](int64_t begin, int64_t end) {
    std::vector<double> lanes(kLanes * cols);
    std::vector<const void*> pointers(num_dirs);
    std::vector<int> types(num_dirs);
    auto item = std::upper_bound(plan.items.begin(), plan.items.end(), begin,
                                 [](int64_t chunk, const DotItem& i) { return chunk < i.chunk_start; });
    --item;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (item + 1 != plan.items.end() && (item + 1)->chunk_start <= chunk) ++item;
      for (int64_t d = 0; d < num_dirs; ++d) {
        pointers[d] = item->ys[d].const_data_ptr();
        types[d] = element_type(item->ys[d]);
      }
      const int64_t start = (chunk - item->chunk_start) * kChunk;
      block(item->x.const_data_ptr(), element_type(item->x), pointers.data(), types.data(), static_cast<int>(num_dirs),
            start, std::min(kChunk, item->x.numel() - start), lanes.data(), &partial[chunk * cols]);
    }
  });

  double* sums = out.mutable_data_ptr<double>();
  for (size_t i = 0; i < plan.items.size(); ++i) {
    const int64_t end = i + 1 < plan.items.size() ? plan.items[i + 1].chunk_start : plan.num_chunks;
    for (int64_t chunk = plan.items[i].chunk_start; chunk < end; ++chunk)
      for (int64_t c = 0; c < cols; ++c) sums[plan.items[i].group * cols + c] += partial[chunk * cols + c];
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CPU, m) { m.impl("grad_dots", &grad_dots_cpu); }

}  // namespace gfast
