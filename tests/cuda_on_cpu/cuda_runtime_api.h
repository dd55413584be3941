// The part of CUDA that the kernels use, on the CPU: a thread of a block is a thread of the system, several blocks
// run at once, and what orders memory on a GPU orders it here, no more. Atomics are relaxed, and only fences make one block
// see another's writes: ThreadSanitizer then finds what a GPU may show once in a million launches. Sleeps at random bring
// about the rare orders. Each fence and barrier of the source has a number, and can be left out to see that this is found.
#pragma once

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define CUDART_VERSION 12010  // the first with 32 KB of kernel parameters
#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local dim3 threadIdx, blockIdx;
using std::max;
using std::min;

namespace model {

constexpr int kLanes = 32;
inline int resident = 2;                                      // blocks that run at once
inline int without_fence = -1, without_barrier = -1;          // numbers of what is left out
inline bool plain_exchange = false, sleeps = false;

// pthread's own, as ThreadSanitizer knows it; std::barrier's synchronisation would hide what the kernel lacks.
class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{kLanes};
  uint64_t lane[kLanes];
};

struct Block {
  explicit Block(int threads) : barrier(threads), warps(threads / kLanes) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  unsigned index;
  alignas(16) char memory[6][256];
};

inline thread_local Block* block;
inline thread_local Warp* warp;
inline thread_local unsigned dice;

// Longer than a block takes: the block that counts last is then not always the one whose fence came last.
inline void sleep_at_random() {
  dice = dice * 1664525u + 1013904223u;
  if (sleeps) usleep((dice >> 16) % 60000u);
}

template <typename T, int number>
T& shared() {
  static_assert(sizeof(T) <= sizeof(Block::memory[0]) && number < 6);
  return *reinterpret_cast<T*>(block->memory[number]);
}

template <typename Kernel>
void launch(unsigned grid, int threads, const Kernel& kernel) {
  std::atomic<unsigned> next{0};
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::thread> all;
  for (int b = 0; b < resident; ++b) blocks.push_back(std::make_unique<Block>(threads));
  for (int b = 0; b < resident; ++b)
    for (int t = 0; t < threads; ++t)
      all.emplace_back([&, b, t] {
        block = blocks[b].get();
        warp = block->warps[t / kLanes].get();
        threadIdx.x = t;
        dice = b * 7919 + t;
        for (;;) {
          block->barrier.wait();
          if (t == 0) block->index = next.fetch_add(1, std::memory_order_relaxed);
          block->barrier.wait();
          if (block->index >= grid) return;
          blockIdx.x = block->index;
          kernel();
        }
      });
  for (auto& thread : all) thread.join();
}

// A value of every lane, seen by all of the warp.
template <typename T, typename Take>
auto exchange(T value, const Take& take) {
  uint64_t& own = warp->lane[threadIdx.x % kLanes];
  own = 0;
  memcpy(&own, &value, sizeof(value));
  warp->barrier.wait();
  const auto found = take(warp->lane);
  warp->barrier.wait();
  return found;
}

inline void barrier(int number) {
  if (number != without_barrier) block->barrier.wait();
}

inline std::atomic<unsigned> fences{0};  // all fences of a GPU have one order
inline void fence(int number) {
  if (number != without_fence) fences.fetch_add(1, std::memory_order_acq_rel);
}

}  // namespace model

inline unsigned atomicAdd(unsigned* p, unsigned v) {
  model::sleep_at_random();
  return std::atomic_ref(*p).fetch_add(v, std::memory_order_relaxed);
}
inline unsigned atomicExch(unsigned* p, unsigned v) {
  if (!model::plain_exchange) return std::atomic_ref(*p).exchange(v, std::memory_order_relaxed);
  *p = v;
  return 0;
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int by) {
  const int lane = threadIdx.x % model::kLanes, from = lane + by < model::kLanes ? lane + by : lane;
  return model::exchange(value, [&](const uint64_t* lanes) {
    T found;
    memcpy(&found, &lanes[from], sizeof(T));
    return found;
  });
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return model::exchange(value, [](const uint64_t* lanes) {
    unsigned bits = 0;
    for (int i = 0; i < model::kLanes; ++i) bits |= static_cast<unsigned>(lanes[i]) << i;
    return bits;
  });
}

inline int __clz(unsigned v) { return std::countl_zero(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t v) { return {v}; }
inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  const float size = exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return h.bits >> 15 ? -size : size;
}

// A GPU faults at an address that is not a multiple of the access's size.
inline void check_aligned(const void* p, size_t size) {
  if (reinterpret_cast<uintptr_t>(p) % size == 0) return;
  printf("%zu bytes not at a multiple of it\n", size);
  abort();
}
template <typename T>
T __ldcs(const T* p) {
  check_aligned(p, sizeof(T));
  return *p;
}
template <typename T>
void __stcs(T* p, T value) {
  check_aligned(p, sizeof(T));
  *p = value;
}
inline double __ldcg(const double* p) { return *p; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
