// Vectors of W floats by the compiler's vector extensions: one source serves SSE2, NEON, AVX2 and AVX-512. Everything
// has internal linkage: an inline function shared between instruction sets could be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef double vd __attribute__((vector_size(W * 8)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#define GFAST_INLINE inline __attribute__((always_inline))

constexpr float kInf = __builtin_inff();

GFAST_INLINE vf splat(float x) { return x - vf{}; }
GFAST_INLINE vu splat_bits(uint32_t x) { return x - vu{}; }
GFAST_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
// a > b ? a : b, so b where one is a NaN. GCC makes a comparison and a blend of that, where one instruction says it.
#if defined(__AVX512F__)
GFAST_INLINE vf max(vf a, vf b) { return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
#elif defined(__AVX2__)
GFAST_INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
GFAST_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
#endif

// Bit h: whether lane h of a comparison's result is set.
GFAST_INLINE uint32_t lanes(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#else
  uint32_t found = 0;
  for (int h = 0; h < W; ++h) found |= (uint32_t)(mask[h] & 1) << h;
  return found;
#endif
}

// Whether a lane of a comparison's result is set.
GFAST_INLINE bool any(vi mask) {
#if defined(__AVX2__)
  return lanes(mask) != 0;
#else
  uint64_t words[W / 2], found = 0;
  memcpy(words, &mask, sizeof(words));
  for (uint64_t word : words) found |= word;
  return found != 0;
#endif
}

GFAST_INLINE vi lane_index() {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane;
}

// Hides how x was computed, so that a multiplication before it is rounded and not contracted into an fma after it.
GFAST_INLINE vf rounded(vf x) {
#if defined(__x86_64__) || defined(__i386__)
#ifdef __AVX512F__
  asm("" : "+v"(x));
#else
  asm("" : "+x"(x));
#endif
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

GFAST_INLINE float reduce_max(vf x) {
  float r = x[0];
  for (int i = 1; i < W; ++i) r = x[i] > r ? x[i] : r;
  return r;
}

GFAST_INLINE float reduce_add(vf x) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

GFAST_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof(x));
  return x;
}

GFAST_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof(x)); }

// 16-bit words to and from 32-bit lanes. __builtin_convertvector says the same, but GCC splits it into halves.
#if defined(__AVX512F__)
GFAST_INLINE vu widen(const void* p) { return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p)); }
GFAST_INLINE void narrow(void* p, vu x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x));
}
#elif defined(__AVX2__)
GFAST_INLINE vu widen(const void* p) { return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
GFAST_INLINE void narrow(void* p, vu x) {
  const __m256i y = (__m256i)x;
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
}
#else
GFAST_INLINE vu widen(const void* p) {
  vh h;
  memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, vu);
}
GFAST_INLINE void narrow(void* p, vu x) {
  const vh h = __builtin_convertvector(x, vh);
  memcpy(p, &h, sizeof(h));
}
#endif

GFAST_INLINE vf load(const bf16* p) { return (vf)(widen(p) << 16); }

// Round to nearest even; the result is in the upper halves. A NaN here comes from 16-bit inputs or from arithmetic, so its low 16 bits are zero and the
// rounding term cannot carry out of it.
GFAST_INLINE vu round_bf16(vf x) { return (vu)x + 0x7fffu + (((vu)x >> 16) & 1u); }

GFAST_INLINE void store(bf16* p, vf x) { narrow(p, round_bf16(x) >> 16); }

#if defined(__AVX512F__)
GFAST_INLINE vf load(const f16* p) { return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p)); }
GFAST_INLINE void store(f16* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__) && defined(__AVX2__)
GFAST_INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
GFAST_INLINE void store(f16* p, vf x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
GFAST_INLINE vf load(const f16* p) {
  const vu bits = widen(p);
  const vu sign = (bits & 0x8000u) << 16;
  const vu rest = (bits & 0x7fffu) << 13;
  const vu normal = rest + (112u << 23);
  const vu special = rest | 0x7f800000u;  // infinities and NaN
  // A subnormal is its mantissa times 2^-24: added below 2^-14's mantissa, then 2^-14 taken off again.
  const vu smallest = splat_bits(113u << 23);
  const vu subnormal = (vu)((vf)(smallest + rest) - (vf)smallest);
  vu r = rest < (1u << 23) ? subnormal : normal;
  r = rest >= (31u << 23) ? special : r;
  return (vf)(r | sign);
}

GFAST_INLINE void store(f16* p, vf x) {
  const vu bits = (vu)x;
  const vu sign = (bits >> 16) & 0x8000u;
  const vu mag = bits & 0x7fffffffu;
  const vu normal = (mag - (112u << 23) + 0xfffu + ((mag >> 13) & 1u)) >> 13;
  const vf half = splat(0.5f);  // one ulp of 0.5 is 2^-24, the unit of half's subnormals: the addition rounds to it
  const vu subnormal = (vu)((vf)mag + half) - (vu)half;
  vu r = mag < (113u << 23) ? subnormal : normal;
  r = mag >= 0x47800000u ? splat_bits(0x7c00u) : r;
  r = mag > 0x7f800000u ? splat_bits(0x7e00u) : r;
  narrow(p, r | sign);
}
#endif

// The first n < W entries, the other lanes filled.
template <typename T>
GFAST_INLINE vf load_part(const T* p, int64_t n, float fill) {
  T buffer[W] = {};
  memcpy(buffer, p, n * sizeof(T));
  return select(lane_index() < (int32_t)n, load(buffer), splat(fill));
}

template <typename T>
GFAST_INLINE void store_part(T* p, int64_t n, vf x) {
  T buffer[W];
  store(buffer, x);
  memcpy(p, buffer, n * sizeof(T));
}

template <typename T>
GFAST_INLINE float load_one(const T* p) {
  return load_part(p, 1, 0.0f)[0];
}

// 2 W entries at a time. bf16 entries stay where they are in their 32-bit words, even ones in a and odd ones in b, which
// saves the shuffles; other types put the first W in a.
struct Pair {
  vf a, b;
};

template <typename T>
GFAST_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + W)};
}

GFAST_INLINE void store_pair(float* p, Pair x) {
  store(p, x.a);
  store(p + W, x.b);
}

GFAST_INLINE Pair load_pair(const bf16* p) {
  vu words;
  memcpy(&words, p, sizeof(words));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "even entries are expected in the low halves of words"
#endif
  return {(vf)(words << 16), (vf)(words & 0xffff0000u)};
}

// The pair in its 16-bit type and in order, one vector of 2 W words.
GFAST_INLINE vu packed(const bf16*, Pair x) {
  const vu a = round_bf16(x.a), b = round_bf16(x.b);
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (vu)_mm256_blend_epi16((__m256i)(a >> 16), (__m256i)b, 0xaa);
#else
  return (a >> 16) | (b & 0xffff0000u);
#endif
}

GFAST_INLINE vu packed(const f16*, Pair x) {
#if defined(__F16C__) && defined(__AVX2__)
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
#endif
#if defined(__AVX512F__)
  const __m256i a = _mm512_maskz_cvtps_ph(0xffff, (__m512)x.a, nearest), b = _mm512_maskz_cvtps_ph(0xffff, (__m512)x.b, nearest);
  return (vu)_mm512_inserti64x4(_mm512_zextsi256_si512(a), b, 1);
#elif defined(__F16C__) && defined(__AVX2__)  // by way of memory each load would wait for two narrower stores
  const __m128i a = _mm256_cvtps_ph((__m256)x.a, nearest), b = _mm256_cvtps_ph((__m256)x.b, nearest);
  return (vu)_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
#else
  f16 buffer[2 * W];
  store(buffer, x.a);
  store(buffer + W, x.b);
  vu words;
  memcpy(&words, buffer, sizeof(words));
  return words;
#endif
}

template <typename T>
GFAST_INLINE void store_pair(T* p, Pair x) {
  const vu words = packed(p, x);
  memcpy(p, &words, sizeof(words));
}

// Stores around the caches, for outputs far larger than those: an ordinary store reads the line from memory before it
// replaces all of it. p is aligned to a vector; end_stream() before anybody else may look.
#if defined(__AVX512F__)
GFAST_INLINE void stream(void* p, vu x) { _mm512_stream_si512((__m512i*)p, (__m512i)x); }
#elif defined(__AVX2__)
GFAST_INLINE void stream(void* p, vu x) { _mm256_stream_si256((__m256i*)p, (__m256i)x); }
#elif defined(__SSE2__)
GFAST_INLINE void stream(void* p, vu x) { _mm_stream_si128((__m128i*)p, (__m128i)x); }
#else
GFAST_INLINE void stream(void* p, vu x) { memcpy(p, &x, sizeof(x)); }
#endif

GFAST_INLINE void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename T>
GFAST_INLINE void stream_pair(T* p, Pair x) {
  stream(p, packed(p, x));
}

GFAST_INLINE void stream_pair(float* p, Pair x) {
  stream(p, (vu)x.a);
  stream(p + W, (vu)x.b);
}

GFAST_INLINE bool can_stream(const void* p) { return (uintptr_t)p % sizeof(vf) == 0; }

// Asks for the pair that will be read 2048 elements from here, a block of the row kernels. The hardware's own prefetch
// stops at the end of each 4 KiB page and leaves a core at a third of the speed that it can read at. Only loops that
// compute should ask: one that asks faster than memory answers waits for it all the same.
template <typename T>
GFAST_INLINE void prefetch_pair(const T* p) {
  constexpr int ahead = 2048 * sizeof(T), line = 64, bytes = 2 * W * sizeof(T);
  for (int k = 0; k < bytes; k += line) __builtin_prefetch((const char*)p + ahead + k);
}

// Entry h of a pair is in lane at(h) % W of vector at(h) / W.
template <typename T>
struct PairLayout {
  static constexpr T lowest() { return -kInf; }
  static int64_t at(int64_t h) { return h; }
};
template <>
struct PairLayout<f16> {
  static constexpr f16 lowest() { return {0xfc00}; }
  static int64_t at(int64_t h) { return h; }
};
template <>
struct PairLayout<bf16> {
  static constexpr bf16 lowest() { return {0xff80}; }
  static int64_t at(int64_t h) { return h % 2 * W + h / 2; }
};

// The first n <= 2 W entries, the rest -inf.
template <typename T>
GFAST_INLINE Pair load_pair_part(const T* p, int64_t n) {
  T buffer[2 * W];
  for (int i = 0; i < 2 * W; ++i) buffer[i] = PairLayout<T>::lowest();
  memcpy(buffer, p, n * sizeof(T));
  return load_pair(buffer);
}

template <typename T>
GFAST_INLINE void store_pair_part(T* p, int64_t n, Pair x) {
  T buffer[2 * W];
  store_pair(buffer, x);
  memcpy(p, buffer, n * sizeof(T));
}

}  // namespace
}  // namespace GFAST_ISA_NS
}  // namespace gfast
