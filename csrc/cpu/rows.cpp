// CPU implementations of logp_rows, logp_rows_grad, weighted_rows, the KL ops and the statistics of rows: checks, then the
// kernels over rows.
#include "cpu/kernels/rows.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gfast {

GFAST_DECLARE_KERNEL(void, logp_rows, (const LogpArgs&, int64_t, int64_t, float*))
GFAST_DECLARE_KERNEL(void, logp_rows_grad, (const GradArgs&, int64_t, int64_t, float*))
GFAST_DECLARE_KERNEL(void, weighted_rows, (const WeightedArgs&, int64_t, int64_t, float*))
GFAST_DECLARE_KERNEL(void, scale_values, (void*, Dtype, int64_t, int64_t, float))
GFAST_DECLARE_KERNEL(void, kl_rows, (const KlArgs&, int64_t, int64_t, float*))
GFAST_DECLARE_KERNEL(void, stat_rows, (const StatsArgs&, int64_t, int64_t, float*))
GFAST_DECLARE_KERNEL(void, stat_rows_grad, (const StatsGradArgs&, int64_t, int64_t, float*))

namespace {

using at::Tensor;

template <typename Kernel, typename Args>
void run(Kernel kernel, const Args& args, int64_t rows) {
  if (rows == 0) return;
  for_rows(rows, args.vocab, [&](int64_t begin, int64_t end, float* scratch) { kernel(args, begin, end, scratch); });
}

// Outputs of at least this size are written around the caches: they would not stay there until they are read. Not so
// fresh memory: the system zeroes each page at its first store, which leaves it in the cache.
bool streams(const Tensor& out, const Tensor& logits) {
  constexpr size_t large = size_t{32} << 20;
  return out.const_data_ptr() != logits.const_data_ptr() && out.nbytes() >= large && is_mapped(out);
}

template <typename Args>
void set_out(const char* op, Args& args, const Tensor& out, const Tensor& logits, std::initializer_list<Named> inputs) {
  check_out(op, out, logits, inputs);
  advise_huge_pages(out);
  args.out = out.mutable_data_ptr();
  args.out_stride = row_stride(out);
}

std::tuple<Tensor, Tensor> logp_rows_cpu(const Tensor& logits, const Tensor& labels, double scale, double softcap) {
  LogpArgs args{};
  args.logits = check_matrix("logp_rows", "logits", logits, scale, softcap);
  args.vocab = logits.size(1);
  const int64_t rows = logits.size(0);
  const Tensor y = check_labels("logp_rows", labels, rows, args.vocab);
  args.labels = y.const_data_ptr<int64_t>();
  Tensor logp = at::empty({rows}, at::kFloat), stats = at::empty({rows, 2}, at::kFloat);
  args.logp = logp.mutable_data_ptr<float>();
  args.stats = stats.mutable_data_ptr<float>();
  run(GFAST_KERNEL(logp_rows), args, rows);
  return {logp, stats};
}

void logp_rows_grad_cpu(const Tensor& logits, const Tensor& labels, const Tensor& logp, const Tensor& stats,
                        const Tensor& coef, double scale, double softcap, Tensor out) {
  const char* op = "logp_rows_grad";
  GradArgs args{};
  args.logits = check_matrix(op, "logits", logits, scale, softcap);
  args.vocab = logits.size(1);
  const int64_t rows = logits.size(0);
  const Tensor y = check_labels(op, labels, rows, args.vocab), p = check_values(op, "logp", logp, rows),
               s = check_values(op, "stats", stats, rows, 2), c = check_values(op, "coef", coef, rows);
  args.labels = y.const_data_ptr<int64_t>();
  args.logp = p.const_data_ptr<float>();
  args.stats = s.const_data_ptr<float>();
  args.coef = c.const_data_ptr<float>();
  set_out(op, args, out, logits, {{"labels", labels}, {"logp", logp}, {"stats", stats}, {"coef", coef}});
  args.stream = streams(out, logits);
  run(GFAST_KERNEL(logp_rows_grad), args, rows);
}

std::tuple<Tensor, Tensor> weighted_rows_cpu(const Tensor& logits, const Tensor& labels,
                                             const std::optional<Tensor>& ref_logp, double sign, double p_pow,
                                             double q_pow, double beta, const Tensor& coef_scale, double scale,
                                             double softcap, std::optional<Tensor> out) {
  const char* op = "weighted_rows";
  WeightedArgs args{};
  args.logits = check_matrix(op, "logits", logits, scale, softcap);
  args.vocab = logits.size(1);
  const int64_t rows = logits.size(0);
  const Tensor y = check_labels(op, labels, rows, args.vocab);
  args.labels = y.const_data_ptr<int64_t>();
  args.sign = check_number(op, "sign", sign);
  args.p_pow = check_number(op, "p_pow", p_pow);
  args.q_pow = check_number(op, "q_pow", q_pow);
  args.beta = check_number(op, "beta", beta);
  TORCH_CHECK_VALUE(beta >= 0, "gfast: weighted_rows: beta must not be negative, it is ", beta);
  Tensor ref;
  if (beta > 0) {
    TORCH_CHECK_VALUE(ref_logp.has_value(), "gfast: weighted_rows: beta = ", beta,
                      " weighs tokens against a reference model, so ref_logp is needed");
    ref = check_values(op, "ref_logp", *ref_logp, rows);
    args.ref_logp = ref.const_data_ptr<float>();
  }
  Tensor coef = coef_scale;
  if (coef_scale.dim() > 0)
    coef = check_values(op, "coef_scale", coef_scale, rows), args.coef_stride = 1;
  else
    check_scalar(op, "coef_scale", coef_scale);
  args.coef_scale = coef.const_data_ptr<float>();
  if (out.has_value()) {
    set_out(op, args, *out, logits,
            {{"labels", labels}, {"ref_logp", ref_logp.value_or(Tensor())}, {"coef_scale", coef_scale}});
    args.stream = streams(*out, logits);
  }
  Tensor logp = at::empty({rows}, at::kFloat), weight = at::empty({rows}, at::kFloat);
  args.logp = logp.mutable_data_ptr<float>();
  args.weight = weight.mutable_data_ptr<float>();
  run(GFAST_KERNEL(weighted_rows), args, rows);
  return {logp, weight};
}

// 1 / max(1, labels that count), 0-dim, of labels that are all in range.
Tensor label_factor_cpu(std::string_view op, const Tensor& labels, int64_t vocab) {
  const int64_t count = count_labels(std::string(op).c_str(), labels, vocab).count;
  Tensor factor = at::empty({}, at::kFloat);
  *factor.mutable_data_ptr<float>() = 1.0f / static_cast<float>(std::max<int64_t>(count, 1));
  return factor;
}

// The arguments all KL ops share; `y` keeps the labels alive.
KlArgs kl_args(const char* op, const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, double scale,
               double softcap, double ref_scale, double ref_softcap, Tensor& y) {
  KlArgs args{};
  args.logits = check_matrix(op, "logits", logits, scale, softcap);
  args.ref = check_matrix(op, "ref_logits", ref_logits, ref_scale, ref_softcap);
  TORCH_CHECK_VALUE(ref_logits.sizes() == logits.sizes(), "gfast: ", op, ": ref_logits must have the shape of logits ",
                    logits.sizes(), ", not ", ref_logits.sizes());
  args.vocab = logits.size(1);
  y = check_labels(op, labels, logits.size(0), args.vocab);
  args.labels = y.const_data_ptr<int64_t>();
  return args;
}

Tensor kl_rows_cpu(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, const Tensor& coef_scale,
                   double scale, double softcap, double ref_scale, double ref_softcap, std::optional<Tensor> out) {
  const char* op = "kl_rows";
  Tensor y;
  KlArgs args = kl_args(op, logits, ref_logits, labels, scale, softcap, ref_scale, ref_softcap, y);
  args.coef_scale = check_scalar(op, "coef_scale", coef_scale);
  if (out.has_value()) {
    set_out(op, args, *out, logits, {{"labels", labels}, {"ref_logits", ref_logits}});
  }
  Tensor kl = at::empty({logits.size(0)}, at::kFloat);
  args.kl = kl.mutable_data_ptr<float>();
  run(GFAST_KERNEL(kl_rows), args, logits.size(0));
  return kl;
}

std::tuple<Tensor, Tensor> kl_parts_cpu(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels,
                                        double scale, double softcap, double ref_scale, double ref_softcap) {
  Tensor y;
  KlArgs args = kl_args("kl_parts", logits, ref_logits, labels, scale, softcap, ref_scale, ref_softcap, y);
  Tensor kl = at::empty({logits.size(0)}, at::kFloat), totals = at::empty({logits.size(0), 4}, at::kDouble);
  args.kl = kl.mutable_data_ptr<float>();
  args.totals = totals.mutable_data_ptr<double>();
  run(GFAST_KERNEL(kl_rows), args, logits.size(0));
  return {kl, totals};
}

void kl_rows_grad_cpu(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, const Tensor& totals,
                      const Tensor& coef_scale, double scale, double softcap, double ref_scale, double ref_softcap,
                      Tensor out) {
  const char* op = "kl_rows_grad";
  Tensor y;
  KlArgs args = kl_args(op, logits, ref_logits, labels, scale, softcap, ref_scale, ref_softcap, y);
  check_memory(op, "totals", totals);
  TORCH_CHECK_VALUE(totals.dim() == 2 && totals.size(0) == logits.size(0) && totals.size(1) == 4 &&
                        totals.scalar_type() == at::kDouble && totals.is_contiguous(),
                    "gfast: ", op, ": totals must be contiguous fp64 [", logits.size(0), ", 4] on the CPU");
  args.given = totals.const_data_ptr<double>();
  args.coef_scale = check_scalar(op, "coef_scale", coef_scale);
  set_out(op, args, out, logits, {{"labels", labels}, {"ref_logits", ref_logits}, {"totals", totals}});
  run(GFAST_KERNEL(kl_rows), args, logits.size(0));
}

Tensor soft_rows_cpu(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, const Tensor& lower,
                     const Tensor& coef_scale, int64_t kind, double scale, double softcap, double ref_scale,
                     double ref_softcap, std::optional<Tensor> out) {
  const char* op = "soft_rows";
  Tensor y;
  KlArgs args = kl_args(op, logits, ref_logits, labels, scale, softcap, ref_scale, ref_softcap, y);
  const Tensor by = check_values(op, "lower", lower, logits.size(0));
  args.lower = by.const_data_ptr<float>();
  TORCH_CHECK_VALUE(kind >= 0 && kind <= 2, "gfast: soft_rows: there is no divergence ", kind);
  args.kind = static_cast<Divergence>(kind);
  args.coef_scale = check_scalar(op, "coef_scale", coef_scale);
  if (out.has_value()) {
    // A target made of the row itself may be overwritten with it: the kernel has read both by then.
    const Tensor apart = ref_logits.is_same(logits) ? Tensor() : ref_logits;
    set_out(op, args, *out, logits, {{"labels", labels}, {"ref_logits", apart}, {"lower", lower}});
  }
  Tensor value = at::empty({logits.size(0)}, at::kFloat);
  args.kl = value.mutable_data_ptr<float>();
  run(GFAST_KERNEL(kl_rows), args, logits.size(0));
  return value;
}

std::tuple<Tensor, Tensor, Tensor> stat_rows_cpu(const Tensor& logits, const Tensor& labels, int64_t top,
                                                 double sharpness, bool soft, double scale, double softcap) {
  const char* op = "stat_rows";
  StatsArgs args{};
  args.logits = check_matrix(op, "logits", logits, scale, softcap);
  args.vocab = logits.size(1);
  const int64_t rows = logits.size(0);
  const Tensor y = check_labels(op, labels, rows, args.vocab);
  args.labels = y.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(top >= 1 && top <= kMostTop && (top <= args.vocab || rows == 0), "gfast: ", op,
                    ": top must be 1 to ", std::min<int64_t>(kMostTop, args.vocab), ", not ", top);
  args.top = top;
  args.sharpness = check_number(op, "sharpness", sharpness);
  TORCH_CHECK_VALUE(sharpness > 0, "gfast: ", op, ": sharpness must be positive, it is ", sharpness);
  args.soft = soft;
  Tensor stats = at::empty({rows, kStats}, at::kFloat), values = at::empty({rows, top}, at::kFloat);
  Tensor ids = at::empty({rows, top}, at::kLong);
  args.stats = stats.mutable_data_ptr<float>();
  args.values = values.mutable_data_ptr<float>();
  args.ids = ids.mutable_data_ptr<int64_t>();
  run(GFAST_KERNEL(stat_rows), args, rows);
  return {stats, values, ids};
}

void stat_rows_grad_cpu(const Tensor& logits, const Tensor& labels, const Tensor& stats, const Tensor& dense,
                        const Tensor& columns, const Tensor& adds, bool soft, double scale, double softcap,
                        Tensor out) {
  const char* op = "stat_rows_grad";
  StatsGradArgs args{};
  args.logits = check_matrix(op, "logits", logits, scale, softcap);
  args.vocab = logits.size(1);
  const int64_t rows = logits.size(0);
  check_memory(op, "columns", columns);
  TORCH_CHECK_VALUE(columns.dim() == 2 && columns.size(0) == rows && columns.size(1) >= 1 &&
                        columns.size(1) <= kMostTop + 1,
                    "gfast: ", op, ": columns must be [", rows, ", 1 to ", kMostTop + 1, "], not ", columns.sizes());
  TORCH_CHECK_TYPE(columns.scalar_type() == at::kLong, "gfast: ", op, ": columns must be int64, not ",
                   columns.scalar_type());
  args.count = columns.size(1);
  args.soft = soft;
  const Tensor y = check_labels(op, labels, rows, args.vocab), c = columns.contiguous(),
               s = check_values(op, "stats", stats, rows, kStats), d = check_values(op, "dense", dense, rows, 3),
               more = check_values(op, "adds", adds, rows, args.count);
  args.labels = y.const_data_ptr<int64_t>();
  args.stats = s.const_data_ptr<float>();
  args.dense = d.const_data_ptr<float>();
  args.columns = c.const_data_ptr<int64_t>();
  args.adds = more.const_data_ptr<float>();
  for (int64_t k = 0; k < c.numel(); ++k)
    TORCH_CHECK_VALUE(args.columns[k] >= 0 && args.columns[k] < args.vocab, "gfast: ", op, ": column ",
                      args.columns[k], " is outside the vocabulary [0, ", args.vocab, ")");
  set_out(op, args, out, logits,
          {{"labels", labels}, {"stats", stats}, {"dense", dense}, {"columns", columns}, {"adds", adds}});
  args.stream = streams(out, logits);
  run(GFAST_KERNEL(stat_rows_grad), args, rows);
}

// torch's own x.mul_() takes three times as long for bfloat16.
void scale_cpu(Tensor x, const Tensor& factor) {
  check_memory("scale_", "x", x);
  TORCH_CHECK_VALUE(x.is_contiguous(), "gfast: scale_: x must be contiguous, its strides are ", x.strides());
  const Matrix m = check_matrix("scale_", "x", x.view({x.numel(), 1}), 1.0, 0.0);
  const float by = check_scalar("scale_", "factor", factor);
  void* data = x.mutable_data_ptr();
  auto* kernel = GFAST_KERNEL(scale_values);
  parallel_for(0, x.numel(), 1 << 16, [&](int64_t begin, int64_t end) { kernel(data, m.dtype, begin, end, by); });
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CPU, m) {
  m.impl("logp_rows", &logp_rows_cpu);
  m.impl("logp_rows_grad", &logp_rows_grad_cpu);
  m.impl("weighted_rows", &weighted_rows_cpu);
  m.impl("label_factor", &label_factor_cpu);
  m.impl("kl_rows", &kl_rows_cpu);
  m.impl("kl_parts", &kl_parts_cpu);
  m.impl("kl_rows_grad", &kl_rows_grad_cpu);
  m.impl("soft_rows", &soft_rows_cpu);
  m.impl("stat_rows", &stat_rows_cpu);
  m.impl("stat_rows_grad", &stat_rows_grad_cpu);
  m.impl("scale_", &scale_cpu);
}

}  // namespace gfast
