// A factor of a matrix product on its way into the cache: rows of any dtype become the fp32 columns of a panel.
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
void pack_columns_impl(const T* x, int64_t stride, int64_t rows, int64_t depth, float* out) {
  for (int64_t d = 0; d < depth; d += W) {
    const int64_t width = depth - d < W ? depth - d : W;
    for (int64_t first = 0; first < kPanel; first += W) {
      const T* corner = x + first * stride + d;
      float* to = out + d * kPanel + first;
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
        for (int i = 0; i < W; ++i) store(to + i * kPanel, block[i]);
      } else {
        for (int64_t i = 0; i < width; ++i) store(to + i * kPanel, block[i]);
      }
    }
  }
}

}  // namespace

// out [depth, kPanel] = entries k and on of `rows` rows from `row` on, as columns; zeros beyond them.
void pack_columns(const Factor& x, int64_t row, int64_t rows, int64_t k, int64_t depth, float* out) {
  const int64_t at = row * x.stride + k;
  if (x.dtype == Dtype::f32)
    pack_columns_impl((const float*)x.data + at, x.stride, rows, depth, out);
  else if (x.dtype == Dtype::bf16)
    pack_columns_impl((const bf16*)x.data + at, x.stride, rows, depth, out);
  else
    pack_columns_impl((const f16*)x.data + at, x.stride, rows, depth, out);
}

}  // namespace GFAST_ISA_NS
}  // namespace gfast
