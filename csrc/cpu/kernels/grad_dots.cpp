// One block of a group dot: sum x*y_d for each direction d, and sum x*x, reading x from memory once.
//
// A run of 256 elements is summed in 32 fp32 lanes (8 products each), which are then added to fp64 lanes: rounding
// does not grow with the length. An fp64 operand makes its products and sums fp64 throughout.
#include "cpu/kernels/vec.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

constexpr int kRun = 256;
constexpr int kLanes = 32;
constexpr int kAhead = 1024;                                       // bytes of software prefetch
enum : int { kFloat = 0, kBFloat16 = 1, kHalf = 2, kDouble = 3 };  // as ElementType in grad_dots_plan.h

GFAST_INLINE vf widened(const float* p) { return load(p); }
GFAST_INLINE vf widened(const f16* p) { return load(p); }
// GCC splits a widening vector conversion into several shuffles; the instruction exists.
GFAST_INLINE vf widened(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return load(p);
#endif
}

GFAST_INLINE void flush(const vf* sum, double* lanes) {
  float flat[kLanes];
  memcpy(flat, sum, sizeof(flat));
  for (int l = 0; l < kLanes; ++l) lanes[l] += flat[l];
}

// One run of x with one y. The first direction also takes x*x, so that x and y stream from memory together.
template <typename X, typename Y, bool squares>
void run(const X* x, const Y* y, double* dot, double* square) {
  constexpr int K = kLanes / W;
  vf xy[K] = {}, xx[K] = {};
  for (int i = 0; i < kRun; i += kLanes) {
    if constexpr (sizeof(X) + sizeof(Y) == 4) {  // with 4-byte elements the hardware's own prefetch is faster
      __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kAhead);
      __builtin_prefetch(reinterpret_cast<const char*>(y + i) + kAhead);
    }
    for (int k = 0; k < K; ++k) {
      const vf a = widened(x + i + k * W), b = widened(y + i + k * W);
      xy[k] += a * b;
      if constexpr (squares) xx[k] += a * a;
    }
  }
  flush(xy, dot);
  if constexpr (squares) flush(xx, square);
}

template <typename T>
struct Padded {
  T data[kRun];
  // The n elements from `start`, in place where they fill a run, else copied and followed by zeros.
  GFAST_INLINE const T* get(const void* tensor, int64_t start, int n) {
    const T* p = static_cast<const T*>(tensor) + start;
    if (n == kRun) return p;
    memset(data, 0, sizeof(data));
    memcpy(data, p, n * sizeof(T));
    return data;
  }
};

template <typename X, typename Y, bool squares>
void block(const void* x, const void* y, int64_t start, int64_t count, double* dot, double* square) {
  Padded<X> px;
  Padded<Y> py;
  for (int64_t done = 0; done < count; done += kRun) {
    const int n = count - done < kRun ? static_cast<int>(count - done) : kRun;
    run<X, Y, squares>(px.get(x, start + done, n), py.get(y, start + done, n), dot, square);
  }
}

template <typename X, bool squares>
void block_y(const void* x, const void* y, int y_type, int64_t start, int64_t count, double* dot, double* square) {
  if (y_type == kFloat) block<X, float, squares>(x, y, start, count, dot, square);
  if (y_type == kBFloat16) block<X, bf16, squares>(x, y, start, count, dot, square);
  if (y_type == kHalf) block<X, f16, squares>(x, y, start, count, dot, square);
}

template <bool squares>
void block_xy(const void* x, int x_type, const void* y, int y_type, int64_t start, int64_t count, double* dot,
              double* square) {
  if (x_type == kFloat) block_y<float, squares>(x, y, y_type, start, count, dot, square);
  if (x_type == kBFloat16) block_y<bf16, squares>(x, y, y_type, start, count, dot, square);
  if (x_type == kHalf) block_y<f16, squares>(x, y, y_type, start, count, dot, square);
}

void widen(const void* tensor, int type, int64_t start, int n, double* out) {
  for (int i = 0; i < n; ++i) {
    if (type == kDouble) out[i] = static_cast<const double*>(tensor)[start + i];
    if (type == kFloat) out[i] = static_cast<const float*>(tensor)[start + i];
    if (type == kBFloat16) out[i] = load_one(static_cast<const bf16*>(tensor) + start + i);
    if (type == kHalf) out[i] = load_one(static_cast<const f16*>(tensor) + start + i);
  }
}

void block_double(const void* x, int x_type, const void* y, int y_type, int64_t start, int64_t count, double* dot) {
  double a[kRun], b[kRun];
  for (int64_t done = 0; done < count; done += kRun) {
    const int n = count - done < kRun ? static_cast<int>(count - done) : kRun;
    widen(x, x_type, start + done, n, a);
    widen(y, y_type, start + done, n, b);
    for (int i = 0; i < n; ++i) dot[i % kLanes] += a[i] * b[i];
  }
}

}  // namespace

// lanes: scratch [num_dirs + 1, 32]; out [num_dirs + 1]: the dots, then sum x*x. A block is small enough for x to stay
// in cache from one direction to the next.
void grad_dots_block(const void* x, int x_type, const void* const* ys, const int* y_types, int num_dirs, int64_t start,
                     int64_t count, double* lanes, double* out) {
  memset(lanes, 0, sizeof(double) * kLanes * (num_dirs + 1));
  double* square = lanes + num_dirs * kLanes;
  bool squared = false;
  for (int d = 0; d < num_dirs; ++d) {
    double* dot = lanes + d * kLanes;
    if (x_type == kDouble || y_types[d] == kDouble) {
      block_double(x, x_type, ys[d], y_types[d], start, count, dot);
    } else if (squared) {
      block_xy<false>(x, x_type, ys[d], y_types[d], start, count, dot, square);
    } else {
      block_xy<true>(x, x_type, ys[d], y_types[d], start, count, dot, square);
      squared = true;
    }
  }
  if (x_type == kDouble) {
    block_double(x, x_type, x, x_type, start, count, square);
  } else if (!squared) {
    block_xy<false>(x, x_type, x, x_type, start, count, square, nullptr);
  }
  for (int c = 0; c <= num_dirs; ++c) {
    out[c] = 0;
    for (int l = 0; l < kLanes; ++l) out[c] += lanes[c * kLanes + l];
  }
}

}  // namespace GFAST_ISA_NS
}  // namespace gfast
