// Arguments of the kernels behind the output head: plain pointers and strides (in elements), no torch header.
#pragma once

#include "cpu/kernels/rows.h"

namespace gfast {

struct FoldArgs {
  Matrix logits;          // [tile, columns]: a tile of the vocabulary down, rows of the batch across
  int64_t tile;           // vocabulary entries in the tile
  int64_t columns;        // N, rows of the batch
  int64_t first;          // vocabulary entry of the tile's first row
  const int64_t* labels;  // [N]
  double* state;          // [3, N]: maximum and sum of exp(z' - maximum) of all entries so far but the label; z' of the label
};

constexpr int64_t kFoldAlign = 64;  // columns that one thread takes at least: whole cache lines of every dtype

}  // namespace gfast
