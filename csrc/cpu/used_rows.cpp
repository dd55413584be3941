// Which rows of a matrix hold something else than zeros: gram leaves the others (padding) out of its products.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>

namespace gfast {

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
  TORCH_CHECK_VALUE(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1),
                    "gfast: used_rows: x must be [N, D] with contiguous rows, not ", x.sizes(), " with strides ",
                    x.strides());
  const int64_t size = x.element_size();
  TORCH_CHECK_TYPE(x.is_floating_point() && (size == 2 || size == 4 || size == 8),
                   "gfast: used_rows: x must be of 16, 32 or 64 bit floating point numbers, not ", x.scalar_type());
  Tensor out = at::empty({x.size(0)}, x.options().dtype(at::kBool));
  const char* data = static_cast<const char*>(x.const_data_ptr());
  bool* found = out.mutable_data_ptr<bool>();
  const int64_t columns = x.size(1), step = x.stride(0) * size;
  at::parallel_for(0, x.size(0), 1 + (1 << 16) / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* row = data + i * step;
      found[i] = size == 2   ? used<uint16_t>(row, columns)
                 : size == 4 ? used<uint32_t>(row, columns)
                             : used<uint64_t>(row, columns);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CPU, m) { m.impl("used_rows", &used_rows_cpu); }

}  // namespace gfast
