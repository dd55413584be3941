// Multi-tensor group dots in one launch for all tensors: a block takes one chunk of kChunk elements of one tensor and
// writes fp64 partial sums; the block that comes last of its group adds the group's partials. Whichever that is, the order
// of the sum is the same, so results repeat bit for bit. Bound by memory: each operand is read once, by loads of 8 or 16
// bytes, several in flight.
#include "cuda/grad_dots_kernel.h"

#include "cuda/elements.h"

namespace gfast::cuda {

namespace {

constexpr int kThreads = 256;
enum : int { kFloat = 0, kBFloat16 = 1, kHalf = 2, kDouble = 3 };

// V elements moved by one load of 8 or 16 bytes.
template <typename T, int V>
struct Pack {
  static constexpr int kWords = sizeof(T) * V / 4;
  uint32_t word[kWords];

  // Streaming loads: no element is read twice.
  __device__ __forceinline__ void load(const T* p) {
    if constexpr (kWords == 4) {
      const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
      word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    } else {
      const uint2 v = __ldcs(reinterpret_cast<const uint2*>(p));
      word[0] = v.x, word[1] = v.y;
    }
  }

  __device__ __forceinline__ float get(int i) const { return element<T>(word, i); }
};

// acc[d] += sum x*y_d, acc[D] += sum x*x over n elements, for this thread's share. Products, and sums of at most 32 of
// them, are fp32; these sums are added in fp64.
template <int D, typename X, typename Y>
__device__ __forceinline__ void vector_chunk(const DotRecord& r, int64_t start, int n, double* acc) {
  constexpr int V = 16 / (sizeof(X) > sizeof(Y) ? sizeof(X) : sizeof(Y));
  constexpr int kUnroll = D > 1 ? 2 : 4;  // 6 or 8 loads in flight a thread
  constexpr int kTile = kThreads * V * kUnroll;
  const X* x = static_cast<const X*>(r.x) + start;
  const Y* y[D > 0 ? D : 1];
#pragma unroll
  for (int d = 0; d < D; ++d) y[d] = static_cast<const Y*>(r.y[d]) + start;

  const int full = n / kTile * kTile;
  for (int base = threadIdx.x * V; base < full; base += kTile) {
    Pack<X, V> px[kUnroll];
    Pack<Y, V> py[D > 0 ? D : 1][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      px[u].load(x + base + u * kThreads * V);
#pragma unroll
      for (int d = 0; d < D; ++d) py[d][u].load(y[d] + base + u * kThreads * V);
    }
    float sum[D + 1] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float v = px[u].get(i);
#pragma unroll
        for (int d = 0; d < D; ++d) sum[d] = fmaf(v, py[d][u].get(i), sum[d]);
        sum[D] = fmaf(v, v, sum[D]);
      }
    }
#pragma unroll
    for (int c = 0; c <= D; ++c) acc[c] += sum[c];
  }

  for (int i = full + threadIdx.x; i < n; i += kThreads) {
    const float v = widen(x[i]);
#pragma unroll
    for (int d = 0; d < D; ++d) acc[d] += v * widen(y[d][i]);
    acc[D] += v * v;
  }
}

__device__ __forceinline__ double load_element(const void* p, int type, int64_t i) {
  switch (type) {
    case kDouble: return static_cast<const double*>(p)[i];
    case kFloat: return static_cast<const float*>(p)[i];
    case kBFloat16: return widen(static_cast<const BFloat16*>(p)[i]);
    default: return widen(static_cast<const Half*>(p)[i]);
  }
}

__device__ __forceinline__ double product(double a, int a_type, double b, int b_type) {
  if (a_type == kDouble || b_type == kDouble) return a * b;
  return static_cast<float>(a) * static_cast<float>(b);
}

template <int D>
__device__ __forceinline__ void general_chunk(const DotRecord& r, int64_t start, int n, double* acc) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const double v = load_element(r.x, r.x_type, start + i);
#pragma unroll
    for (int d = 0; d < D; ++d) {
      acc[d] += product(v, r.x_type, load_element(r.y[d], r.y_type[d], start + i), r.y_type[d]);
    }
    acc[D] += product(v, r.x_type, v, r.x_type);
  }
}

// The last record that starts at or before `chunk`: 32 candidates a round, so two rounds serve 1024 tensors.
__device__ __forceinline__ int find_record(const DotRecord* records, int count, int chunk) {
  const int lane = threadIdx.x % 32;
  int low = 0, high = count;
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int at = low + lane * step;
    const unsigned below = __ballot_sync(0xffffffffu, at < high && records[at].chunk_start <= chunk);
    low += (31 - __clz(below)) * step;
    high = min(high, low + step);
  }
  return low;
}

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  return v;
}

// Sum over the block, valid in thread 0; the order depends on the number of threads alone.
__device__ __forceinline__ double block_sum(double v, double* shared) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) sum += shared[w];
  }
  return sum;
}

// The block that is the last of its group to have written its partials adds them all up, into the group's row of the
// result. No part of the kernel's loops: inlined, what it needs would displace their registers.
template <int D>
__device__ __noinline__ void finish_group(const DotArgs& args, double* shared) {
  __shared__ bool last;
  const DotRecord* records = args.records != nullptr ? args.records : args.inline_records;
  const DotRecord& r = records[find_record(records, args.num_records, static_cast<int>(blockIdx.x))];
  if (threadIdx.x == 0) {
    __threadfence();  // this thread's partials, before the count that announces them
    last = atomicAdd(args.arrived + r.group, 1u) == static_cast<unsigned>(r.group_end - r.group_begin) - 1u;
    if (last) {
      atomicExch(args.arrived + r.group, 0u);  // for the next launch; a plain store could meet the others' counts
      __threadfence();  // the others' partials, after their count: for the whole block, by the barrier
    }
  }
  __syncthreads();
  if (!last) return;

  double acc[D + 1] = {};
  for (int64_t chunk = r.group_begin + static_cast<int>(threadIdx.x); chunk < r.group_end; chunk += kThreads) {
#pragma unroll
    // around the L1 cache: a line of it may be from before a neighbour's write
    for (int c = 0; c <= D; ++c) acc[c] += __ldcg(args.partial + chunk * (D + 1) + c);
  }
  double* row = args.out + static_cast<int64_t>(r.group) * args.out_columns;
#pragma unroll
  for (int c = 0; c <= D; ++c) {
    const double sum = block_sum(acc[c], shared);
    const int column = c < D ? args.first_column + c : args.out_columns - 1;
    if (threadIdx.x == 0 && (c < D || args.write_squares)) row[column] = sum;
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 3) chunk_dots(const __grid_constant__ DotArgs args) {
  __shared__ double shared[kThreads / 32];
  const DotRecord* records = args.records != nullptr ? args.records : args.inline_records;
  const int64_t chunk = blockIdx.x;
  const DotRecord r = records[find_record(records, args.num_records, static_cast<int>(chunk))];
  const int64_t start = (chunk - r.chunk_start) * kChunk;
  const int n = static_cast<int>(min(kChunk, r.numel - start));

  double acc[D + 1] = {};
  switch (r.path) {
    case 0: vector_chunk<D, float, float>(r, start, n, acc); break;
    case 1: vector_chunk<D, float, BFloat16>(r, start, n, acc); break;
    case 2: vector_chunk<D, float, Half>(r, start, n, acc); break;
    case 3: vector_chunk<D, BFloat16, float>(r, start, n, acc); break;
    case 4: vector_chunk<D, BFloat16, BFloat16>(r, start, n, acc); break;
    case 5: vector_chunk<D, BFloat16, Half>(r, start, n, acc); break;
    case 6: vector_chunk<D, Half, float>(r, start, n, acc); break;
    case 7: vector_chunk<D, Half, BFloat16>(r, start, n, acc); break;
    case 8: vector_chunk<D, Half, Half>(r, start, n, acc); break;
    default: general_chunk<D>(r, start, n, acc);
  }
#pragma unroll
  for (int c = 0; c <= D; ++c) {
    const double sum = block_sum(acc[c], shared);
    if (threadIdx.x == 0) args.partial[chunk * (D + 1) + c] = sum;
  }
  finish_group<D>(args, shared);
}

template <int D>
cudaError_t launch(const DotArgs& args, cudaStream_t stream) {
  chunk_dots<D><<<static_cast<unsigned>(args.num_chunks), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_grad_dots(const DotArgs& args, int num_dirs, cudaStream_t stream) {
  switch (num_dirs) {
    case 0: return launch<0>(args, stream);
    case 1: return launch<1>(args, stream);
    case 2: return launch<2>(args, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace gfast::cuda
