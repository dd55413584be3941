// Sums of x * y over runs of columns, for some rows: a run is a sample's rows, so a run's sum is a pair of a row and a
// sample; and over the rows or the columns of panels. fp32 over 16 at most, fp64
// beyond; over the columns of panels in W fp32 parts, until lane_totals adds those up.
#include "cpu/kernels/pack.h"
#include "cpu/kernels/vec.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

constexpr int kVectors = 16;

GFAST_INLINE double total(vf x) {
  double lanes[W];
  for (int l = 0; l < W; ++l) lanes[l] = x[l];
  for (int half = W / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

GFAST_INLINE double dot(const float* x, const float* y, int64_t n) {
  double sum = 0;
  int64_t j = 0;
  while (j + W <= n) {
    vf part = {};
    for (int k = 0; k < kVectors && j + W <= n; ++k, j += W) part += load(x + j) * load(y + j);
    sum += total(part);
  }
  if (j < n) sum += total(load_part(x + j, n - j, 0.0f) * load_part(y + j, n - j, 0.0f));
  return sum;
}

GFAST_INLINE double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
  return sum;
}

template <typename T>
void pair_sums_impl(const T* x, const T* y, int64_t x_step, int64_t y_step, const int64_t* bounds, int64_t runs,
                    double* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t s = 0; s < runs; ++s)
      out[i * runs + s] = dot(x + i * x_step + bounds[s], y + i * y_step + bounds[s], bounds[s + 1] - bounds[s]);
}

}  // namespace

// out [rows, runs] = sums over columns bounds[s] to bounds[s + 1] of the rows begin to end of x and y.
void pair_sums(const void* x, const void* y, bool wide, int64_t x_step, int64_t y_step, const int64_t* bounds,
               int64_t runs, double* out, int64_t begin, int64_t end) {
  if (wide)
    pair_sums_impl((const double*)x, (const double*)y, x_step, y_step, bounds, runs, out, begin, end);
  else
    pair_sums_impl((const float*)x, (const float*)y, x_step, y_step, bounds, runs, out, begin, end);
}

// out [kPanel] = sums of x * y over their rows.
void panel_sums(const float* x, const float* y, int64_t rows, double* out) {
  for (int64_t c = 0; c < kPanel; ++c) out[c] = 0;
  for (int64_t row = 0; row < rows;) {
    const int64_t stop = rows - row < kVectors ? rows : row + kVectors;
    vf part[kPanel / W] = {};
    for (; row < stop; ++row)
#pragma GCC unroll 16
      for (int64_t v = 0; v < kPanel / W; ++v) part[v] += load(x + row * kPanel + v * W) * load(y + row * kPanel + v * W);
    for (int64_t v = 0; v < kPanel / W; ++v)
      for (int64_t l = 0; l < W; ++l) out[v * W + l] += part[v][l];
  }
}

// Sums of x [rows, kPanel] * y over the first `columns` columns, added in W parts a row to lanes [rows, W].
void panel_dots(const float* x, const float* y, int64_t y_step, int64_t rows, int64_t columns, float* lanes) {
  for (int64_t row = 0; row < rows; ++row, x += kPanel, y += y_step, lanes += W) {
    vf part = load(lanes);
    if (columns == kPanel) {
#pragma GCC unroll 16
      for (int64_t c = 0; c < kPanel; c += W) part += load(x + c) * load(y + c);
    } else {
      int64_t c = 0;
      for (; c + W <= columns; c += W) part += load(x + c) * load(y + c);
      if (c < columns) part += load_part(x + c, columns - c, 0.0f) * load_part(y + c, columns - c, 0.0f);
    }
    store(lanes, part);
  }
}

// out [rows] += what panel_dots has gathered, which is 0 again.
void lane_totals(float* lanes, int64_t rows, double* out) {
  for (int64_t row = 0; row < rows; ++row, lanes += W) {
    out[row] += total(load(lanes));
    store(lanes, vf{});
  }
}

}  // namespace GFAST_ISA_NS
}  // namespace gfast
