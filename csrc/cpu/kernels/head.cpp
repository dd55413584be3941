// Kernels behind the output head: folding a tile of logits into log-sum-exp statistics while it is in cache, and adding
// a narrower product to an fp32 sum.
#include "cpu/kernels/head.h"

#include "cpu/kernels/map.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

constexpr int64_t kStep = 64;  // vocabulary entries between two looks at the maximum

struct Running {
  vf top;   // maximum so far
  vd rest;  // sum of exp(z' - top); fp64, since a vocabulary is 10^5 additions long
};

// Adds `steps` entries to the statistics of W batch rows; load(i) gives their logits at entry i.
template <Map map, typename Load>
GFAST_INLINE void fold(const Mapping& f, int64_t steps, Load load_entry, Running& a, Running& b) {
  vf raw0 = splat(-kInf), raw1 = raw0;
  for (int64_t i = 0; i < steps; ++i) {
    const Pair z = load_entry(i);
    raw0 = max(f.begin<map>(z.a), raw0);
    raw1 = max(f.begin<map>(z.b), raw1);
  }
  const auto shift_of = [&](vf raw, Running& r, vf& before) {
    before = r.top;
    r.top = max(f.finish<map>(raw).value, r.top);
    return select(r.top == splat(-kInf), vf{}, r.top);  // all masked: -inf - -inf would be NaN
  };
  vf before0, before1;
  const vf shift0 = shift_of(raw0, a, before0), shift1 = shift_of(raw1, b, before1);
  vf sum0{}, sum1{};
  for (int64_t i = 0; i < steps; ++i) {
    const Pair z = load_entry(i);
    sum0 += exp(f.apply<map>(z.a).value - shift0);
    sum1 += exp(f.apply<map>(z.b).value - shift1);
  }
  a.rest = a.rest * __builtin_convertvector(exp(before0 - shift0), vd) + __builtin_convertvector(sum0, vd);
  b.rest = b.rest * __builtin_convertvector(exp(before1 - shift1), vd) + __builtin_convertvector(sum1, vd);
}

// 2 W batch rows from column c on, `width` of them real; label[h] is the label's entry in the tile, or -1.
template <typename T, Map map>
void fold_columns_block(const FoldArgs& a, const Mapping& f, int64_t start, int64_t steps, int64_t c, int64_t width,
                        const int32_t* label, float* top, double* rest, double* target) {
  const T* corner = (const T*)a.logits.data + start * a.logits.stride + c;
  const auto entry = [&](int64_t i) {
    const T* p = corner + i * a.logits.stride;
    return width == 2 * W ? load_pair(p) : load_pair_part(p, width);
  };
  Running lanes[2];
  memcpy(&lanes[0].top, top, sizeof(vf));
  memcpy(&lanes[1].top, top + W, sizeof(vf));
  memcpy(&lanes[0].rest, rest, sizeof(vd));
  memcpy(&lanes[1].rest, rest + W, sizeof(vd));
  bool labels_here = false;
  for (int64_t h = 0; h < width; ++h) labels_here |= label[h] >= start && label[h] < start + steps;
  if (!labels_here) {
    if (width == 2 * W)
      fold<map>(f, steps, [&](int64_t i) { return load_pair(corner + i * a.logits.stride); }, lanes[0], lanes[1]);
    else
      fold<map>(f, steps, entry, lanes[0], lanes[1]);
  } else {
    // Labels stay out of the sum: what is left of it is 1 - p, all the signal where p is near 1.
    float mapped[kStep * 2 * W];
    for (int64_t i = 0; i < steps; ++i) {
      const Pair z = entry(i);
      store(mapped + i * 2 * W, f.template apply<map>(z.a).value);
      store(mapped + i * 2 * W + W, f.template apply<map>(z.b).value);
    }
    for (int64_t h = 0; h < width; ++h) {
      if (label[h] < start || label[h] >= start + steps) continue;
      float& z = mapped[(label[h] - start) * 2 * W + PairLayout<T>::at(h)];
      target[h] = z;
      z = -kInf;
    }
    const auto kept = [&](int64_t i) { return Pair{load(mapped + i * 2 * W), load(mapped + i * 2 * W + W)}; };
    fold<Map::identity>(f, steps, kept, lanes[0], lanes[1]);
  }
  memcpy(top, &lanes[0].top, sizeof(vf));
  memcpy(top + W, &lanes[1].top, sizeof(vf));
  memcpy(rest, &lanes[0].rest, sizeof(vd));
  memcpy(rest + W, &lanes[1].rest, sizeof(vd));
}

// Columns [begin, end), end - begin at most kFoldColumns; the statistics are kept in the order of pairs meanwhile.
template <typename T, Map map>
void fold_columns_impl(const FoldArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t span = 2 * W, room = kFoldAlign;
  static_assert(room % span == 0);
  const Mapping f(a.logits);
  for (int64_t first = begin; first < end; first += room) {
    const int64_t count = end - first < room ? end - first : room;
    float top[room];
    double rest[room], target[room];
    int32_t label[room];
    const auto at = [&](int64_t j) { return j / span * span + PairLayout<T>::at(j % span); };
    for (int64_t j = 0; j < room; ++j) {
      const bool real = j < count;
      top[at(j)] = real ? (float)a.state[first + j] : -kInf;
      rest[at(j)] = real ? a.state[a.columns + first + j] : 0;
      target[j] = real ? a.state[2 * a.columns + first + j] : 0;
      const int64_t y = real ? a.labels[first + j] - a.first : -1;
      label[j] = y >= 0 && y < a.tile ? (int32_t)y : -1;
    }
    for (int64_t start = 0; start < a.tile; start += kStep) {
      const int64_t steps = a.tile - start < kStep ? a.tile - start : kStep;
      for (int64_t c = 0; c < count; c += span)
        fold_columns_block<T, map>(a, f, start, steps, first + c, count - c < span ? count - c : span, label + c,
                                   top + c, rest + c, target + c);
    }
    for (int64_t j = 0; j < count; ++j) {
      a.state[first + j] = top[at(j)];
      a.state[a.columns + first + j] = rest[at(j)];
      a.state[2 * a.columns + first + j] = target[j];
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

void fold_columns(const FoldArgs& a, int64_t begin, int64_t end) {
  dispatch(a.logits, [&](auto t, auto m) { fold_columns_impl<decltype(t), m.value>(a, begin, end); });
}

void accumulate(float* total, const void* share, Dtype dtype, int64_t begin, int64_t end) {
  if (dtype == Dtype::bf16)
    accumulate_impl(total + begin, (const bf16*)share + begin, end - begin);
  else
    accumulate_impl(total + begin, (const f16*)share + begin, end - begin);
}

}  // namespace GFAST_ISA_NS
}  // namespace gfast
