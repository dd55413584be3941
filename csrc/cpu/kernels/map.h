// The effective logit z' of a logit z: z, scale * z, or softcap * tanh(scale * z / softcap).
#pragma once

#include "cpu/kernels/exp.h"
#include "cpu/kernels/rows.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

enum class Map { identity, scaled, capped };

struct Mapped {
  vf value;  // z'
  vf slope;  // dz'/dz / scale
};

struct Mapping {
  float scale, softcap;

  explicit Mapping(const Matrix& m) : scale(m.scale), softcap(m.softcap) {}

  // The cheap part; what follows is monotone, so maxima are taken of this, before the tanh.
  template <Map map>
  GFAST_INLINE vf begin(vf z) const {
    if constexpr (map == Map::identity) return z;
    if constexpr (map == Map::scaled) return rounded(z * scale);
    return rounded(z * scale) / softcap;  // a product with scale / softcap would round once more
  }

  template <Map map>
  GFAST_INLINE Mapped finish(vf x) const {
    if constexpr (map == Map::capped) {
      const Tanh t = tanh(x);
      return {rounded(softcap * t.value), t.slope};
    } else {
      return {x, splat(1.0f)};
    }
  }

  template <Map map>
  GFAST_INLINE Mapped apply(vf z) const {
    return finish<map>(begin<map>(z));
  }

  // Maximum of begin(z) over n entries; a NaN is passed over here and shows in the sum.
  template <Map map, typename T>
  float block_max(const T* row, int64_t n) const {
    vf m0 = splat(-kInf), m1 = m0, m2 = m0, m3 = m0;
    int64_t j = 0;
    for (; j + 4 * W <= n; j += 4 * W) {
      m0 = max(begin<map>(load(row + j)), m0);
      m1 = max(begin<map>(load(row + j + W)), m1);
      m2 = max(begin<map>(load(row + j + 2 * W)), m2);
      m3 = max(begin<map>(load(row + j + 3 * W)), m3);
    }
    for (; j + W <= n; j += W) m0 = max(begin<map>(load(row + j)), m0);
    if (j < n) m1 = max(begin<map>(load_part(row + j, n - j, -kInf)), m1);
    return reduce_max(max(max(m0, m1), max(m2, m3)));
  }
};

template <Map m>
struct MapTag {
  static constexpr Map value = m;
};

// Calls body(T{}, MapTag<map>{}) for the matrix's dtype and mapping.
template <typename Body>
GFAST_INLINE void dispatch(const Matrix& m, Body body) {
  const auto with_map = [&](auto t) {
    if (m.softcap > 0)
      body(t, MapTag<Map::capped>{});
    else if (m.scale != 1.0f)
      body(t, MapTag<Map::scaled>{});
    else
      body(t, MapTag<Map::identity>{});
  };
  if (m.dtype == Dtype::f32)
    with_map(float{});
  else if (m.dtype == Dtype::bf16)
    with_map(bf16{});
  else
    with_map(f16{});
}

}  // namespace
}  // namespace GFAST_ISA_NS
}  // namespace gfast
