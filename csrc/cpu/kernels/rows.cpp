// Row kernels over logits: log-probs, their gradient, and the weighted loss with its gradient in one visit of a row.
//
// A row is read block by block: exp(z' - running maximum) is summed and kept. The kept values of a block are later brought
// to the row's maximum by one factor, so no exp is taken twice and the logits are read from memory once. Gradients that go
// to memory around the caches are written while the next row of the thread's share is visited: stores wait for memory, exps
// do not.
#include "cpu/kernels/rows.h"

#include <cmath>
#include <optional>
#include <utility>

#include "cpu/kernels/visit.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

struct RowStats {
  double top;    // m = max z'
  double zy;     // z' of the target
  double slope;  // dz'/dz of the target
  double other;  // sum of exp(z'_j - m) over j != y
  double total;  // other + exp(z'_y - m)

  double logp() const { return zy == top ? 0.0 - log1p(other) : (zy - top) - log(total); }
};

// fp32 rows are scanned for their maximum before they are visited, because kept values may replace them.
template <typename T>
constexpr bool scan_first = sizeof(T) == sizeof(float);

// Entries of a row's gradient in place of the kept exps: kept * c. A visit of the next row may keep its own over them.
template <typename T, bool streamed>
struct BlockWrite {
  T* out;
  const float* kept;
  vf c;

  GFAST_INLINE void pair(int64_t j) const {
    const Pair e = load_pair(kept + j);
    const Pair g{e.a * c, e.b * c};
    streamed ? stream_pair(out + j, g) : store_pair(out + j, g);
  }

  GFAST_INLINE void part(int64_t j, int64_t n) const {
    const bool room = sizeof(T) != sizeof(float);  // as in BlockVisit::part
    const Pair e = room ? load_pair(kept + j) : load_pair_part(kept + j, n);
    store_pair_part(out + j, n, {e.a * c, e.b * c});
  }
};

// The gradient of a visited row. block_shift [blocks]: what each block was kept under.
template <typename T, bool streamed>
struct RowWrite {
  T* out;
  int64_t vocab, y;
  RowStats s;
  double coef, scale;
  const float *kept, *block_shift;

  BlockWrite<T, streamed> block(int64_t start) const {
    const double c = -coef * scale * std::exp(block_shift[start / kBlock] - s.top) / s.total;
    return {out + start, kept + start, splat((float)c)};
  }

  // The target's entry from 1 - p before its one rounding.
  void target() const { store_part(out + y, 1, splat((float)(coef * s.slope * (s.other / s.total)))); }

  void all() const {
    for (int64_t start = 0; start < vocab; start += kBlock) {
      const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
      const auto write = block(start);
      int64_t j = 0;
      for (; j + 2 * W <= n; j += 2 * W) write.pair(j);
      if (j < n) write.part(j, n - j);
    }
    target();
  }
};

// One visit of a row. kept [vocab] may be an fp32 row itself; block_shift [blocks] gets what each block was kept under.
// `before` is the gradient of another row of the same length, to be written along the way; it may hold the same `kept`.
//
// The shift of a block is the maximum of what came before it: its own maximum is found along the way, and only where
// that is so much greater that exps could overflow (or nothing finite came before) is the block visited again.
template <typename T, Map map, bool keep, typename Write = NoWrite>
RowStats visit(const T* row, int64_t vocab, int64_t y, const Mapping& f, float* kept, float* block_shift,
               const Write& before = {}) {
  constexpr float headroom = 40.0f;
  const Mapped target = f.apply<map>(splat(load_one(row + y)));
  float raw = -kInf, top = -kInf;
  double other = 0;
  const auto raise = [&](float block_raw) {
    if (!(block_raw > raw || top == -kInf)) return;  // -inf too: a softcap makes it finite
    raw = block_raw;
    const float before = top;
    top = f.finish<map>(splat(raw)).value[0];
    if (other != 0) other *= std::exp((double)before - (double)top);
  };
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const int64_t skip = y >= start && y < start + n ? y - start : -1;
    if (scan_first<T> || top == -kInf) raise(f.block_max<map>(row + start, n));
    // With everything so far masked (-inf), subtracting the maximum would give NaN; 0 gives exp(-inf) = 0.
    const auto go = [&](const auto& write) {
      return visit_block<map, keep>(row + start, n, skip, f, top == -kInf ? 0.0f : top, kept + start, write);
    };
    Block block = go(before.block(start));
    if (!scan_first<T> && f.finish<map>(splat(block.raw)).value[0] - top > headroom) {
      raise(block.raw);
      block = go(NoWrite{});
    }
    block_shift[start / kBlock] = top;
    other += block.sum;
    raise(block.raw);
  }
  const double zy = target.value[0];
  // All masked, or +inf: no softmax. A label that is the maximum would make it p = 1.
  if (!std::isfinite(top)) other = std::nan("");
  return {top, zy, (double)f.scale * target.slope[0], other, other + std::exp(zy - top)};
}

template <typename T>
void fill_zero(T* out, int64_t n) {
  memset(out, 0, n * sizeof(T));
}

// log(1 - p) of a row whose label is so far above the others that their exps relative to it are lost; nothing for any other
// row, which the first block mostly tells. It comes before the visit, which may write over the row.
template <typename T, Map map>
std::optional<double> log_others(const T* row, int64_t vocab, int64_t y, const Mapping& f) {
  constexpr float lost = 60.0f;
  const double zy = f.apply<map>(splat(load_one(row + y))).value[0];
  if (!std::isfinite(zy)) return {};
  float raw = -kInf, top = -kInf;
  for (const auto& [begin, end] : {std::pair{int64_t{0}, y}, std::pair{y + 1, vocab}}) {
    for (int64_t start = begin; start < end; start += kBlock) {
      raw = std::fmax(raw, f.block_max<map>(row + start, end - start < kBlock ? end - start : kBlock));
      top = f.finish<map>(splat(raw)).value[0];
      if (!(zy - top > lost)) return {};
    }
  }
  const double shift = top == -kInf ? 0.0 : top;  // all others masked: log 0
  double sum = 0;
  for (int64_t j = 0; j < vocab; ++j)
    if (j != y) sum += std::exp(f.apply<map>(splat(load_one(row + j))).value[0] - shift);
  return shift - zy + log(sum);
}

double token_weight(const WeightedArgs& a, const RowStats& s, double logp, std::optional<double> others, int64_t i) {
  double log_w = 0;
  if (a.p_pow != 0) log_w += a.p_pow * logp;
  if (a.q_pow != 0) log_w += a.q_pow * (others ? *others : log(s.other) - log(s.total));
  if (a.beta > 0) {
    const double d = a.beta * (logp - a.ref_logp[i]);
    log_w += M_LN2 + (d < 0 ? d : 0) - log1p(std::exp(-fabs(d)));
  }
  return a.sign * std::exp(log_w);
}

template <typename T, Map map>
void logp_rows_impl(const LogpArgs& a, int64_t begin, int64_t end, float* scratch) {
  const Mapping f(a.logits);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = a.labels[i];
    a.logp[i] = a.stats[2 * i] = a.stats[2 * i + 1] = 0;
    if (y < 0) continue;
    const T* row = (const T*)a.logits.data + i * a.logits.stride;
    const RowStats s = visit<T, map, false>(row, a.vocab, y, f, scratch, scratch);
    a.logp[i] = (float)s.logp();
    a.stats[2 * i] = (float)s.top;
    a.stats[2 * i + 1] = (float)log(s.total);
  }
}

template <typename T, Map map, bool grad>
void weighted_rows_impl(const WeightedArgs& a, int64_t begin, int64_t end, float* scratch) {
  const Mapping f(a.logits);
  float* block_shift = scratch + row_floats(a.vocab);
  std::optional<RowWrite<T, true>> before;  // the last row whose gradient goes around the caches, not written yet
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = a.labels[i];
    T* out = (T*)a.out + i * a.out_stride;
    a.logp[i] = a.weight[i] = 0;
    if (y < 0) {
      if (grad) fill_zero(out, a.vocab);
      continue;
    }
    const T* row = (const T*)a.logits.data + i * a.logits.stride;
    const bool streamed = grad && a.stream && can_stream(out);
    float* kept = scratch;
    if constexpr (grad && sizeof(T) == sizeof(float)) {
      if (!streamed) kept = out;  // fp32 gradients hold the exps themselves
    }
    if (before && !streamed) {  // its exps lie in the scratch
      before->all();
      before.reset();
    }
    const std::optional<double> others = a.q_pow != 0 ? log_others<T, map>(row, a.vocab, y, f) : std::nullopt;
    const RowStats s = before ? visit<T, map, grad>(row, a.vocab, y, f, kept, block_shift, *before)
                              : visit<T, map, grad>(row, a.vocab, y, f, kept, block_shift);
    if (before) before->target();
    const double logp = s.logp(), weight = token_weight(a, s, logp, others, i);
    a.logp[i] = (float)logp;
    a.weight[i] = (float)weight;
    if (!grad) continue;
    const double coef = a.coef_scale[i * a.coef_stride] * weight;
    if (streamed)
      before = RowWrite<T, true>{out, a.vocab, y, s, coef, f.scale, kept, block_shift};
    else
      RowWrite<T, false>{out, a.vocab, y, s, coef, f.scale, kept, block_shift}.all();
  }
  if (before) before->all();
  end_stream();
}

template <typename T, Map map>
void logp_rows_grad_impl(const GradArgs& a, int64_t begin, int64_t end, float*) {
  const Mapping f(a.logits);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = a.labels[i];
    T* out = (T*)a.out + i * a.out_stride;
    if (y < 0) {
      fill_zero(out, a.vocab);
      continue;
    }
    const T* row = (const T*)a.logits.data + i * a.logits.stride;
    const vf top = splat(a.stats[2 * i]), log_total = splat(a.stats[2 * i + 1]);
    const double slope = f.apply<map>(splat(load_one(row + y))).slope[0];
    const vf c = splat(-a.coef[i] * f.scale);
    const auto entry = [&](vf z) {
      const Mapped x = f.apply<map>(z);
      const vf e = exp((x.value - top) - log_total) * c;
      return map == Map::capped ? e * x.slope : e;
    };
    const auto pair = [&](Pair z) { return Pair{entry(z.a), entry(z.b)}; };
    int64_t j = 0;
    const auto whole = [&](auto put) {
      for (; j + 2 * W <= a.vocab; j += 2 * W) {
        prefetch_pair(row + j);
        put(out + j, pair(load_pair(row + j)));
      }
    };
    if (a.stream && can_stream(out))
      whole([](T* p, Pair g) { stream_pair(p, g); });
    else
      whole([](T* p, Pair g) { store_pair(p, g); });
    const int64_t rest = a.vocab - j;
    if (rest > 0) store_pair_part(out + j, rest, pair(load_pair_part(row + j, rest)));
    store_part(out + y, 1, splat((float)((double)a.coef[i] * f.scale * slope * -expm1((double)a.logp[i]))));
  }
  end_stream();
}

}  // namespace

void logp_rows(const LogpArgs& a, int64_t begin, int64_t end, float* scratch) {
  dispatch(a.logits, [&](auto t, auto m) { logp_rows_impl<decltype(t), m.value>(a, begin, end, scratch); });
}

void logp_rows_grad(const GradArgs& a, int64_t begin, int64_t end, float* scratch) {
  dispatch(a.logits, [&](auto t, auto m) { logp_rows_grad_impl<decltype(t), m.value>(a, begin, end, scratch); });
}

void weighted_rows(const WeightedArgs& a, int64_t begin, int64_t end, float* scratch) {
  dispatch(a.logits, [&](auto t, auto m) {
    if (a.out != nullptr)
      weighted_rows_impl<decltype(t), m.value, true>(a, begin, end, scratch);
    else
      weighted_rows_impl<decltype(t), m.value, false>(a, begin, end, scratch);
  });
}

void scale_values(void* data, Dtype dtype, int64_t begin, int64_t end, float factor) {
  const auto scale = [&](auto* x) {
    const auto pair = [&](Pair v) { return Pair{v.a * factor, v.b * factor}; };
    int64_t j = begin;
    for (; j + 2 * W <= end; j += 2 * W) {
      prefetch_pair(x + j);
      store_pair(x + j, pair(load_pair(x + j)));
    }
    if (j < end) store_pair_part(x + j, end - j, pair(load_pair_part(x + j, end - j)));
  };
  if (dtype == Dtype::f32)
    scale((float*)data);
  else if (dtype == Dtype::bf16)
    scale((bf16*)data);
  else
    scale((f16*)data);
}

}  // namespace GFAST_ISA_NS
}  // namespace gfast
