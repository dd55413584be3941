// The CPU kernels alone, without torch, against fp64: what a CPU that torch is not at hand for computes. Each result may
// be at most twice as far from the truth as the literal formula in fp32, plus one rounding of its type, in the root mean
// square over some draws.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels/head.h"
#include "cpu/kernels/pack.h"
#include "cpu/kernels/rows.h"

namespace gfast::isa_default {
void logp_rows(const LogpArgs&, int64_t, int64_t, float*);
void logp_rows_grad(const GradArgs&, int64_t, int64_t, float*);
void weighted_rows(const WeightedArgs&, int64_t, int64_t, float*);
void scale_values(void*, Dtype, int64_t, int64_t, float);
void kl_rows(const KlArgs&, int64_t, int64_t, float*);
void fold_rows(const FoldArgs&, int64_t, int64_t);
void accumulate(float*, const void*, Dtype, int64_t, int64_t);
void grad_dots_block(const void*, int, const void* const*, const int*, int, int64_t, int64_t, double*, double*);
void pair_sums(const void*, const void*, bool, int64_t, int64_t, const int64_t*, int64_t, double*, int64_t, int64_t);
void pack_columns(const Factor&, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
void write_bf16(const float*, int64_t, int64_t, void*, int64_t);
}  // namespace gfast::isa_default

using namespace gfast;
namespace k = gfast::isa_default;
using Values = std::vector<double>;

constexpr int kDraws = 6;  // one draw's error is chance, fp32's too

static const char* name(Dtype t) { return t == Dtype::f32 ? "fp32" : t == Dtype::bf16 ? "bf16" : "fp16"; }
static double rounding(Dtype t) { return std::ldexp(1.0, t == Dtype::f32 ? -24 : t == Dtype::bf16 ? -8 : -11); }

// A tensor of a dtype, by bits: to and from double in plain arithmetic, nearest and to even.
struct Buffer {
  Dtype type;
  std::vector<uint16_t> halves;
  std::vector<float> floats;
  Buffer(Dtype t, size_t n) : type(t), halves(t == Dtype::f32 ? 0 : n), floats(t == Dtype::f32 ? n : 0) {}
  void* data() { return type == Dtype::f32 ? (void*)floats.data() : (void*)halves.data(); }
  size_t size() const { return floats.size() + halves.size(); }
  double get(size_t i) const {
    if (type == Dtype::f32) return floats[i];
    const uint32_t bits = halves[i];
    if (type == Dtype::bf16) {
      const uint32_t wide = bits << 16;
      float x;
      memcpy(&x, &wide, 4);
      return x;
    }
    const int exponent = bits >> 10 & 31;
    const double mantissa = bits & 1023, sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
  }
  void set(size_t i, double x) {
    if (type == Dtype::f32) {
      floats[i] = (float)x;
    } else if (type == Dtype::bf16) {
      const float single = (float)x;
      uint32_t bits;
      memcpy(&bits, &single, 4);
      halves[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    } else {
      int exponent;
      std::frexp(x, &exponent);
      const int unit = std::max(exponent - 11, -24);
      const long mantissa = std::lrint(std::ldexp(std::fabs(x), -unit));
      const uint32_t bits = mantissa ? (uint32_t)((unit + 24) << 10) + mantissa : 0;
      halves[i] = bits | (x < 0 ? 0x8000 : 0);
    }
  }
  Values all() const {
    Values out(size());
    for (size_t i = 0; i < size(); ++i) out[i] = get(i);
    return out;
  }
};

static double error(const Values& found, const Values& truth) {
  double worst = 0, top = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    if (!(std::fabs(found[i] - truth[i]) <= worst)) worst = std::fabs(found[i] - truth[i]);  // a NaN stays
    top = std::max(top, std::fabs(truth[i]));
  }
  return top > 0 ? worst / top : worst;
}

struct Errors {
  double ours, theirs, unit;  // sums of squares over the draws; one rounding
};
static std::map<std::string, Errors> errors;

static void law(const std::string& what, const Values& found, const Values& plain, const Values& truth, double unit) {
  Errors& sums = errors[what];
  sums.ours += std::pow(error(found, truth), 2), sums.theirs += std::pow(error(plain, truth), 2), sums.unit = unit;
}

static int judged() {
  int failures = 0;
  for (const auto& [what, sums] : errors) {
    const double ours = std::sqrt(sums.ours / kDraws), theirs = std::sqrt(sums.theirs / kDraws);
    if (ours <= 2 * theirs + sums.unit) continue;
    ++failures;
    printf("FAILED %s: error %.3g, fp32's %.3g, one rounding %.3g\n", what.c_str(), ours, theirs, sums.unit);
  }
  printf("%d of %zu cases failed\n", failures, errors.size());
  return failures > 0;
}

// The literal formulas in a type: F float gives what plain fp32 makes of them, double the truth.
template <typename F>
struct Softmax {
  std::vector<F> z, slope;
  F top, total;
  Softmax(const Values& x, size_t start, int64_t n, double scale, double cap) : z(n), slope(n) {
    top = -INFINITY, total = 0;
    for (int64_t j = 0; j < n; ++j) {
      const F s = (F)x[start + j] * (F)scale, t = cap > 0 ? std::tanh(s / (F)cap) : 0;
      z[j] = cap > 0 ? (F)cap * t : s;
      slope[j] = (F)scale * (cap > 0 ? 1 - t * t : 1);
      top = std::max(top, z[j]);
    }
    std::vector<F> parts(64);  // as a vectorised sum adds
    for (int64_t j = 0; j < n; ++j) parts[j % 64] += std::exp(z[j] - top);
    for (F part : parts) total += part;
  }
  F log_p(int64_t j) const { return z[j] - top - std::log(total); }
};

template <typename F>
static void weighted(const Values& x, const std::vector<int64_t>& labels, int64_t V, double scale, double cap,
                     double factor, Values& logp, Values& weight, Values& grad) {
  for (size_t i = 0; i < labels.size(); ++i) {
    if (labels[i] < 0) continue;
    const Softmax<F> s(x, i * V, V, scale, cap);
    const F lp = s.log_p(labels[i]), w = std::exp((F)0.5 * lp);
    logp[i] = lp, weight[i] = w;
    for (int64_t j = 0; j < V; ++j)
      grad[i * V + j] = (F)factor * w * ((j == labels[i]) - std::exp(s.log_p(j))) * s.slope[j];
  }
}

template <typename F>
static void divergence(const Values& x, const Values& ref, const std::vector<int64_t>& labels, int64_t V, double scale,
                       double cap, Values& kl, Values& grad) {
  for (size_t i = 0; i < labels.size(); ++i) {
    if (labels[i] < 0) continue;
    const Softmax<F> p(x, i * V, V, scale, cap), q(ref, i * V, V, scale, cap);
    F sum = 0;
    for (int64_t j = 0; j < V; ++j) {
      sum += std::exp(q.log_p(j)) * (q.log_p(j) - p.log_p(j));
      grad[i * V + j] = (std::exp(p.log_p(j)) - std::exp(q.log_p(j))) * p.slope[j];
    }
    kl[i] = sum;
  }
}

static void rows(Dtype type, int64_t V, double scale, double cap, std::mt19937& rng) {
  const int64_t N = 5;
  std::normal_distribution<double> normal;
  Buffer logits(type, N * V), ref(type, N * V), out(type, N * V);
  std::vector<int64_t> labels{0, V - 1, -100, V / 2, V / 3};
  for (int64_t i = 0; i < N * V; ++i) logits.set(i, 3 * normal(rng)), ref.set(i, 3 * normal(rng)), out.set(i, 7);
  logits.set(4 * V + labels[4], 30);  // p near 1: the signal is 1 - p
  const std::string what = std::string(name(type)) + " V " + std::to_string(V) + " scale " + std::to_string(scale) +
                           " cap " + std::to_string(cap);
  const Values x = logits.all(), r = ref.all();
  std::vector<float> scratch(scratch_floats(V)), logp(N), weight(N), stats(2 * N), coef(N), kl(N);
  Values t_logp(N), t_weight(N), t_grad(N * V), p_logp(N), p_weight(N), p_grad(N * V), t_kl(N), p_kl(N);
  weighted<double>(x, labels, V, scale, cap, 0.25, t_logp, t_weight, t_grad);
  weighted<float>(x, labels, V, scale, cap, 0.25, p_logp, p_weight, p_grad);
  const auto values = [](const std::vector<float>& some) { return Values(some.begin(), some.end()); };
  const double one = rounding(Dtype::f32), own = rounding(type);
  const Matrix z{logits.data(), V, type, (float)scale, (float)cap};
  const RowsArgs common{z, V, labels.data(), out.data(), V, false};

  k::logp_rows(LogpArgs{common, logp.data(), stats.data()}, 0, N, scratch.data());
  law("logp_rows " + what, values(logp), p_logp, t_logp, one);
  for (int64_t i = 0; i < N; ++i) coef[i] = (float)(0.25 * t_weight[i]);
  k::logp_rows_grad(GradArgs{common, logp.data(), stats.data(), coef.data()}, 0, N, scratch.data());
  law("logp_rows_grad " + what, out.all(), p_grad, t_grad, own);
  for (const bool stream : {false, true}) {
    const float factor = 0.25f;
    WeightedArgs args{common, nullptr, 1.0f, 0.5f, 0.0f, 0.0f, &factor, 0, logp.data(), weight.data()};
    args.stream = stream;
    for (int64_t i = 0; i < N * V; ++i) out.set(i, 7);
    k::weighted_rows(args, 0, N, scratch.data());
    const std::string what_now = what + (stream ? " streamed" : "");
    law("weighted_rows logp " + what_now, values(logp), p_logp, t_logp, one);
    law("weighted_rows weight " + what_now, values(weight), p_weight, t_weight, one);
    law("weighted_rows grad " + what_now, out.all(), p_grad, t_grad, own);
  }

  Values state(3 * N, 0.0), p_state, t_state;
  for (int64_t i = 0; i < N; ++i) state[i] = -INFINITY, labels[i] = std::max<int64_t>(labels[i], 0);
  const int64_t half = V / 2;
  for (const auto& [first, width] : {std::pair{int64_t{0}, half}, std::pair{half, V - half}}) {
    char* start = (char*)logits.data() + first * (type == Dtype::f32 ? 4 : 2);
    if (width > 0)
      k::fold_rows(FoldArgs{{start, V, type, (float)scale, (float)cap}, width, N, first, labels.data(), state.data()}, 0, N);
  }
  Values folded(N), p_fold(N), t_fold(N);
  for (int64_t i = 0; i < N; ++i) {
    const double top = std::max(state[i], state[2 * N + i]);
    folded[i] = top + std::log(state[N + i] * std::exp(state[i] - top) + std::exp(state[2 * N + i] - top)) - state[2 * N + i];
    t_fold[i] = -Softmax<double>(x, i * V, V, scale, cap).log_p(labels[i]);
    p_fold[i] = -Softmax<float>(x, i * V, V, scale, cap).log_p(labels[i]);
  }
  law("fold_rows " + what, folded, p_fold, t_fold, one);
  labels[2] = -100;

  Values t_kl_grad(N * V), p_kl_grad(N * V);
  divergence<double>(x, r, labels, V, scale, cap, t_kl, t_kl_grad);
  divergence<float>(x, r, labels, V, scale, cap, p_kl, p_kl_grad);
  KlArgs args{};
  args.logits = z, args.ref = {ref.data(), V, type, (float)scale, (float)cap};
  args.vocab = V, args.labels = labels.data(), args.coef_scale = 1, args.kl = kl.data();
  args.out = out.data(), args.out_stride = V;
  k::kl_rows(args, 0, N, scratch.data());
  law("kl_rows " + what, values(kl), p_kl, t_kl, one);
  law("kl_rows grad " + what, out.all(), p_kl_grad, t_kl_grad, own);

  if (cap > 0 || scale != 1) return;
  Values t_scaled = x, p_sum(N * V), t_sum(N * V);
  std::vector<float> total(N * V, 0.5f);
  if (type != Dtype::f32) {
    k::accumulate(total.data(), logits.data(), type, 0, N * V);
    for (int64_t i = 0; i < N * V; ++i) t_sum[i] = 0.5 + x[i], p_sum[i] = (float)t_sum[i];
    law("accumulate " + what, values(total), p_sum, t_sum, one);
  }
  for (double& value : t_scaled) value *= 0.3f;
  k::scale_values(logits.data(), type, 0, N * V, 0.3f);
  law("scale_values " + what, logits.all(), t_scaled, t_scaled, own);
}

static void dots(std::mt19937& rng) {
  std::normal_distribution<double> normal;
  for (const int64_t n : {1, 63, 1000, 16384})
    for (const Dtype a : {Dtype::f32, Dtype::bf16, Dtype::f16})
      for (const Dtype b : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
        Buffer x(a, n), y(b, n);
        for (int64_t i = 0; i < n; ++i) x.set(i, normal(rng)), y.set(i, normal(rng));
        const void* ys[] = {y.data()};
        const int y_type = (int)b;
        double lanes[64], found[2];
        k::grad_dots_block(x.data(), (int)a, ys, &y_type, 1, 0, n, lanes, found);
        double dot = 0, square = 0, size = 0;
        for (int64_t i = 0; i < n; ++i) dot += x.get(i) * y.get(i), square += x.get(i) * x.get(i), size += std::fabs(x.get(i) * y.get(i));
        law("grad_dots " + std::to_string(n) + " " + name(a) + " " + name(b), {(found[0] - dot) / size, found[1] / square - 1}, {0, 0}, {0, 0}, 4 * rounding(Dtype::f32));
      }
  const std::vector<int64_t> bounds{0, 3, 3, 40, 77};
  std::vector<float> x(77), y(77);
  Values found(4), truth(4);
  for (int i = 0; i < 77; ++i) x[i] = (float)normal(rng), y[i] = (float)normal(rng);
  for (int run = 0; run < 4; ++run)
    for (int64_t i = bounds[run]; i < bounds[run + 1]; ++i) truth[run] += (double)x[i] * y[i];
  k::pair_sums(x.data(), y.data(), false, 1, 1, bounds.data(), 4, found.data(), 0, 1);
  law("pair_sums", found, truth, truth, 4 * rounding(Dtype::f32));
}

static void panels(std::mt19937& rng) {
  std::normal_distribution<double> normal;
  const int64_t rows = 50, depth = 21, stride = 37;
  for (const Dtype type : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    Buffer x(type, rows * stride);
    for (int64_t i = 0; i < rows * stride; ++i) x.set(i, normal(rng));
    std::vector<float> out(depth * kPanel, 7.0f);
    k::pack_columns(Factor{x.data(), stride, type}, 0, rows, 5, depth, out.data(), kPanel);
    Values truth(depth * kPanel);
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t row = 0; row < rows; ++row) truth[d * kPanel + row] = x.get(row * stride + 5 + d);
    law(std::string("pack_columns ") + name(type), Values(out.begin(), out.end()), truth, truth, 0);
  }
  std::vector<float> x(3 * kPanel);
  Buffer out(Dtype::bf16, 3 * kPanel), rounded(Dtype::bf16, 3 * kPanel);
  for (int64_t i = 0; i < 3 * kPanel; ++i) x[i] = (float)normal(rng), rounded.set(i, x[i]), out.set(i, x[i]);
  k::write_bf16(x.data(), 3, kPanel - 3, out.data(), kPanel);
  law("write_bf16", out.all(), rounded.all(), rounded.all(), 0);
}

int main() {
  for (int draw = 0; draw < kDraws; ++draw) {
    std::mt19937 rng(draw);
    for (const Dtype type : {Dtype::f32, Dtype::bf16, Dtype::f16})
      for (const int64_t V : {1, 7, 33, 2048, 4999})
        for (const auto& [scale, cap] : {std::pair{1.0, 0.0}, std::pair{0.5, 0.0}, std::pair{1.0, 5.0}})
          rows(type, V, scale, cap, rng);
    dots(rng);
    panels(rng);
  }
  return judged();
}
