// Kernels behind the output head: folding a tile of logits into log-sum-exp statistics while it is in cache, and adding
// a narrower product to an fp32 sum.
#include "cpu/kernels/head.h"

#include "cpu/kernels/map.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

// Sum of exp(z' - shift) over n entries, in fp32 lanes over a block at most.
template <Map map, typename T>
GFAST_INLINE float exp_sum(const Mapping& f, const T* row, int64_t n, vf shift) {
  vf s0{}, s1{};
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    const Pair z = load_pair(row + j);
    s0 += exp(f.template apply<map>(z.a).value - shift);
    s1 += exp(f.template apply<map>(z.b).value - shift);
  }
  for (; j < n; j += W) {
    const int64_t left = n - j;
    const vf z = f.template apply<map>(left < W ? load_part(row + j, left, 0.0f) : load(row + j)).value;
    s0 += select(lane_index() < (int32_t)(left < W ? left : W), exp(z - shift), vf{});
  }
  return reduce_add(s0 + s1);
}

// Adds n entries of a row to its statistics.
template <Map map, typename T>
void fold(const Mapping& f, const T* row, int64_t n, double& top, double& rest) {
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = n - start < kBlock ? n - start : kBlock;
    const float here = f.template finish<map>(splat(f.template block_max<map>(row + start, count))).value[0];
    const float before = (float)top, now = here > before ? here : before;
    const float shift = now == -kInf ? 0.0f : now;  // all masked: -inf - -inf would be NaN
    rest = rest * exp(splat(before - shift))[0] + exp_sum<map>(f, row + start, count, splat(shift));
    top = now;
  }
}

template <typename T, Map map>
void fold_rows_impl(const FoldArgs& a, int64_t begin, int64_t end) {
  const Mapping f(a.logits);
  for (int64_t i = begin; i < end; ++i) {
    const T* row = (const T*)a.logits.data + i * a.logits.stride;
    double &top = a.state[i], &rest = a.state[a.rows + i], &target = a.state[2 * a.rows + i];
    const int64_t y = a.labels[i] - a.first;
    if (y < 0 || y >= a.tile) {
      fold<map>(f, row, a.tile, top, rest);
    } else {  // the label stays out of the sum: what is left of it is 1 - p, all the signal where p is near 1
      target = f.template apply<map>(splat(load_one(row + y))).value[0];
      fold<map>(f, row, y, top, rest);
      fold<map>(f, row + y + 1, a.tile - y - 1, top, rest);
    }
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
