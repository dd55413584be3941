// What a row of logits is like: its largest entries, its mean, the entropy of its softmax; and the gradient of all of it.
//
// A row is read from memory once. What takes exps comes in a second walk over what the cache then holds, when the maximum
// is known: nothing is rescaled, and without the maximum's own exp, which is 1, the sum of the others keeps its digits.
#include <cmath>
#include <limits>

#include "cpu/kernels/map.h"

namespace gfast {
namespace GFAST_ISA_NS {
namespace {

constexpr int64_t kGroup = 4 * W;

// The largest entries so far, in order; of equal ones the first column comes first.
struct Largest {
  float* values;
  int64_t* ids;
  int64_t count;

  float least() const { return values[count - 1]; }

  void insert(float z, int64_t j, int64_t filled) {
    int64_t k = filled;
    for (; k > 0 && values[k - 1] < z; --k) {
      values[k] = values[k - 1];
      ids[k] = ids[k - 1];
    }
    values[k] = z;
    ids[k] = j;
  }

  // Entry j, columns in their order.
  void see(float z, int64_t j) {
    if (j < count)
      insert(z, j, j);
    else if (z > least())
      insert(z, j, count - 1);
  }
};

// The mean of z' over a row; its largest entries; and z' in `values`, unless that is the row itself.
template <typename T, Map map>
double read_row(const T* row, int64_t vocab, const Mapping& f, float* values, Largest& largest) {
  const bool copies = (const void*)values != (const void*)row;
  double total = 0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    vf sum[4]{};
    int64_t j = 0;
    for (; j + kGroup <= n; j += kGroup) {
      vf z[4];
      for (int k = 0; k < 4; ++k) {
        z[k] = f.apply<map>(load(row + start + j + k * W)).value;
        if (copies) store(values + start + j + k * W, z[k]);
        sum[k] += z[k];
      }
      const int64_t at = start + j;
      if (at < largest.count || any(max(max(z[0], z[1]), max(z[2], z[3])) > splat(largest.least()))) {
        for (int k = 0; k < 4; ++k) {
          if (at >= largest.count && !any(z[k] > splat(largest.least()))) continue;
          float entries[W];
          store(entries, z[k]);
          for (int h = 0; h < W; ++h) largest.see(entries[h], at + k * W + h);
        }
      }
    }
    for (; j < n; j += W) {
      const int64_t real = n - j < W ? n - j : W;
      const vf z = f.apply<map>(load_part(row + start + j, real, 0.0f)).value;
      if (copies) store(values + start + j, z);
      sum[0] += select(lane_index() < (int32_t)real, z, vf{});
      for (int64_t h = 0; h < real; ++h) largest.see(z[h], start + j + h);
    }
    total += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return total / vocab;
}

struct Sums {
  double exps = 0;      // of exp(x), x = sharpness (z' - top) <= 0
  double weighted = 0;  // of x exp(x)

  double log_total() const { return log1p(exps); }                 // with the maximum's own exp
  double gap() const { return -weighted / (1 + exps); }            // mean of -x under the softmax
};

// Adds the entries from `begin` to `end`.
void add_exps(const float* z, int64_t begin, int64_t end, float top, float sharpness, Sums& sums) {
  const vf shift = splat(top);
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = end - start < kBlock ? end : start + kBlock;
    vf exps[2]{}, weighted[2]{};
    const auto one = [&](vf entry, int64_t real, int k) {
      const vf x = (entry - shift) * sharpness;
      vf e = exp(x);
      if (real < W) e = select(lane_index() < (int32_t)real, e, vf{});
      exps[k] += e;
      weighted[k] += select(e == 0.0f, vf{}, e * x);  // x may be -inf
    };
    int64_t j = start;
    for (; j + 2 * W <= stop; j += 2 * W) {
      one(load(z + j), W, 0);
      one(load(z + j + W), W, 1);
    }
    for (; j < stop; j += W) {
      const int64_t real = stop - j < W ? stop - j : W;
      one(load_part(z + j, real, 0.0f), real, 0);
    }
    sums.exps += reduce_add(exps[0] + exps[1]);
    sums.weighted += reduce_add(weighted[0] + weighted[1]);
  }
}

Sums sums_of(const float* z, int64_t vocab, int64_t first, float top, float sharpness) {
  Sums sums;
  add_exps(z, 0, first, top, sharpness, sums);
  add_exps(z, first + 1, vocab, top, sharpness, sums);
  return sums;
}

template <typename T, Map map>
void stat_rows_impl(const StatsArgs& a, int64_t begin, int64_t end, float* scratch) {
  const Mapping f(a.logits);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = a.labels[i];
    float* stats = a.stats + kStats * i;
    Largest largest{a.values + a.top * i, a.ids + a.top * i, a.top};
    if (y < 0) {
      for (int k = 0; k < kStats; ++k) stats[k] = 0;
      for (int64_t k = 0; k < a.top; ++k) largest.values[k] = largest.ids[k] = 0;
      continue;
    }
    const T* row = (const T*)a.logits.data + i * a.logits.stride;
    float* values = scratch;
    if constexpr (sizeof(T) == sizeof(float) && map == Map::identity) values = const_cast<T*>(row);  // is not written to
    const double mean = read_row<T, map>(row, a.vocab, f, values, largest);
    const float top = largest.values[0];
    Sums sums, sharpened;
    if (a.soft) {
      sums = sums_of(values, a.vocab, largest.ids[0], top, 1.0f);
      sharpened = a.sharpness == 1.0f ? sums : sums_of(values, a.vocab, largest.ids[0], top, a.sharpness);
    }
    stats[kTop] = top;
    stats[kLogTotal] = a.soft ? (float)sums.log_total() : 0.0f;
    stats[kGap] = a.soft ? (float)sums.gap() : 0.0f;
    stats[kMean] = (float)mean;
    stats[kLabel] = values[y];
    stats[kEntropy] = a.soft ? (float)(sharpened.log_total() + sharpened.gap()) : 0.0f;
    bool bad = false;  // a NaN, which no comparison sees, makes the mean one, as inf - inf does
    if (std::isnan(mean))
      for (int64_t j = 0; j < a.vocab && !bad; ++j) bad = std::isnan(values[j]);
    if (bad) {
      for (int k = 0; k < kStats; ++k) stats[k] = std::numeric_limits<float>::quiet_NaN();
      for (int64_t k = 0; k < a.top; ++k) largest.values[k] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// Factors of a row's outputs, and what an entry of its gradient is made of: p (-logp - entropy (x + gap)) + mean,
// x = z' - top.
struct Factors {
  float logp, entropy, mean;  // mean: by the vocabulary
  float top, log_total, gap;
  bool soft;

  explicit Factors(const StatsGradArgs& a, int64_t i) {
    const float *dense = a.dense + 3 * i, *stats = a.stats + kStats * i;
    soft = a.soft;
    logp = dense[0];
    entropy = dense[1];
    mean = (float)(dense[2] / (double)a.vocab);
    top = stats[kTop];
    log_total = stats[kLogTotal];
    gap = stats[kGap];
  }

  double at(double value, bool label) const {
    if (!soft) return mean;
    const double x = value - top, log_p = x - log_total, p = std::exp(log_p);
    const double from_logp = label ? -expm1(log_p) : -p;
    return logp * from_logp - (p == 0 ? 0 : entropy * p * (x + gap)) + mean;
  }

  GFAST_INLINE vf at(vf value) const {
    const vf x = value - top, p = exp(x - log_total);
    return select(p == 0.0f, splat(mean), mean - p * (logp + entropy * (x + gap)));
  }
};

template <typename T>
void fill(T* out, int64_t n, float value, bool stream) {
  const Pair both{splat(value), splat(value)};
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) stream ? stream_pair(out + j, both) : store_pair(out + j, both);
  if (j < n) store_pair_part(out + j, n - j, both);
}

template <typename T, Map map>
void stat_rows_grad_impl(const StatsGradArgs& a, int64_t begin, int64_t end, float*) {
  const Mapping f(a.logits);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t y = a.labels[i];
    T* out = (T*)a.out + i * a.out_stride;
    const bool stream = a.stream && can_stream(out);
    if (y < 0) {
      fill(out, a.vocab, 0.0f, stream);
      continue;
    }
    const T* row = (const T*)a.logits.data + i * a.logits.stride;
    const Factors factors(a, i);
    // Single entries, the label's last, before the row may be written over; columns that come twice get the same sum.
    float entries[kMostTop + 2];
    for (int64_t k = 0; k <= a.count; ++k) {
      const int64_t column = k < a.count ? a.columns[a.count * i + k] : y;
      const Mapped z = f.apply<map>(splat(load_one(row + column)));
      double entry = factors.at(z.value[0], column == y);
      for (int64_t h = 0; h < a.count; ++h)
        if (a.columns[a.count * i + h] == column) entry += a.adds[a.count * i + h];
      entries[k] = (float)(entry * f.scale * z.slope[0]);
    }
    if (map != Map::capped && !factors.soft) {
      fill(out, a.vocab, factors.mean * f.scale, stream);
    } else {
      const auto entry = [&](vf z) {
        const Mapped mapped = f.apply<map>(z);
        const vf g = factors.soft ? factors.at(mapped.value) : splat(factors.mean);
        return g * f.scale * mapped.slope;
      };
      int64_t j = 0;
      for (; j + 2 * W <= a.vocab; j += 2 * W) {
        prefetch_pair(row + j);
        const Pair z = load_pair(row + j), g{entry(z.a), entry(z.b)};
        stream ? stream_pair(out + j, g) : store_pair(out + j, g);
      }
      if (j < a.vocab) {
        const Pair z = load_pair_part(row + j, a.vocab - j);
        store_pair_part(out + j, a.vocab - j, {entry(z.a), entry(z.b)});
      }
    }
    for (int64_t k = 0; k <= a.count; ++k)
      store_part(out + (k < a.count ? a.columns[a.count * i + k] : y), 1, splat(entries[k]));
  }
  end_stream();
}

}  // namespace

void stat_rows(const StatsArgs& a, int64_t begin, int64_t end, float* scratch) {
  dispatch(a.logits, [&](auto t, auto m) { stat_rows_impl<decltype(t), m.value>(a, begin, end, scratch); });
}

void stat_rows_grad(const StatsGradArgs& a, int64_t begin, int64_t end, float* scratch) {
  dispatch(a.logits, [&](auto t, auto m) { stat_rows_grad_impl<decltype(t), m.value>(a, begin, end, scratch); });
}

}  // namespace GFAST_ISA_NS
}  // namespace gfast
