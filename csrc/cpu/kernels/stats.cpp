// What a row of logits is like: its largest entries, its mean, the entropy of its softmax; and the gradient of all of it.
//
// A row is read block by block: first for the largest entries and the mean, then, while the cache holds the block, for what
// takes exps. These are relative to the maximum so far; sums are brought to a greater one as a whole.
#include <cmath>
#include <limits>
#include <type_traits>

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

// The sum of z' over a block of a row, whose largest entries are seen. Entries are read two vectors at a time, in whatever
// order that gives them, and again in the order of columns where one of them is among the largest.
template <typename T, Map map>
double read_block(const T* row, int64_t start, int64_t end, const Mapping& f, Largest& largest) {
  vf sum[4]{};
  int64_t j = start;
  for (; j + kGroup <= end; j += kGroup) {
    prefetch_pair(row + j);
    prefetch_pair(row + j + 2 * W);
    const Pair first = load_pair(row + j), second = load_pair(row + j + 2 * W);
    vf z[4]{first.a, first.b, second.a, second.b};
    for (int k = 0; k < 4; ++k) {
      z[k] = f.apply<map>(z[k]).value;
      sum[k] += z[k];
    }
    const bool filling = j < largest.count;
    if (!filling && !any(max(max(z[0], z[1]), max(z[2], z[3])) > splat(largest.least()))) continue;
    for (int k = 0; k < 4; ++k) {
      const vf ordered = f.apply<map>(load(row + j + k * W)).value;
      uint32_t found = filling ? (1u << (W - 1) << 1) - 1 : lanes(ordered > splat(largest.least()));
      for (; found != 0; found &= found - 1) {
        const int h = __builtin_ctz(found);
        largest.see(ordered[h], j + k * W + h);
      }
    }
  }
  for (; j < end; j += W) {
    const int64_t real = end - j < W ? end - j : W;
    const vf z = f.apply<map>(load_part(row + j, real, 0.0f)).value;
    sum[0] += select(lane_index() < (int32_t)real, z, vf{});
    for (int64_t h = 0; h < real; ++h) largest.see(z[h], j + h);
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Sums over the entries of a row so far, x = sharpness (z' - top), without the maximum's own: exp(0) = 1 would cost small
// ones their digits.
struct Sums {
  float sharpness, top = -kInf;
  double exps = 0;      // of exp(x)
  double weighted = 0;  // of x exp(x)

  double log_total() const { return log1p(exps); }       // with the maximum's own exp
  double gap() const { return -weighted / (1 + exps); }  // mean of -x under the softmax

  // What was the maximum becomes one of the others.
  void raise(float next) {
    if (next == top) return;
    const double down = sharpness * ((double)top - (double)next), factor = std::exp(down);
    weighted = factor == 0 ? 0 : factor * (weighted + down * (exps + 1));
    exps = factor == 0 ? 0 : factor * (exps + 1);
    top = next;
  }

  template <typename T, Map map>
  void add(const T* row, int64_t begin, int64_t end, const Mapping& f) {
    const vf shift = splat(top), times = splat(sharpness);
    vf e0{}, e1{}, xe0{}, xe1{};
    int64_t j = begin;
    for (; j + 2 * W <= end; j += 2 * W) {
      prefetch_pair(row + j);  // the next block
      const Pair z = load_pair(row + j);
      const vf x0 = (f.apply<map>(z.a).value - shift) * times, x1 = (f.apply<map>(z.b).value - shift) * times;
      const vf y0 = exp(x0), y1 = exp(x1);
      e0 += y0;
      e1 += y1;
      xe0 += select(y0 == 0.0f, vf{}, y0 * x0);  // x may be -inf
      xe1 += select(y1 == 0.0f, vf{}, y1 * x1);
    }
    for (; j < end; j += W) {
      const int64_t real = end - j < W ? end - j : W;
      const vf x = (f.apply<map>(load_part(row + j, real, 0.0f)).value - shift) * times;
      const vf y = select(lane_index() < (int32_t)real, exp(x), vf{});
      e0 += y;
      xe0 += select(y == 0.0f, vf{}, y * x);
    }
    exps += reduce_add(e0 + e1);
    weighted += reduce_add(xe0 + xe1);
  }

  // The entries from start to end, which have been seen.
  template <typename T, Map map>
  void add_block(const T* row, int64_t start, int64_t end, const Mapping& f, const Largest& largest) {
    raise(largest.values[0]);
    if (top == -kInf) return;  // all masked so far: nothing to add, and no maximum to subtract
    const int64_t first = largest.ids[0];
    if (first < start) return add<T, map>(row, start, end, f);
    add<T, map>(row, start, first, f);
    add<T, map>(row, first + 1, end, f);
  }
};

template <typename T, Map map>
void stat_rows_impl(const StatsArgs& a, int64_t begin, int64_t end, float*) {
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
    Sums sums{1.0f}, sharpened{a.sharpness};
    double total = 0;
    for (int64_t start = 0; start < a.vocab; start += kBlock) {
      const int64_t end = a.vocab - start < kBlock ? a.vocab : start + kBlock;
      total += read_block<T, map>(row, start, end, f, largest);
      if (a.soft) sums.add_block<T, map>(row, start, end, f, largest);
      if (a.soft && a.sharpness != 1.0f) sharpened.add_block<T, map>(row, start, end, f, largest);
    }
    if (a.sharpness == 1.0f) sharpened = sums;
    const float top = largest.values[0];
    if (top == -kInf) sums.exps = sharpened.exps = std::nan("");  // no softmax
    const double mean = total / a.vocab;
    stats[kTop] = top;
    stats[kLogTotal] = a.soft ? (float)sums.log_total() : 0.0f;
    stats[kGap] = a.soft ? (float)sums.gap() : 0.0f;
    stats[kMean] = (float)mean;
    stats[kLabel] = f.apply<map>(splat(load_one(row + y))).value[0];
    stats[kEntropy] = a.soft ? (float)(sharpened.log_total() + sharpened.gap()) : 0.0f;
    bool bad = false;  // a NaN, which no comparison sees, makes the mean one, as inf - inf does
    if (std::isnan(mean))
      for (int64_t j = 0; j < a.vocab && !bad; ++j) bad = std::isnan(f.apply<map>(splat(load_one(row + j))).value[0]);
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

  template <bool with_entropy>
  GFAST_INLINE vf at(vf value) const {
    const vf x = value - top, p = exp(x - log_total);
    if constexpr (!with_entropy) return mean - p * logp;
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
      const auto all = [&](auto entropy) {
        const auto entry = [&](vf z) {
          const Mapped mapped = f.apply<map>(z);
          const vf g = factors.soft ? factors.at<entropy.value>(mapped.value) : splat(factors.mean);
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
      };
      if (factors.entropy == 0)
        all(std::false_type{});
      else
        all(std::true_type{});
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
