// Log-probabilities, token weights and logit gradients of rows of logits, one read and one write of memory: a cluster of
// blocks holds a row in shared memory, each a part of it. A bulk copy brings the part in; its maximum and sum are merged
// with the other blocks' through distributed shared memory; the gradient is computed from the part where it lies.
//
// With y the label, m the maximum, s_other the sum of the others' exps relative to it, all logits times `scale`:
//     logp = (z_y - m) - log(total)          -log1p(s_other) where the label is the maximum
//     1 - p = s_other / total                never 1 - exp(logp) rounded: forget tokens live at p near 1
//     d logits_j = coef (delta_jy - p_j) scale
#include "cuda/rows_kernel.h"

#include <cfloat>
#include <cmath>

#include "cuda/cluster.h"

namespace gfast::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kResident = 3;  // blocks an SM: one computes while the others load and store
static_assert(kResident * (kPartBytes + 1024 + 256) <= 228 << 10, "an SM's shared memory, 1 KiB a block kept by the system");

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GFAST_CLUSTERS  // this pass of the compiler has them

constexpr int kWarps = kThreads / 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr uint32_t kFull = 0xffffffffu;

struct alignas(16) Words {
  uint32_t word[4];
};

// The vectors of 16 bytes, of all that a row touches, that one block holds. The first and the last may lie partly outside
// the row.
template <typename T>
struct Part {
  static constexpr int K = 16 / sizeof(T);
  int lead, vocab;   // elements of the first vector before the row; of the row
  int first, count;  // vectors
  int inside, end;   // of these, those in [inside, end) lie within the row

  __device__ __forceinline__ Part(const T* row, int vocab_, int rank, int blocks) : vocab(vocab_) {
    lead = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    const int vectors = (lead + vocab + K - 1) / K, each = (vectors + blocks - 1) / blocks;
    first = min(rank * each, vectors);
    count = min(each, vectors - first);
    inside = first == 0 && lead > 0 && count > 0 ? 1 : 0;
    end = max(inside, first + count == vectors && (lead + vocab) % K != 0 ? count - 1 : count);
  }

  // Of the row, the column of element k of the part.
  __device__ __forceinline__ int column(int k) const { return first * K + k - lead; }
  // Whether a column, which may be none of the row's, lies in the part.
  __device__ __forceinline__ bool has(int64_t column) const {
    return column >= 0 && column < vocab && (column + lead) / K >= first && (column + lead) / K < first + count;
  }
};

__device__ __forceinline__ float lowest() { return -FLT_MAX; }  // stands for "no logit", so that -inf meets no -inf

template <typename T>
__device__ __forceinline__ T narrow_one(float v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
    return T{static_cast<uint16_t>(narrow<T>(v, 0.0f))};
  }
}

// The maximum over the block, seen by all its threads, as is their sum, in an order that the number of threads fixes.
__device__ __forceinline__ float block_max(float v, float* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_down_sync(kFull, v, offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) v = fmaxf(v, shared[w]);
  return v;
}

__device__ __forceinline__ float block_sum(float v, float* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(kFull, v, offset);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) v += shared[w];
  return v;
}

// What the gradient takes of a row: others 2^((z - top) log2(e) scale), and `target` at the label.
struct alignas(16) Factors {
  float top, others, target, unused;
};

// From the blocks' maxima and sums of all logits but the label's. By one thread of every block, each with the same
// result; that of block 0 writes it.
__device__ __noinline__ Factors finish_row(const RowsArgs& args, int64_t row, float z_y, const float2* parts, int blocks,
                                           bool writes) {
  float highest = -INFINITY, rest = 0.0f;
  for (int b = 0; b < blocks; ++b) highest = fmaxf(highest, parts[b].x);
  for (int b = 0; b < blocks; ++b)
    rest += parts[b].x == -INFINITY ? parts[b].y : parts[b].y * expf((parts[b].x - highest) * args.scale);
  float top = highest * args.scale;
  if (!(top > -INFINITY)) top = lowest(), rest *= 0.0f;  // none: a NaN stays
  const float raw_y = z_y;
  z_y *= args.scale;
  const float m = fmaxf(top, z_y);
  const float s_other = rest * expf(top - m), e_y = expf(z_y - m);
  const float total = s_other + e_y == 0.0f ? NAN : s_other + e_y;  // all -inf: no softmax
  const float log_total = total != total ? NAN : log1pf(z_y >= top ? s_other : total - 1.0f);
  const float logp = (z_y - m) - log_total;

  float log_w = args.p_pow != 0.0f ? args.p_pow * logp : 0.0f;
  if (args.q_pow != 0.0f) {
    const float lost = (top - m) + logf(rest) - log_total;  // where s_other underflows, or is about to
    log_w += args.q_pow * (s_other < 1e-20f ? lost : -log1pf(e_y / s_other));
  }
  float w = args.sign * expf(log_w);
  if (args.beta > 0.0f) {
    const float x = args.beta * (logp - args.ref_logp[row]), e = expf(-fabsf(x));
    w *= 2.0f * ((x < 0.0f ? e : 1.0f) / (1.0f + e));
  }
  if (writes) args.logp[row] = logp, args.weight[row] = w;
  const float c = args.coef_scale[args.coef_by_row ? row : 0] * w * args.scale;
  return {fmaxf(highest, raw_y), -c / total, c * (s_other / total), 0.0f};
}

// visit(k) for each element of the part that lies in a vector partly outside the row.
template <typename T, typename Visit>
__device__ __forceinline__ void visit_edges(const Part<T>& part, const Visit& visit) {
  constexpr int K = Part<T>::K;
  for (int i = threadIdx.x; i < 2 * K; i += kThreads) {
    const int v = i < K ? 0 : part.count - 1;
    if ((i >= K && v == 0) || v >= part.count || (v >= part.inside && v < part.end)) continue;
    visit(v * K + i % K);
  }
}

template <typename T>
__device__ __forceinline__ void zero_part(const Part<T>& part, T* out) {
  constexpr int K = Part<T>::K;
  for (int v = part.inside + threadIdx.x; v < part.end; v += kThreads)
    __stcs(reinterpret_cast<uint4*>(out + part.column(v * K)), uint4{0, 0, 0, 0});
  visit_edges(part, [&](int k) {
    if (part.column(k) >= 0 && part.column(k) < part.vocab) out[part.column(k)] = T{};
  });
}

template <typename T>
__device__ __forceinline__ void gradient_part(const Part<T>& part, const Words* held, const Factors& f, float rate,
                                              T* out) {
  constexpr int K = Part<T>::K;
  for (int v = part.inside + threadIdx.x; v < part.end; v += kThreads) {
    const Words in = held[v];
    float grad[K];
#pragma unroll
    for (int k = 0; k < K; ++k) grad[k] = f.others * exp2_fast((element<T>(in.word, k) - f.top) * rate);
    uint4 packed;
    if constexpr (sizeof(T) == 4) {
      packed = {__float_as_uint(grad[0]), __float_as_uint(grad[1]), __float_as_uint(grad[2]), __float_as_uint(grad[3])};
    } else {
      packed = {narrow<T>(grad[0], grad[1]), narrow<T>(grad[2], grad[3]), narrow<T>(grad[4], grad[5]),
                narrow<T>(grad[6], grad[7])};
    }
    __stcs(reinterpret_cast<uint4*>(out + part.column(v * K)), packed);
  }
  visit_edges(part, [&](int k) {
    const float z = widen(reinterpret_cast<const T*>(held)[k]);
    if (part.column(k) >= 0 && part.column(k) < part.vocab)
      out[part.column(k)] = narrow_one<T>(f.others * exp2_fast((z - f.top) * rate));
  });
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) weighted_rows(const __grid_constant__ RowsArgs args) {
#ifdef GFAST_CLUSTERS
  constexpr int K = Part<T>::K;
  extern __shared__ Words held[];
  __shared__ uint64_t arrival[1];
  __shared__ float maxima[kWarps];
  __shared__ float sums[kWarps];
  __shared__ float2 parts[kMaxBlocks];
  __shared__ Factors factors[1];

  const int rank = cluster_rank(), blocks = cluster_blocks();
  const int64_t i = blockIdx.x / blocks, y = args.labels[i];
  const T* row = static_cast<const T*>(args.logits) + i * args.stride;
  T* out = static_cast<T*>(args.out) + i * args.out_stride;
  const Part<T> part(row, args.vocab, rank, blocks);
  if (y == -100) {
    if (rank == 0 && threadIdx.x == 0) args.logp[i] = 0.0f, args.weight[i] = 0.0f;
    if (args.out != nullptr) zero_part(part, out);
    return;
  }

  cluster_arrive_relaxed();
  const bool copies = part.end > part.inside;
  float z_y = NAN;  // where the label is no column
  if (threadIdx.x == 0) {
    if (copies) {
      init_arrival(arrival);
      fence_bulk();
      bulk_load(held + part.inside, row + part.column(part.inside * K), (part.end - part.inside) * 16, arrival);
    }
    if (y >= 0 && y < args.vocab) z_y = widen(row[y]);
  }
  // The label is left out of maximum and sum: -inf in its place, as in what of a vector lies outside the row.
  visit_edges(part, [&](int k) {
    const int column = part.column(k);
    const bool other = column >= 0 && column < part.vocab && column != y;
    reinterpret_cast<T*>(held)[k] = other ? row[column] : narrow_one<T>(-INFINITY);
  });
  __syncthreads();  // the barrier of the copy is there
  if (copies) await_arrival(arrival);
  if (threadIdx.x == 0 && part.has(y)) {
    const int k = static_cast<int>(y) - part.column(0);
    if (k / K >= part.inside && k / K < part.end) reinterpret_cast<T*>(held)[k] = narrow_one<T>(-INFINITY);
  }
  __syncthreads();

  constexpr uint32_t none = sizeof(T) == 4 ? 0xff800000u : __is_same(T, Half) ? 0xfc00fc00u : 0xff80ff80u;  // -inf
  Words top{{none, none, none, none}};
  for (int v = threadIdx.x; v < part.count; v += kThreads) {
    const Words in = held[v];
#pragma unroll
    for (int w = 0; w < 4; ++w) top.word[w] = max_word<T>(top.word[w], in.word[w]);
  }
  float highest = -INFINITY;
#pragma unroll
  for (int k = 0; k < K; ++k) highest = fmaxf(highest, element<T>(top.word, k));
  highest = block_max(highest, maxima);

  const float rate = args.scale * kLog2E, shift = highest == -INFINITY ? 0.0f : highest;
  float sum = 0.0f;
  for (int v = threadIdx.x; v < part.count; v += kThreads) {
    const Words in = held[v];
    float here = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) here += exp2_fast((element<T>(in.word, k) - shift) * rate);
    sum += here;
  }
  sum = block_sum(sum, sums);

  cluster_wait();  // all blocks have begun
  if (threadIdx.x < blocks) store_remote(parts + rank, threadIdx.x, float2{highest, sum});
  cluster_arrive();
  cluster_wait();  // and have said what they hold, and read the label's logit, which may be overwritten now
  if (threadIdx.x == 0) factors[0] = finish_row(args, i, z_y, parts, blocks, rank == 0);
  if (args.out == nullptr) return;
  __syncthreads();
  const Factors f = factors[0];
  gradient_part(part, held, f, rate, out);
  __syncthreads();
  if (threadIdx.x == 0 && part.has(y)) out[y] = narrow_one<T>(f.target);
#endif
}

template <typename T>
cudaError_t launch(const RowsArgs& args, bool aligned, cudaStream_t stream) {
  const int64_t vectors = row_vectors(args.vocab, sizeof(T), aligned);
  const int blocks = row_blocks(vectors);
  if (blocks == 0 || args.rows > INT32_MAX / blocks) return cudaErrorInvalidValue;
  const int bytes = static_cast<int>((vectors + blocks - 1) / blocks) * 16;
  cudaError_t error = cudaFuncSetAttribute(weighted_rows<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kPartBytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(weighted_rows<T>, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);  // else the driver may leave room for fewer blocks
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(args.rows * blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, weighted_rows<T>, args);
}

}  // namespace

cudaError_t launch_weighted_rows(const RowsArgs& args, int type, bool aligned, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  switch (type) {
    case 0: return launch<float>(args, aligned, stream);
    case 1: return launch<BFloat16>(args, aligned, stream);
    case 2: return launch<Half>(args, aligned, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace gfast::cuda
