// Interface between the ATen launcher (rows.cpp) and the plain CUDA code (rows_kernel.cu).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gfast::cuda {

constexpr int kPartBytes = 1 << 16;  // of a row, that one block holds: three of them share an SM
constexpr int kMaxBlocks = 8;        // of a cluster, on every GPU that has clusters

struct RowsArgs {
  const void* logits;  // [rows, vocab], neighbouring columns
  int64_t stride;      // elements between rows; rows may begin anywhere
  const int64_t* labels;    // [rows], -100 ignored
  const float* ref_logp;    // [rows], read where beta > 0
  const float* coef_scale;  // one number, or [rows]
  float* logp;              // [rows]
  float* weight;            // [rows]
  void* out;                // [rows, vocab] of the logits' type, may be logits; null: no gradient
  int64_t out_stride;       // out's rows begin at the same address modulo 16 as those of the logits
  int64_t rows;
  int vocab;
  float sign, p_pow, q_pow, beta, scale;
  bool coef_by_row;  // coef_scale has one number a row
};

// Vectors of 16 bytes that a row touches at most: `itemsize` bytes an element, all rows at multiples of 16 or not.
constexpr int64_t row_vectors(int64_t vocab, int itemsize, bool aligned) {
  return (vocab * itemsize + (aligned ? 0 : 16 - itemsize) + 15) / 16;
}

// Blocks that a row takes, 0 where it is too long.
constexpr int row_blocks(int64_t vectors) {
  for (int blocks = 1; blocks <= kMaxBlocks; blocks *= 2)
    if ((vectors + blocks - 1) / blocks * 16 <= kPartBytes) return blocks;
  return 0;
}

// Enqueues the kernel on `stream`, on a GPU with clusters (sm_90 and later). `type`: 0 fp32, 1 bf16, 2 fp16, as
// ElementType of grad_dots_plan.h.
cudaError_t launch_weighted_rows(const RowsArgs& args, int type, bool aligned, cudaStream_t stream);

}  // namespace gfast::cuda
