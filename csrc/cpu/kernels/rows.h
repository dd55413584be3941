// Arguments of the row kernels: plain pointers and strides (in elements), so that kernels need no torch header.
#pragma once

#include <cstdint>

namespace gfast {

enum class Dtype { f32, bf16, f16 };

struct Matrix {
  const void* data;  // [N, vocab], rows contiguous
  int64_t stride;    // between rows
  Dtype dtype;
  float scale;    // z' = softcap * tanh(scale * z / softcap),
  float softcap;  // or scale * z where softcap is 0
};

struct RowsArgs {
  Matrix logits;
  int64_t vocab;
  const int64_t* labels;  // [N], -100 ignored
  void* out;              // [N, vocab] of the logits' dtype, may be the logits themselves; null: no gradient
  int64_t out_stride;
  bool stream;  // write out around the caches
};

struct LogpArgs : RowsArgs {
  float* logp;   // [N]
  float* stats;  // [N, 2]: max z', log(sum exp(z' - max))
};

struct GradArgs : RowsArgs {
  const float* logp;   // [N]
  const float* stats;  // [N, 2]
  const float* coef;   // [N]
};

struct WeightedArgs : RowsArgs {
  const float* ref_logp;  // [N], read where beta > 0
  float sign, p_pow, q_pow, beta;
  const float* coef_scale;  // of all rows, or [N]
  int64_t coef_stride;      // 0, or 1
  float* logp;    // [N]
  float* weight;  // [N]
};

// Of q = softmax(ref) from p = softmax(logits): KL(q || p), that plus the entropy of q, and Jensen and Shannon's.
enum class Divergence { kl, cross_entropy, js };

struct KlArgs {
  Matrix logits, ref;
  int64_t vocab;
  const int64_t* labels;
  float coef_scale;
  float* kl;  // [N], null where only the gradient is wanted
  void* out;
  int64_t out_stride;
  // [N, 4]: max z' and sum exp(z' - max) of the logits, then of ref; null where nobody wants them
  double* totals;
  const double* given;  // the same over longer rows that these are parts of, to normalise by; null: these are whole
  const float* lower;   // [N], taken off ref's z' at the label; null: nothing
  Divergence kind;
};

// What `stat_rows` tells of a row, in this order: max z', log(sum exp(z' - max)), the mean of max - z' under the softmax,
// the plain mean of z', z' of the label, and the entropy of softmax(sharpness z').
enum Stat { kTop, kLogTotal, kGap, kMean, kLabel, kEntropy, kStats };

constexpr int64_t kMostTop = 128;  // entries of a row that are told one by one

struct StatsArgs {
  Matrix logits;
  int64_t vocab;
  const int64_t* labels;
  int64_t top;  // 1 to kMostTop and to vocab
  float sharpness;
  bool soft;      // whether what takes exps is wanted; 0 where not
  float* stats;   // [N, kStats]
  float* values;  // [N, top]: the largest z', of equal ones the first column first
  int64_t* ids;   // [N, top]: their columns
};

// The gradient of what `stat_rows` tells, each output times a factor of its own.
struct StatsGradArgs : RowsArgs {
  const float* stats;      // [N, kStats], of sharpness 1
  const float* dense;      // [N, 3]: factors of logp, entropy and mean
  const int64_t* columns;  // [N, count]: entries that get more; one may come more than once
  const float* adds;       // [N, count]
  int64_t count;           // 1 to kMostTop + 1
  bool soft;               // whether the first two factors count
};

constexpr int64_t kBlock = 2048;

// Scratch for a row in whole vectors or for a value a block, and what a thread needs for any row kernel.
static constexpr int64_t row_floats(int64_t vocab) { return vocab + kBlock; }
static constexpr int64_t scratch_floats(int64_t vocab) { return 3 * row_floats(vocab); }

}  // namespace gfast
