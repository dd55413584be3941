// Kernels behind the output head: folding a tile of logits into log-sum-exp statistics while it is in cache, and adding
// a narrower product to an fp32 sum.
#include "cpu/kernels/head.h"

#include "cpu/kernels/visit.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

// Adds n entries of a row to its statistics, without entry y, the label, if that is among them: what is left is 1 - p, all
// the signal where p is near 1.
template <Map map, typename T>
void fold(const Mapping& f, const T* row, int64_t n, int64_t y, double& top, double& rest) {
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = n - start < kBlock ? n - start : kBlock;
    const int64_t skip = y >= start && y < start + count ? y - start : -1;
    const T* block_row = row + start;
    float raw = f.template block_max<map>(block_row, skip < 0 ? count : skip);
    if (skip >= 0) {
      const float rest_raw = f.template block_max<map>(block_row + skip + 1, count - skip - 1);
      raw = rest_raw > raw ? rest_raw : raw;
    }
    const float here = f.template finish<map>(splat(raw)).value[0];
    const float before = (float)top, now = here > before ? here : before;
    const float shift = now == -kInf ? 0.0f : now;  // all masked: -inf - -inf would be NaN
    const Block block = visit_block<map, false>(block_row, count, skip, f, shift, nullptr, NoWrite{});
    rest = rest * exp(splat(before - shift))[0] + block.sum;
    top = now;
  }
}

template <typename T, Map map>
void fold_rows_impl(const FoldArgs& a, int64_t begin, int64_t end) {
  const Mapping f(a.logits);
  for (int64_t i = begin; i < end; ++i) {
    const T* row = (const T*)a.logits.data + i * a.logits.stride;
    double &top = a.state[i], &rest = a.state[a.rows + i], &target = a.state[2 * a.rows + i];
    const bool here = a.labels[i] >= a.first && a.labels[i] - a.first < a.tile;  // no label overflows: first >= 0
    const int64_t y = here ? a.labels[i] - a.first : -1;
    if (here) target = f.template apply<map>(splat(load_one(row + y))).value[0];
    fold<map>(f, row, a.tile, y, top, rest);
  }
}

template <typename T>
void accumulate_impl(float* total, const T* share, int64_t n) {
  int64_t j = 0;
  for (; j + W <= n; j += W) store(total + j, load(total + j) + load(share + j));
  if (j < n) store_part(total + j, n - j, load_part(total + j, n - j, 0.0f) + load_part(share + j, n - j, 0.0f));
}

}  // namespace

void fold_rows(const FoldArgs& a, int64_t begin, int64_t end) {
  dispatch(a.logits, [&](auto t, auto m) { fold_rows_impl<decltype(t), m.value>(a, begin, end); });
}

void accumulate(float* total, const void* share, Dtype dtype, int64_t begin, int64_t end) {
  if (dtype == Dtype::bf16)
    accumulate_impl(total + begin, (const bf16*)share + begin, end - begin);
  else
    accumulate_impl(total + begin, (const f16*)share + begin, end - begin);
}

}  // namespace GFAST_ISA_NS
}  // namespace gfast
