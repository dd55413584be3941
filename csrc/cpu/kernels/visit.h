// A block of a row of logits, visited once: the sum of exp(z' - shift), the maximum, and the exps where they are wanted.
#pragma once

#include "cpu/kernels/map.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

// What a visit does along the way for another row: nothing.
struct NoWrite {
  void pair(int64_t) const {}
  void part(int64_t, int64_t) const {}
  NoWrite block(int64_t) const { return {}; }
};

struct Block {
  float sum;  // of exp(z' - shift) without entry `skip` (negative: none left out)
  float raw;  // maximum of f.begin(z)
};

// What a block is reduced to, and what it is visited with. Kept: exp(z' - shift) * slope / scale, in the order of pairs.
template <Map map, bool keep>
struct BlockVisit {
  const Mapping& f;
  vf shift;
  vf sum0{}, sum1{};
  vf raw0 = splat(-kInf), raw1 = raw0;

  struct Entry {
    vf exp, kept;
  };

  GFAST_INLINE Entry one(vf z, vf& raw) const {
    const vf begun = f.template begin<map>(z);
    raw = max(begun, raw);
    const Mapped x = f.template finish<map>(begun);
    const vf e = exp(x.value - shift);
    return {e, map == Map::capped ? e * x.slope : e};
  }

  template <typename T, typename Write>
  GFAST_INLINE int64_t whole(const T* row, int64_t j, int64_t end, float* kept, const Write& before) {
    for (; j + 2 * W <= end; j += 2 * W) {
      prefetch_pair(row + j);
      before.pair(j);
      const Pair z = load_pair(row + j);
      const Entry a = one(z.a, raw0), b = one(z.b, raw1);
      if constexpr (keep) store_pair(kept + j, {a.kept, b.kept});
      sum0 += a.exp;
      sum1 += b.exp;
    }
    return j;
  }

  // The next n <= 2 W entries; entry `hole` of them is left out of the sum.
  template <typename T, typename Write>
  GFAST_INLINE int64_t part(const T* row, int64_t j, int64_t n, int64_t hole, float* kept, const Write& before) {
    before.part(j, n);
    const Pair z = load_pair_part(row + j, n);
    const Entry a = one(z.a, raw0), b = one(z.b, raw1);
    // A pair of fp32 is in order and may be the row itself; others have room for a whole pair after the row.
    if constexpr (keep) store_pair_part(kept + j, sizeof(T) == sizeof(float) ? n : 2 * W, {a.kept, b.kept});
    float sums[2 * W];
    store_pair(sums, {a.exp, b.exp});
    // Softcap makes a finite number of the filling: only real entries are added.
    for (int64_t h = 0; h < 2 * W; ++h)
      if (h >= n || h == hole) sums[PairLayout<T>::at(h)] = 0;
    const Pair kept_sums = load_pair((const float*)sums);
    sum0 += kept_sums.a;
    sum1 += kept_sums.b;
    return j + n;
  }
};

template <Map map, bool keep, typename T, typename Write>
Block visit_block(const T* row, int64_t n, int64_t skip, const Mapping& f, float shift, float* kept,
                  const Write& before) {
  BlockVisit<map, keep> v{f, splat(shift)};
  int64_t j = 0;
  if (skip >= 0) {
    j = v.whole(row, j, skip / (2 * W) * (2 * W), kept, before);
    j = v.part(row, j, n - j < 2 * W ? n - j : 2 * W, skip - j, kept, before);
  }
  j = v.whole(row, j, n, kept, before);
  if (j < n) v.part(row, j, n - j, -1, kept, before);
  return {reduce_add(v.sum0 + v.sum1), reduce_max(max(v.raw0, v.raw1))};
}

}  // namespace
}  // namespace GFAST_ISA_NS
}  // namespace gfast
