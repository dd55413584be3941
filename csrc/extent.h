// The memory that a strided tensor covers, and whether it is there.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace gfast {

// Bytes from the first entry to behind the last one. No overflow: torch has found them inside the storage.
inline int64_t extent(const at::Tensor& x) {
  if (x.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  return (last + 1) * x.element_size();
}

// False where the storage was freed or shrunk under the tensor, as sharding wrappers do between layers.
inline bool has_memory(const at::Tensor& x) {
  const int64_t bytes = extent(x);
  return bytes == 0 || x.storage().nbytes() >= static_cast<size_t>(x.storage_offset() * x.element_size() + bytes);
}

}  // namespace gfast
