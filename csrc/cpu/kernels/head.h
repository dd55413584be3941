// Arguments of the kernels behind the output head: plain pointers and strides (in elements), no torch header.
#pragma once

#include "cpu/kernels/rows.h"

namespace gfast {

struct FoldArgs {
  Matrix logits;          // [rows, tile]: a tile of the vocabulary
  int64_t tile;           // vocabulary entries in the tile
  int64_t rows;           // N
  int64_t first;          // vocabulary entry of the tile's first column
  const int64_t* labels;  // [N]
  double* state;          // [3, N]: maximum and sum of exp(z' - maximum) of all entries so far but the label; z' of the label
};

}  // namespace gfast
