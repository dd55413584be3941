// gfast::grad_dots on CUDA: builds the tensor table and launches grad_dots_kernel.cu on the current stream, without
// a host synchronisation.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/grad_dots_kernel.h"
#include "grad_dots_plan.h"

namespace gfast {

namespace {

using cuda::DotArgs;
using cuda::DotRecord;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Counters of the groups' blocks that have arrived, zero between launches. Kernels of one stream follow each other, those
// of several may run at once: each stream has its own. A recorded graph may run beside anything: it has its own too.
at::Tensor arrivals(int64_t groups, const at::TensorOptions& options, cudaStream_t stream) {
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
    return at::zeros({groups}, options);
  static std::mutex mutex;
  static auto* held = new std::map<std::pair<int, cudaStream_t>, at::Tensor>;  // not freed: CUDA ends before statics do
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& counters = (*held)[{options.device().index(), stream}];
  if (!counters.defined() || counters.numel() < groups) counters = at::zeros({std::max<int64_t>(groups, 1024)}, options);
  return counters;
}

// Chunks of an item's group: where they begin and end.
struct Span {
  int64_t begin, end;
};

std::vector<Span> group_spans(const DotPlan& plan, int64_t num_groups) {
  std::vector<Span> spans(num_groups, {plan.num_chunks, 0});
  for (size_t i = 0; i < plan.items.size(); ++i) {
    Span& span = spans[plan.items[i].group];
    span.begin = std::min(span.begin, plan.items[i].chunk_start);
    span.end = i + 1 < plan.items.size() ? plan.items[i + 1].chunk_start : plan.num_chunks;
  }
  return spans;
}

DotRecord make_record(const DotItem& item, const Span& span, int64_t first, int count) {
  DotRecord r{};
  r.x = item.x.const_data_ptr();
  r.x_type = static_cast<uint8_t>(element_type(item.x));
  r.numel = item.x.numel();
  r.chunk_start = static_cast<int32_t>(item.chunk_start);
  r.group = static_cast<int32_t>(item.group);
  r.group_begin = static_cast<int32_t>(span.begin), r.group_end = static_cast<int32_t>(span.end);
  bool vector = r.x_type != kDouble && aligned(r.x);
  for (int d = 0; d < count; ++d) {
    r.y[d] = item.ys[first + d].const_data_ptr();
    r.y_type[d] = static_cast<uint8_t>(element_type(item.ys[first + d]));
    vector = vector && r.y_type[d] != kDouble && r.y_type[d] == r.y_type[0] && aligned(r.y[d]);
  }
  const int y_type = count > 0 ? r.y_type[0] : r.x_type;
  r.path = static_cast<uint8_t>(vector ? r.x_type * 3 + y_type : cuda::kGeneralPath);
  return r;
}

at::Tensor grad_dots_cuda(at::TensorList xs, at::TensorList ys, at::IntArrayRef groups, int64_t num_groups,
                          int64_t num_dirs) {
  const DotPlan plan = plan_grad_dots(xs, ys, groups, num_dirs, cuda::kChunk);
  const auto options = xs[0].options().dtype(at::kDouble).requires_grad(false);
  if (plan.num_chunks == 0) return at::zeros({num_groups, num_dirs + 1}, options);
  TORCH_CHECK_VALUE(plan.num_chunks < (int64_t{1} << 31), "gfast: grad_dots got more than 2^47 elements in one call");
  const c10::cuda::CUDAGuard guard(xs[0].device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const std::vector<Span> spans = group_spans(plan, num_groups);
  const bool whole = std::all_of(spans.begin(), spans.end(), [](const Span& span) { return span.end > span.begin; });
  at::Tensor out = whole ? at::empty({num_groups, num_dirs + 1}, options)  // [G, D + 1], each row written by its group
                         : at::zeros({num_groups, num_dirs + 1}, options);
  const at::Tensor arrived = arrivals(num_groups, options.dtype(at::kInt), stream);

  const auto record = [&](int i, int64_t first, int count) {
    return make_record(plan.items[i], spans[plan.items[i].group], first, count);
  };

  for (int64_t first = 0; first == 0 || first < num_dirs; first += cuda::kMaxDirs) {
    const int count = static_cast<int>(std::min<int64_t>(cuda::kMaxDirs, num_dirs - first));
    at::Tensor partial = at::empty({plan.num_chunks, count + 1}, options);  // [chunks, count + 1]
    DotArgs args{};
    args.num_records = static_cast<int>(plan.items.size());
    args.num_chunks = plan.num_chunks;
    args.partial = partial.mutable_data_ptr<double>();
    args.arrived = reinterpret_cast<unsigned*>(arrived.data_ptr<int>());
    args.out = out.mutable_data_ptr<double>();
    args.out_columns = static_cast<int>(num_dirs + 1);
    args.first_column = static_cast<int>(first);
    args.write_squares = first == 0;

    at::Tensor table;  // on the device; lives until the kernel is enqueued
    if (args.num_records <= cuda::kInlineRecords) {
      for (int i = 0; i < args.num_records; ++i) args.inline_records[i] = record(i, first, count);
    } else {
      TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
                  "gfast: grad_dots of more than ", cuda::kInlineRecords, " tensors cannot be recorded in a CUDA graph: "
                  "their table is copied from host memory that does not live as long; call it outside, or in parts");
      at::Tensor host = at::empty({static_cast<int64_t>(args.num_records * sizeof(DotRecord))},
                                  at::TensorOptions(at::kByte).pinned_memory(true));
      auto* records = reinterpret_cast<DotRecord*>(host.mutable_data_ptr<uint8_t>());
      for (int i = 0; i < args.num_records; ++i) records[i] = record(i, first, count);
      table = host.to(xs[0].device(), /*non_blocking=*/true);
      args.records = reinterpret_cast<const DotRecord*>(table.const_data_ptr());
    }
    C10_CUDA_CHECK(cuda::launch_grad_dots(args, count, stream));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CUDA, m) { m.impl("grad_dots", &grad_dots_cuda); }

}  // namespace gfast
