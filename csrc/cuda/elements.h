// 16-bit numbers as they lie in memory, and 32-bit words of elements.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace gfast::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float widen(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ __forceinline__ float widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ __forceinline__ float widen(float v) { return v; }

// Element i of those that lie in `word`.
template <typename T>
__device__ __forceinline__ float element(const uint32_t* word, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(word[i]);
  } else {
    return widen(T{static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))});
  }
}

}  // namespace gfast::cuda
