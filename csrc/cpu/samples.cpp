// What gram needs besides matrix products on the CPU: used_rows (the others, padding, are left out of its products) and
// pair_sums (products of pairs of rows, added up by their samples).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gfast {

GFAST_DECLARE_KERNEL(void, pair_sums,
                     (const void*, const void*, bool, int64_t, int64_t, const int64_t*, int64_t, double*, int64_t,
                      int64_t))

namespace {

using at::Tensor;

constexpr int64_t kAtOnce = 64;  // entries between two looks: most rows end at the first

// Bits other than the sign: -0 is zero, NaN is not.
template <typename Bits>
bool used(const char* row, int64_t n) {
  constexpr Bits kValue = (Bits)~((Bits)1 << (8 * sizeof(Bits) - 1));
  int64_t j = 0;
  for (; j + kAtOnce <= n; j += kAtOnce) {
    Bits block[kAtOnce], any = 0;
    memcpy(block, row + j * (int64_t)sizeof(Bits), sizeof(block));
    for (int64_t k = 0; k < kAtOnce; ++k) any |= block[k];
    if (any & kValue) return true;
  }
  for (; j < n; ++j) {
    Bits one;
    memcpy(&one, row + j * (int64_t)sizeof(Bits), sizeof(one));
    if (one & kValue) return true;
  }
  return false;
}

// x [N, D] of a floating point dtype, rows apart from each other and each contiguous -> bool [N].
Tensor used_rows_cpu(const Tensor& x) {
  check_memory("used_rows", "x", x);
  TORCH_CHECK_VALUE(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1),
                    "gfast: used_rows: x must be [N, D] with contiguous rows, not ", x.sizes(), " with strides ",
                    x.strides());
  const int64_t size = x.element_size();
  TORCH_CHECK_TYPE(x.is_floating_point() && (size == 2 || size == 4 || size == 8),
                   "gfast: used_rows: x must be of 16, 32 or 64 bit floating point numbers, not ", x.scalar_type());
  Tensor out = at::empty({x.size(0)}, x.options().dtype(at::kBool));
  const char* data = static_cast<const char*>(x.const_data_ptr());
  bool* found = out.mutable_data_ptr<bool>();
  const int64_t columns = x.size(1), step = x.size(0) > 1 ? x.stride(0) * size : 0;
  parallel_for(0, x.size(0), grain(1 << 16, columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* row = data + i * step;
      found[i] = size == 2   ? used<uint16_t>(row, columns)
                 : size == 4 ? used<uint32_t>(row, columns)
                             : used<uint64_t>(row, columns);
    }
  });
  return out;
}

// x, y [n, m] fp32 or fp64; rows and columns of each sample -> fp64 [samples, samples'], sums of x * y.
Tensor pair_sums_cpu(const Tensor& x, const Tensor& y, at::IntArrayRef rows, at::IntArrayRef columns) {
  check_memory("pair_sums", "x", x);
  check_memory("pair_sums", "y", y);
  const bool wide = x.scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE((wide || x.scalar_type() == at::kFloat) && x.scalar_type() == y.scalar_type(),
                   "gfast: pair_sums: x and y must both be float32 or float64, not ", x.scalar_type(), " and ",
                   y.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 2 && x.sizes() == y.sizes() &&
                        (x.size(1) <= 1 || (x.stride(1) == 1 && y.stride(1) == 1)),
                    "gfast: pair_sums: x ", x.sizes(), " and y ", y.sizes(),
                    " must be matrices of one shape with contiguous rows");
  const auto first = sample_bounds("pair_sums", "rows", rows, x.size(0)), runs = sample_bounds("pair_sums", "columns", columns, x.size(1));
  const int64_t n = x.size(0), samples = (int64_t)rows.size(), others = (int64_t)columns.size();
  std::vector<double> parts(check_size("pair_sums", "sums by row", {n, others}));  // by row first: what is added up in which order depends on no thread
  const void *a = x.const_data_ptr(), *b = y.const_data_ptr();
  auto* kernel = GFAST_KERNEL(pair_sums);
  parallel_for(0, n, grain(1 << 14, x.size(1)), [&](int64_t begin, int64_t end) {
    kernel(a, b, wide, row_stride(x), row_stride(y), runs.data(), others, parts.data(), begin, end);
  });
  Tensor out = at::zeros({samples, others}, x.options().dtype(at::kDouble));
  double* sums = out.mutable_data_ptr<double>();
  for (int64_t i = 0; i < samples; ++i)
    for (int64_t t = first[i]; t < first[i + 1]; ++t)
      for (int64_t j = 0; j < others; ++j) sums[i * others + j] += parts[t * others + j];
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CPU, m) {
  m.impl("used_rows", &used_rows_cpu);
  m.impl("pair_sums", &pair_sums_cpu);
}

}  // namespace gfast
