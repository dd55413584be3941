// Row kernels over logits: log-probs, their gradient, and the weighted loss with its gradient in one visit of a row.
//
// A row is read block by block. Each block is first scanned for its maximum, then exp(z' - running maximum) is summed and
// kept; the kept values of a block are later brought to the row's maximum by one factor, so no exp is taken twice and
// the logits are read from memory once.
#include "cpu/kernels/rows.h"

#include <cmath>

#include "cpu/kernels/map.h"

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

// Sum of exp(z' - top) over a block without entry `skip` (negative: none left out). Kept: exp(z' - top) * slope / scale.
template <typename T, Map map, bool keep>
float block_sum(const T* row, int64_t n, int64_t skip, const Mapping& f, float top, float* kept) {
  const vf t = splat(top);
  vf sum0{}, sum1{};
  int64_t j = 0;
  const auto full = [&](int64_t end) {
    for (; j + 2 * W <= end; j += 2 * W) {
      const Mapped a = f.apply<map>(load(row + j));
      const Mapped b = f.apply<map>(load(row + j + W));
      const vf ea = exp(a.value - t), eb = exp(b.value - t);
      if (keep) store(kept + j, map == Map::capped ? ea * a.slope : ea);
      if (keep) store(kept + j + W, map == Map::capped ? eb * b.slope : eb);
      sum0 += ea;
      sum1 += eb;
    }
    for (; j + W <= end; j += W) {
      const Mapped a = f.apply<map>(load(row + j));
      const vf e = exp(a.value - t);
      if (keep) store(kept + j, map == Map::capped ? e * a.slope : e);
      sum0 += e;
    }
  };
  const auto part = [&](int64_t count, int64_t hole) {
    const Mapped a = f.apply<map>(load_part(row + j, count, -kInf));
    const vi lane = lane_index();
    const vf e = exp(a.value - t);
    if (keep) store_part(kept + j, count, map == Map::capped ? e * a.slope : e);
    sum0 += select((lane < (int32_t)count) & (lane != (int32_t)hole), e, vf{});
    j += count;
  };
  if (skip >= 0) {
    full(skip / W * W);
    part(n - j < W ? n - j : W, skip - j);
  }
  full(n);
  if (j < n) part(n - j, -1);
  return reduce_add(sum0 + sum1);
}

// One visit of a row. kept [vocab] may be the row itself; block_top [blocks] gets the maximum each block was kept at.
template <typename T, Map map, bool keep>
RowStats visit(const T* row, int64_t vocab, int64_t y, const Mapping& f, float* kept, float* block_top) {
  const Mapped target = f.apply<map>(splat(load_one(row + y)));
  float raw = -kInf, top = -kInf;
  double other = 0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const float block_raw = f.block_max<map>(row + start, n);
    if (block_raw > raw) {
      raw = block_raw;
      const float before = top;
      top = f.finish<map>(splat(raw)).value[0];
      if (other != 0) other *= std::exp((double)before - (double)top);
    }
    block_top[start / kBlock] = top;
    const int64_t skip = y >= start && y < start + n ? y - start : -1;
    // With everything so far masked (-inf), subtracting the maximum would give NaN; 0 gives exp(-inf) = 0.
    other += block_sum<T, map, keep>(row + start, n, skip, f, top == -kInf ? 0.0f : top, kept + start);
  }
  const double zy = target.value[0];
  return {top, zy, (double)f.scale * target.slope[0], other, other + std::exp(zy - top)};
}

template <typename T>
void fill_zero(T* out, int64_t n) {
  memset(out, 0, n * sizeof(T));
}

// out = kept * factor of the block, then the target's entry from 1 - p before its one rounding.
template <typename T>
void write_grad(T* out, int64_t vocab, int64_t y, const RowStats& s, double coef, double scale, const float* kept,
                const float* block_top) {
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t end = vocab - start < kBlock ? vocab : start + kBlock;
    const vf c = splat((float)(-coef * scale * std::exp(block_top[start / kBlock] - s.top) / s.total));
    int64_t j = start;
    for (; j + W <= end; j += W) store(out + j, load(kept + j) * c);
    if (j < end) store_part(out + j, end - j, load_part(kept + j, end - j, 0.0f) * c);
  }
  store_part(out + y, 1, splat((float)(coef * s.slope * (s.other / s.total))));
}

double token_weight(const WeightedArgs& a, const RowStats& s, double logp, int64_t i) {
  double log_w = 0;
  if (a.p_pow != 0) log_w += a.p_pow * logp;
  if (a.q_pow != 0) log_w += a.q_pow * (log(s.other) - log(s.total));
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
  float* block_top = scratch + a.vocab;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = a.labels[i];
    T* out = (T*)a.out + i * a.out_stride;
    a.logp[i] = a.weight[i] = 0;
    if (y < 0) {
      if (grad) fill_zero(out, a.vocab);
      continue;
    }
    const T* row = (const T*)a.logits.data + i * a.logits.stride;
    float* kept = scratch;
    if constexpr (grad && sizeof(T) == sizeof(float)) kept = out;  // fp32 gradients hold the exps themselves
    const RowStats s = visit<T, map, grad>(row, a.vocab, y, f, kept, block_top);
    const double logp = s.logp(), weight = token_weight(a, s, logp, i);
    a.logp[i] = (float)logp;
    a.weight[i] = (float)weight;
    if (grad) write_grad(out, a.vocab, y, s, a.coef_scale * weight, f.scale, kept, block_top);
  }
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
    int64_t j = 0;
    for (; j + W <= a.vocab; j += W) store(out + j, entry(load(row + j)));
    if (j < a.vocab) store_part(out + j, a.vocab - j, entry(load_part(row + j, a.vocab - j, -kInf)));
    store_part(out + y, 1, splat((float)((double)a.coef[i] * f.scale * slope * -expm1((double)a.logp[i]))));
  }
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

}  // namespace GFAST_ISA_NS
}  // namespace gfast
