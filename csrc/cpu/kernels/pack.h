// Rows of up to 32 bits as fp32, in place or turned into columns.
#pragma once

#include "cpu/kernels/rows.h"

namespace gfast {

struct Factor {
  const void* data;  // rows contiguous
  int64_t stride;    // between rows, in elements
  Dtype dtype;
};

constexpr int64_t kPanel = 64;  // rows that become the columns of a panel

}  // namespace gfast
