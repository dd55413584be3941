#include "cpu/checks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "extent.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gfast {
namespace {

// First and one past the last byte that a tensor covers.
std::pair<const char*, const char*> bytes(const at::Tensor& x) {
  const char* start = static_cast<const char*>(x.const_data_ptr());
  return {start, start + extent(x)};
}

}  // namespace

void check_memory(const char* op, const char* what, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.defined(), "gfast: ", op, ": ", what, " is missing");
  TORCH_CHECK_VALUE(x.device().is_cpu(), "gfast: ", op, ": ", what, " is on ", x.device(),
                    " but this op got CPU tensors; move all arguments to one device");
  TORCH_CHECK_VALUE(x.layout() == at::kStrided, "gfast: ", op, ": ", what, " has layout ", x.layout(),
                    "; make it dense first");
  TORCH_CHECK_VALUE(has_memory(x), "gfast: ", op, ": ", what, " of shape ", x.sizes(), " has lost its memory: its ",
                    "storage has ", x.storage().nbytes(), " bytes (a sharded parameter must be gathered first)");
}

int64_t check_size(const char* op, const char* what, std::initializer_list<int64_t> factors) {
  int64_t size = 1;
  for (const int64_t factor : factors)
    TORCH_CHECK_VALUE(!__builtin_mul_overflow(size, factor, &size), "gfast: ", op, ": ", what,
                      " would have more entries than 64 bits can count");
  return size;
}

float check_number(const char* op, const char* what, double x) {
  const bool fits = std::isfinite(x) && std::fabs(x) <= std::numeric_limits<float>::max();
  TORCH_CHECK_VALUE(fits, "gfast: ", op, ": ", what, " must be a finite float32 number, not ", x);
  const float single = static_cast<float>(x);
  TORCH_CHECK_VALUE(single != 0 || x == 0, "gfast: ", op, ": ", what, " = ", x,
                    " is 0 in float32, which means something else; give 0 or a larger number");
  return single;
}

int64_t row_stride(const at::Tensor& x) { return x.size(0) <= 1 ? x.size(1) : x.stride(0); }

int64_t grain(int64_t entries, int64_t row) { return 1 + entries / std::max<int64_t>(row, 1); }

Matrix check_matrix(const char* op, const char* what, const at::Tensor& x, double scale, double softcap) {
  check_memory(op, what, x);
  TORCH_CHECK_VALUE(x.dim() == 2, "gfast: ", op, ": ", what, " must be [N, V], not ", x.sizes());
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "gfast: ", op, ": ", what,
                   " must be float32, bfloat16 or float16, not ", type, "; impl='reference' takes it");
  TORCH_CHECK_VALUE(x.size(1) > 0 || x.size(0) == 0, "gfast: ", op, ": ", what, " of shape ", x.sizes(),
                    " has an empty vocabulary");
  TORCH_CHECK_VALUE(x.size(1) <= 1 || x.stride(1) == 1, "gfast: ", op, ": rows of ", what,
                    " must be contiguous: stride(1) is ", x.stride(1), ", not 1; call .contiguous()");
  TORCH_CHECK_VALUE(scale > 0, "gfast: ", op, ": scale must be positive, not ", scale);
  TORCH_CHECK_VALUE(softcap >= 0, "gfast: ", op, ": softcap must be positive, or 0 for none, not ", softcap);
  const Dtype dtype = type == at::kFloat ? Dtype::f32 : type == at::kBFloat16 ? Dtype::bf16 : Dtype::f16;
  return {x.const_data_ptr(), row_stride(x), dtype, check_number(op, "scale", scale), check_number(op, "softcap", softcap)};
}

Factor check_factor(const char* op, const char* what, const at::Tensor& x) {
  check_memory(op, what, x);
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "gfast: ", op, ": ", what,
                   " must be float32, bfloat16 or float16, not ", type);
  TORCH_CHECK_VALUE(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), "gfast: ", op, ": ", what,
                    " must be a matrix with contiguous rows, not ", x.sizes(), " with strides ", x.strides());
  return {x.const_data_ptr(), row_stride(x), type == at::kFloat ? Dtype::f32 : type == at::kBFloat16 ? Dtype::bf16 : Dtype::f16};
}

Factor check_wide_factor(const char* op, const char* what, const at::Tensor& x) {
  check_memory(op, what, x);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "gfast: ", op, ": ", what, " must be float32, not ", x.scalar_type());
  const Factor found = check_factor(op, what, x);
  check_rows_apart(op, what, x);
  return found;
}

void check_rows_apart(const char* op, const char* what, const at::Tensor& x) {
  TORCH_CHECK_VALUE(row_stride(x) >= x.size(1), "gfast: ", op, ": rows of ", what, " overlap: ", x.sizes(),
                    " with strides ", x.strides());
}

std::vector<int64_t> sample_bounds(const char* op, const char* what, at::IntArrayRef counts, int64_t size) {
  std::vector<int64_t> bounds{0};
  for (const int64_t count : counts) {
    TORCH_CHECK_VALUE(count >= 0, "gfast: ", op, ": a sample cannot have ", count, " ", what);
    int64_t end;
    TORCH_CHECK_VALUE(!__builtin_add_overflow(bounds.back(), count, &end), "gfast: ", op, ": the samples have more ", what,
                      " than 64 bits can count, of ", size);
    bounds.push_back(end);
  }
  TORCH_CHECK_VALUE(bounds.back() == size, "gfast: ", op, ": the samples have ", bounds.back(), " ", what, " of ", size);
  return bounds;
}

LabelCount count_labels(const char* op, const at::Tensor& labels, int64_t vocab) {
  check_memory(op, "labels", labels);
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "gfast: ", op, ": labels must be int64, not ",
                   labels.scalar_type());
  TORCH_CHECK_VALUE(labels.dim() == 1, "gfast: ", op, ": labels must be [N], not ", labels.sizes());
  LabelCount found{labels.contiguous(), 0};
  const int64_t* y = found.flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < labels.size(0); ++i) {
    TORCH_CHECK_VALUE((y[i] >= 0 && y[i] < vocab) || y[i] == -100, "gfast: ", op, ": labels[", i, "] (flattened) = ", y[i],
                      " is outside the vocabulary [0, ", vocab, "); use -100 for positions to ignore");
    found.count += y[i] != -100;
  }
  return found;
}

at::Tensor check_labels(const char* op, const at::Tensor& labels, int64_t rows, int64_t vocab) {
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == rows, "gfast: ", op, ": labels must be [", rows,
                    "], one for each row of logits, not ", labels.sizes());
  return count_labels(op, labels, vocab).flat;
}

at::Tensor check_values(const char* op, const char* what, const at::Tensor& x, int64_t rows, int64_t columns) {
  check_memory(op, what, x);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "gfast: ", op, ": ", what, " must be float32, not ", x.scalar_type());
  const bool fits = columns == 0 ? x.dim() == 1 && x.size(0) == rows
                                 : x.dim() == 2 && x.size(0) == rows && x.size(1) == columns;
  TORCH_CHECK_VALUE(fits, "gfast: ", op, ": ", what, " must be [", rows, columns ? ", " + std::to_string(columns) : "",
                    "], not ", x.sizes());
  return x.contiguous();
}

float check_scalar(const char* op, const char* what, const at::Tensor& x) {
  check_memory(op, what, x);
  TORCH_CHECK_VALUE(x.numel() == 1, "gfast: ", op, ": ", what, " must be a single number (0-dim), not ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "gfast: ", op, ": ", what, " must be float32, not ", x.scalar_type());
  return *x.const_data_ptr<float>();
}

void check_apart(const char* op, Named out, std::initializer_list<Named> inputs) {
  const auto [a0, a1] = bytes(out.x);
  for (const Named& input : inputs) {
    if (!input.x.defined()) continue;
    const auto [b0, b1] = bytes(input.x);
    TORCH_CHECK_VALUE(a0 == a1 || b0 == b1 || a1 <= b0 || b1 <= a0, "gfast: ", op, ": ", out.what,
                      " shares memory with ", input.what, "; give it memory of its own",
                      std::string_view(input.what) == "logits" ? ", or logits itself" : "");
  }
}

void check_out(const char* op, const at::Tensor& out, const at::Tensor& logits, std::initializer_list<Named> inputs) {
  check_memory(op, "out", out);
  TORCH_CHECK_VALUE(out.sizes() == logits.sizes(), "gfast: ", op, ": out must have the shape of logits ",
                    logits.sizes(), ", not ", out.sizes());
  TORCH_CHECK_TYPE(out.scalar_type() == logits.scalar_type(), "gfast: ", op, ": out must have the dtype of logits (",
                   logits.scalar_type(), "), not ", out.scalar_type());
  TORCH_CHECK_VALUE(out.size(1) <= 1 || out.stride(1) == 1, "gfast: ", op,
                    ": rows of out must be contiguous: stride(1) is ", out.stride(1), ", not 1");
  TORCH_CHECK_VALUE(out.size(0) <= 1 || out.stride(0) >= out.size(1), "gfast: ", op,
                    ": rows of out overlap (stride(0) is ", out.stride(0), "); an expanded tensor cannot be written to");
  const bool same = out.const_data_ptr() == logits.const_data_ptr() && row_stride(out) == row_stride(logits);
  if (!same) check_apart(op, {"out", out}, {{"logits", logits}});
  check_apart(op, {"out", out}, inputs);
}

void advise_huge_pages(const at::Tensor& out) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto [start, stop] = bytes(out);
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t last = reinterpret_cast<uintptr_t>(stop) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

bool is_mapped(const at::Tensor& out) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  const auto [start, stop] = bytes(out);
  if (start == stop) return false;
  for (const char* p : {start, start + (stop - start) / 2, stop - 1}) {
    unsigned char resident = 0;
    if (mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) / page * page), 1, &resident) != 0) return false;
    if ((resident & 1) == 0) return false;
  }
  return true;
#else
  return false;
#endif
}

void for_rows(int64_t rows, int64_t vocab, const std::function<void(int64_t, int64_t, float*)>& body) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), rows);
  const int64_t step = std::max<int64_t>(1, std::min<int64_t>(rows / std::max<int64_t>(1, 8 * threads), std::max<int64_t>(8, (1 << 18) / vocab)));
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    static thread_local std::vector<float> scratch;  // kept between calls: faulting it in costs as much as a row
    scratch.resize(std::max<size_t>(scratch.size(), scratch_floats(vocab)));
    for (int64_t start; (start = next.fetch_add(step)) < rows;) body(start, std::min(rows, start + step), scratch.data());
  });
}

}  // namespace gfast
