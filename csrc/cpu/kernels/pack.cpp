// Factors of matrix products on their way into the cache, in fp32 whatever they are in memory, and products on their way
// out of it.
#include "cpu/kernels/pack.h"

#include "cpu/kernels/vec.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

static_assert(kPanel % W == 0);

// Lanes a0 b0 a1 b1 ... of the lower halves, or of the upper ones.
#ifdef __clang__
template <int... I>
struct Lanes {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Lanes<I...> type;
};
template <int half, int... I>
GFAST_INLINE vf zip(vf a, vf b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (half * W / 2 + I / 2 + I % 2 * W)...);
}
template <int half>
GFAST_INLINE vf zip(vf a, vf b) {
  return zip<half>(a, b, typename Count<W>::type{});
}
#else
template <int half>
GFAST_INLINE vf zip(vf a, vf b) {
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = half * W / 2 + i / 2 + i % 2 * W;
  return __builtin_shuffle(a, b, lanes);
}
#endif

// Rows become columns: log2(W) times, row i is zipped with row i + W / 2.
GFAST_INLINE void transpose(vf (&x)[W]) {
  vf y[W];
  for (int step = 1; step < W; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      y[2 * i] = zip<0>(x[i], x[i + W / 2]);
      y[2 * i + 1] = zip<1>(x[i], x[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

template <typename T>
void pack_columns_impl(const T* x, int64_t stride, int64_t rows, int64_t depth, float* out, int64_t out_stride) {
  for (int64_t d = 0; d < depth; d += W) {
    const int64_t width = depth - d < W ? depth - d : W;
    for (int64_t first = 0; first < kPanel; first += W) {
      const T* corner = x + first * stride + d;
      float* to = out + d * out_stride + first;
      vf block[W];
      if (first + W <= rows && width == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load(corner + i * stride);
      } else {
        for (int i = 0; i < W; ++i) block[i] = first + i < rows ? load_part(corner + i * stride, width, 0.0f) : vf{};
      }
      transpose(block);
      if (width == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(to + i * out_stride, block[i]);
      } else {
        for (int64_t i = 0; i < width; ++i) store(to + i * out_stride, block[i]);
      }
    }
  }
}

template <typename T>
void pack_rows_impl(const T* x, int64_t stride, int64_t rows, int64_t columns, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += stride, out += kPanel)
    for (int64_t c = 0; c < kPanel; c += W) {
      const int64_t left = columns - c;
      store(out + c, left >= W ? load(x + c) : left > 0 ? load_part(x + c, left, 0.0f) : vf{});
    }
}

// 2 W entries in order, rounded.
GFAST_INLINE vu in_order(vf a, vf b) {
#if defined(__AVX512F__)
  const __m256i low = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(round_bf16(a) >> 16));
  const __m256i high = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(round_bf16(b) >> 16));
  return (vu)_mm512_inserti64x4(_mm512_zextsi256_si512(low), high, 1);
#else
  bf16 buffer[2 * W];
  store(buffer, a);
  store(buffer + W, b);
  vu words;
  memcpy(&words, buffer, sizeof(words));
  return words;
#endif
}

template <typename Body>
void with_type(const Factor& x, int64_t row, int64_t column, const Body& body) {
  const int64_t at = row * x.stride + column;
  if (x.dtype == Dtype::f32)
    body((const float*)x.data + at);
  else if (x.dtype == Dtype::bf16)
    body((const bf16*)x.data + at);
  else
    body((const f16*)x.data + at);
}

}  // namespace

// out [depth, kPanel] = entries k and on of `rows` rows from `row` on, as columns; zeros beyond them.
void pack_columns(const Factor& x, int64_t row, int64_t rows, int64_t k, int64_t depth, float* out, int64_t out_stride) {
  with_type(x, row, k, [&](auto* from) { pack_columns_impl(from, x.stride, rows, depth, out, out_stride); });
}

// out [rows, kPanel] = `columns` columns of `rows` rows; zeros beyond them.
void pack_rows(const Factor& x, int64_t row, int64_t rows, int64_t column, int64_t columns, float* out) {
  with_type(x, row, column, [&](auto* from) { pack_rows_impl(from, x.stride, rows, columns, out); });
}

// out [rows, columns] bf16 = x [rows, kPanel] fp32, around the caches where it lies for that.
void write_bf16(const float* x, int64_t rows, int64_t columns, void* out, int64_t out_stride) {
  for (int64_t row = 0; row < rows; ++row, x += kPanel) {
    bf16* to = (bf16*)out + row * out_stride;
    int64_t c = 0;
    if (can_stream(to))
      for (; c + 2 * W <= columns; c += 2 * W) stream(to + c, in_order(load(x + c), load(x + c + W)));
    for (; c + W <= columns; c += W) store(to + c, load(x + c));
    if (c < columns) store_part(to + c, columns - c, load(x + c));
  }
  end_stream();
}

}  // namespace GFAST_ISA_NS
}  // namespace gfast
