// KL(ref || model) of each row, or another divergence, and its gradient. The vocabulary sum is taken over
//     p - q + q (log q - log p) = q (exp(-d) - 1 + d),  d = log q - log p,
// which adds sum(p) - sum(q) = 0 and makes every term nonnegative: a small KL keeps its relative accuracy, and an error
// in d counts only in second order.
#include <cmath>

#include "cpu/kernels/map.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

struct Softmax {
  float top;
  double total;  // of exp(z' - top)
};

// Writes z' of a row to `values` (filled to whole vectors with -inf) and, for a softcap, dz'/dz / scale to `slopes` where
// that is not null; returns the maximum and the sum. With `lowered`, `by` is taken off entry y before anything else.
template <typename T, Map map, bool lowered>
Softmax read_row(const void* data, int64_t vocab, const Mapping& f, float* values, float* slopes, int64_t y, float by) {
  const T* row = (const T*)data;
  float top = -kInf;
  double total = 0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const float before = top;
    const int64_t at = y - start;  // the label's place in this block
    const bool here = lowered && at >= 0 && at < n;
    float block_top;
    if (here) {  // the others' maximum may lie far below the label's z', and its digits with it
      const float raw[2] = {f.block_max<map>(row + start, at), f.block_max<map>(row + y + 1, n - at - 1)};
      const float others = f.finish<map>(splat(raw[0] > raw[1] ? raw[0] : raw[1])).value[0];
      const float own = f.apply<map>(splat(load_one(row + y))).value[0] - by;
      block_top = others > own ? others : own;
    } else {
      block_top = f.finish<map>(splat(f.block_max<map>(row + start, n))).value[0];
    }
    if (block_top > top) {
      top = block_top;
      if (total != 0) total *= std::exp((double)before - (double)top);
    }
    const vf shift = splat(top == -kInf ? 0.0f : top);
    // Compensated: p - q cancels most of what is common to all entries, but not an error of the total. Two sums, as
    // each waits four additions long for its last.
    vf sum[2]{}, lost[2]{};
    const auto visit = [&](vf z, int64_t j, int64_t real, int k) {
      const Mapped x = f.apply<map>(z);
      if (map == Map::capped && slopes != nullptr) store(slopes + start + j, x.slope);
      // softcap has made the filling finite
      vf value = real < W ? select(lane_index() < (int32_t)real, x.value, splat(-kInf)) : x.value;
      if (lowered && here && j <= at && at < j + W) value = select(lane_index() == (int32_t)(at - j), value - by, value);
      store(values + start + j, value);
      const vf e = exp(value - shift) - lost[k];
      const vf next = sum[k] + e;
      lost[k] = (next - sum[k]) - e;
      sum[k] = next;
    };
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) {
      prefetch_pair(row + start + j);
      visit(load(row + start + j), j, W, 0);
      visit(load(row + start + j + W), j + W, W, 1);
    }
    for (; j < n; j += W) {
      const int64_t real = n - j < W ? n - j : W;
      visit(real < W ? load_part(row + start + j, real, -kInf) : load(row + start + j), j, real, 0);
    }
    for (int k = 0; k < 2; ++k)
      for (int i = 0; i < W; ++i) total += (double)sum[k][i] - (double)lost[k][i];
  }
  return {top, total};
}

using Reader = Softmax (*)(const void*, int64_t, const Mapping&, float*, float*, int64_t, float);

Reader pick_reader(const Matrix& m, bool lowered) {
  Reader reader = nullptr;
  dispatch(m, [&](auto t, auto map) {
    reader = lowered ? &read_row<decltype(t), map.value, true> : &read_row<decltype(t), map.value, false>;
  });
  return reader;
}

template <typename T>
void write_row(void* out, const float* values, int64_t n) {
  int64_t j = 0;
  for (; j + W <= n; j += W) store((T*)out + j, load(values + j));
  if (j < n) store_part((T*)out + j, n - j, load_part(values + j, n - j, 0.0f));
}

// a - b and what its rounding lost; of an infinite one nothing.
struct Difference {
  vf value, lost;
};

GFAST_INLINE Difference subtract(vf a, vf b) {
  const vf value = a - b, back = value - a;
  return {value, select(value > -kInf, (a - (value - back)) - (b + back), vf{})};
}

using Writer = void (*)(void*, const float*, int64_t);

// The row's KL, or with `cross` its cross-entropy; where grad is not null, it gets coef (p - q) slope (no slopes: 1) and
// may be p's values.
template <bool cross>
double row_kl(float* zp, float* zq, const float* slopes, int64_t vocab, Softmax sp, Softmax sq,
              float coef, float* grad) {
  const vf top_p = splat(sp.top), top_q = splat(sq.top);
  const vf inverse_p = splat((float)(1 / sp.total)), inverse_q = splat((float)(1 / sq.total));
  const vf log_ratio = splat((float)log(sq.total / sp.total)), log_total = splat((float)log(sq.total));
  double kl = 0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t end = vocab - start < kBlock ? vocab : start + kBlock;
    vf sum{};
    for (int64_t j = start; j < end; j += W) {
      const Difference xp = subtract(load(zp + j), top_p), xq = subtract(load(zq + j), top_q);
      const vf p = exp(xp.value) * inverse_p, q = exp(xq.value) * inverse_q;
      const vf d = (xq.value - xp.value) + ((xq.lost - xp.lost) - log_ratio);
      const vi near = (d < 0.34f) & (d > -0.34f);
      const vf bend = (d * d) * exp_tail(-d);  // exp(-d) - 1 + d
      vf term = select(near, q * bend, (p - q) + q * d);
      term = select(q == 0.0f, p, term);
      if (cross) term += select(q == 0.0f, vf{}, q * ((log_total - xq.value) - xq.lost));
      sum += term;
      if (grad != nullptr) {
        vf g = select(near, q * (bend - d), p - q) * coef;  // where p is close to q, not by subtracting them
        if (slopes != nullptr) g = g * load(slopes + j);
        store(grad + j, g);
      }
    }
    kl += reduce_add(sum);
  }
  return kl;
}

// 2 atanh(t) for 0 <= t < 0.263 to 5e-9, beside which log 2 stands where it is used.
GFAST_INLINE vf twice_atanh(vf t) {
  const vf t2 = t * t;
  const vf tail = (((t2 * (1.0f / 11) + 1.0f / 9) * t2 + 1.0f / 7) * t2 + 1.0f / 5) * t2 + 1.0f / 3;
  const vf twice = t + t;
  return twice + twice * (t2 * tail);
}

// The row's Jensen-Shannon divergence, with m = (p + q) / 2 and d = log q - log p:
//     sum_v (p log(p/m) + q log(q/m)) / 2,   log(p/m) = -x - log cosh x,  log(q/m) = x - log cosh x,  x = d/2.
// Where p is close to q, both terms together are (p + q) (x tanh x - log cosh x): no difference of p and q is formed.
// Its gradient is p (h - sum(p h)) with h = log(p/m) / 2; zp and zq are overwritten with p h and p on the way.
double row_js(float* zp, float* zq, const float* slopes, int64_t vocab, Softmax sp, Softmax sq, float coef,
              float* grad) {
  const vf top_p = splat(sp.top), top_q = splat(sq.top);
  const vf inverse_p = splat((float)(1 / sp.total)), inverse_q = splat((float)(1 / sq.total));
  const vf log_ratio = splat((float)log(sq.total / sp.total)), log2 = splat((float)M_LN2);
  double value = 0, mean = 0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t end = vocab - start < kBlock ? vocab : start + kBlock;
    vf sum{}, weighted{};
    for (int64_t j = start; j < end; j += W) {
      const Difference xp = subtract(load(zp + j), top_p), xq = subtract(load(zq + j), top_q);
      const vf p = exp(xp.value) * inverse_p, q = exp(xq.value) * inverse_q;
      const vf d = (xq.value - xp.value) + ((xq.lost - xp.lost) - log_ratio);
      const vi near = (d < 0.34f) & (d > -0.34f);
      const vf x = d * 0.5f, x2 = x * x;
      const vf bend = x2 * (((x2 * (-17.0f / 2520) + 1.0f / 45) * x2 - 1.0f / 12) * x2 + 0.5f);  // log cosh x
      const vf both = x2 * (((x2 * (-17.0f / 360) + 1.0f / 9) * x2 - 0.25f) * x2 + 0.5f);  // x tanh x - log cosh x
      const vi above = d > 0.0f;  // q > p
      const vf least = select(above, p, q), most = select(above, q, p);
      const vf fall = twice_atanh(least / (most + most + least));  // log(1 + least / most)
      const vf log_pm = select(near, -x - bend, log2 - (select(above, d, vf{}) + fall));
      const vf log_qm = log2 - (select(above, vf{}, -d) + fall);
      const vf of_p = select(p == 0.0f, p, p * log_pm), of_q = select(q == 0.0f, q, q * log_qm);
      sum += select(near, (p + q) * both, of_p + of_q);
      weighted += of_p;
      store(zp + j, of_p * 0.5f);
      store(zq + j, p);
    }
    value += 0.5 * reduce_add(sum);
    mean += 0.5 * reduce_add(weighted);
  }
  const vf center = splat((float)mean);
  for (int64_t j = 0; grad != nullptr && j < vocab; j += W) {
    vf g = (load(zp + j) - load(zq + j) * center) * coef;
    if (slopes != nullptr) g = g * load(slopes + j);
    store(grad + j, g);
  }
  return value;
}

}  // namespace

void kl_rows(const KlArgs& a, int64_t begin, int64_t end, float* scratch) {
  const Mapping fp(a.logits), fq(a.ref);
  const Reader read_p = pick_reader(a.logits, false), read_q = pick_reader(a.ref, a.lower != nullptr);
  const Writer write = a.logits.dtype == Dtype::f32    ? &write_row<float>
                       : a.logits.dtype == Dtype::bf16 ? &write_row<bf16>
                                                       : &write_row<f16>;
  const int64_t size = a.logits.dtype == Dtype::f32 ? 4 : 2, ref_size = a.ref.dtype == Dtype::f32 ? 4 : 2;
  const int64_t room = row_floats(a.vocab);
  float *zp = scratch, *zq = zp + room, *slopes = a.logits.softcap > 0 ? zq + room : nullptr;
  for (int64_t i = begin; i < end; ++i) {
    char* out = (char*)a.out + i * a.out_stride * size;
    if (a.kl != nullptr) a.kl[i] = 0;
    if (a.labels[i] < 0) {
      for (int k = 0; a.totals != nullptr && k < 4; ++k) a.totals[4 * i + k] = k % 2;
      if (a.out != nullptr) memset(out, 0, a.vocab * size);
      continue;
    }
    Softmax sp = read_p((const char*)a.logits.data + i * a.logits.stride * size, a.vocab, fp, zp, slopes, -1, 0.0f);
    Softmax sq = read_q((const char*)a.ref.data + i * a.ref.stride * ref_size, a.vocab, fq, zq, nullptr, a.labels[i],
                        a.lower != nullptr ? a.lower[i] : 0.0f);
    if (a.totals != nullptr) {
      const double found[4] = {sp.top, sp.total, sq.top, sq.total};
      memcpy(a.totals + 4 * i, found, sizeof found);
    }
    if (a.given != nullptr) {
      const double* t = a.given + 4 * i;
      sp = {(float)t[0], t[1]};
      sq = {(float)t[2], t[3]};
    }
    float* grad = a.out != nullptr ? zp : nullptr;
    const auto row = a.kind == Divergence::js ? &row_js
                     : a.kind == Divergence::kl ? &row_kl<false>
                                                : &row_kl<true>;
    const double kl = row(zp, zq, slopes, a.vocab, sp, sq, a.coef_scale * fp.scale, grad);
    if (a.kl != nullptr) a.kl[i] = (float)kl;
    if (a.out != nullptr) write(out, zp, a.vocab);
  }
}

}  // namespace GFAST_ISA_NS
}  // namespace gfast
