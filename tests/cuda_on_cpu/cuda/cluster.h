// csrc/cuda/cluster.h on the CPU: clusters, bulk copies and their barriers, arithmetic on pairs of 16-bit numbers. A
// bulk copy is a thread of its own that sleeps first; the halves of the cluster's barrier order what they are said to
// order, no more; shared memory is poison when a block begins and ends where it was asked to end.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/elements.h"

struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};
constexpr int cudaLaunchAttributeClusterDimension = 1, cudaFuncAttributeMaxDynamicSharedMemorySize = 2;
constexpr int cudaFuncAttributePreferredSharedMemoryCarveout = 3, cudaSharedmemCarveoutMaxShared = 100;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace model {

inline int without_wait = -1, without_arrival = -1, without_bulk_fence = -1;  // numbers of what is left out
inline int granted = 0;                                                       // bytes of shared memory a block may have

[[noreturn]] inline void wrong(const char* what) {
  printf("not allowed: %s\n", what);
  fflush(stdout);
  _exit(1);
}

struct Cluster {
  Cluster(int blocks, int threads_) : start(blocks * threads_), threads(blocks * threads_), held(blocks) {
    for (int b = 0; b < blocks; ++b) members.push_back(std::make_unique<Block>(threads_));
  }
  void begin(size_t bytes) {
    arrived = 0;
    for (auto& part : held) {
      part.reset(new (std::align_val_t{16}) char[bytes]);
      memset(part.get(), 0xff, bytes);
    }
    for (auto& member : members) memset(member->memory, 0xff, sizeof(member->memory));
  }
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{16}); }
  };
  Barrier start;
  const unsigned threads;
  std::vector<std::unique_ptr<Block>> members;
  std::vector<std::unique_ptr<char, Free>> held;  // each block's dynamic shared memory
  std::atomic<unsigned> arrived{0}, begun{0};     // threads at the cluster's barrier, all its rounds; blocks that run
  unsigned index = 0;
};

inline thread_local Cluster* cluster;
inline thread_local unsigned rank, rounds;     // of the cluster's barrier, that this thread has arrived at
inline thread_local std::thread* bulk;         // the copy that this thread began
inline thread_local bool fenced = false;       // since it initialised a barrier

template <typename T>
T* dynamic() {
  return reinterpret_cast<T*>(cluster->held[rank].get());
}

inline void cluster_wait(int number) {
  if (number == without_wait) return;
  while (cluster->arrived.load(std::memory_order_acquire) < rounds * cluster->threads) usleep(20);
}

inline void fence_bulk(int number) {
  if (number != without_bulk_fence) fenced = true;
}

// The word: 0 before the copy has arrived, 1 then.
inline void await_arrival(uint64_t* arrival, int number) {
  if (number == without_arrival) return;
  for (;;) {
    const uint64_t word = std::atomic_ref(*arrival).load(std::memory_order_acquire);
    if (word > 1) wrong("a wait at a barrier that is not initialised");
    if (word == 1) return;
    usleep(20);
  }
}

template <typename Kernel>
void launch_clusters(unsigned grid, int blocks, int threads, size_t bytes, const Kernel& kernel) {
  if (grid % blocks != 0) wrong("a grid of parts of clusters");
  if (bytes > 48 << 10 && bytes > static_cast<size_t>(granted)) wrong("more shared memory than was asked for");
  std::atomic<unsigned> next{0};
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::thread> all;
  for (int c = 0; c < resident; ++c) clusters.push_back(std::make_unique<Cluster>(blocks, threads));
  for (int c = 0; c < resident; ++c)
    for (int t = 0; t < blocks * threads; ++t)
      all.emplace_back([&, c, t] {
        cluster = clusters[c].get();
        rank = t / threads;
        block = cluster->members[rank].get();
        warp = block->warps[t % threads / kLanes].get();
        threadIdx.x = t % threads;
        dice = c * 7919 + t;
        for (;;) {
          cluster->start.wait();
          if (t == 0) {
            cluster->index = next.fetch_add(1, std::memory_order_relaxed);
            cluster->begin(bytes);
          }
          cluster->start.wait();
          if (cluster->index >= grid / blocks) return;
          blockIdx.x = cluster->index * blocks + rank;
          rounds = 0;
          // one block begins later than the others take to need it
          if (sleeps && rank == cluster->index % blocks) usleep(250000);
          kernel();
          if (bulk != nullptr) bulk->join(), delete bulk, bulk = nullptr;
        }
      });
  for (auto& thread : all) thread.join();
}

}  // namespace model

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) model::granted = value;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&... arguments) {
  model::launch_clusters(config->gridDim.x, config->attrs[0].val.clusterDim.x, config->blockDim.x,
                         config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}

namespace gfast::cuda {

inline unsigned cluster_rank() { return model::rank; }
inline unsigned cluster_blocks() { return model::cluster->members.size(); }
inline void cluster_arrive_relaxed() {
  ++model::rounds;
  model::cluster->arrived.fetch_add(1, std::memory_order_relaxed);
}
inline void cluster_arrive() {
  ++model::rounds;
  model::cluster->arrived.fetch_add(1, std::memory_order_release);
}

// The same place in another block's memory.
inline void store_remote(float2* p, unsigned rank, float2 value) {
  if (model::cluster->arrived.load(std::memory_order_relaxed) < model::cluster->threads)
    model::wrong("memory of a block that may not have begun");
  const size_t offset = reinterpret_cast<char*>(p) - model::block->memory[0];
  if (offset >= sizeof(model::Block::memory)) model::wrong("a remote store beside shared memory");
  *reinterpret_cast<float2*>(model::cluster->members[rank]->memory[0] + offset) = value;
}

inline void init_arrival(uint64_t* arrival) {
  model::sleep_at_random();
  model::fenced = false;
  std::atomic_ref(*arrival).store(0, std::memory_order_relaxed);
}

inline void bulk_load(void* to, const void* from, unsigned bytes, uint64_t* arrival) {
  if (!model::fenced) model::wrong("a bulk copy without the fence before it");
  if (bytes == 0 || bytes % 16 != 0) model::wrong("a bulk copy of no multiple of 16 bytes");
  check_aligned(to, 16);
  check_aligned(from, 16);
  model::bulk = new std::thread([=, seed = model::dice] {
    model::dice = seed;
    model::sleep_at_random();
    memcpy(to, from, bytes);
    std::atomic_ref(*arrival).store(1, std::memory_order_release);
  });
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // and NaN as it is
}

inline float of_bits(BFloat16, uint16_t bits) { return widen(BFloat16{bits}); }
inline float of_bits(Half, uint16_t bits) { return widen(Half{bits}); }

inline uint16_t to_bits(BFloat16, float v) {
  const uint32_t bits = __float_as_uint(v);
  if (v != v) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint16_t to_bits(Half, float v) {
  if (v != v) return 0x7fff;
  const float size = std::fabs(v);
  uint16_t bits = 0x7c00;
  if (size < 65520) {  // what does not round to infinity
    const int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
    bits = ((exponent + 14) << 10) + static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  }
  return bits | (std::signbit(v) ? 0x8000 : 0);
}

template <typename T>
uint32_t max_word(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(std::fmax(__uint_as_float(a), __uint_as_float(b)));
  } else {
    uint32_t word = 0;
    for (int half = 0; half < 32; half += 16)
      word |= uint32_t{to_bits(T{}, std::fmax(of_bits(T{}, a >> half), of_bits(T{}, b >> half)))} << half;
    return word;
  }
}

template <typename T>
uint32_t narrow(float low, float high) {
  return to_bits(T{}, low) | uint32_t{to_bits(T{}, high)} << 16;
}

}  // namespace gfast::cuda
