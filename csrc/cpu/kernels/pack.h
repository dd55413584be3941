// Rows of a matrix that become an fp32 panel.
#pragma once

#include "cpu/kernels/rows.h"

namespace gfast {

struct Factor {
  const void* data;  // rows contiguous
  int64_t stride;    // between rows, in elements
  Dtype dtype;
};

constexpr int64_t kPanel = 64;  // columns of a panel

}  // namespace gfast
