// Argument checks of the CPU row ops, in words, all before anything is written.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <functional>
#include <initializer_list>
#include <vector>

#include "cpu/kernels/pack.h"

namespace gfast {

// `what` is a dense tensor on the CPU whose memory is there. Every argument passes here before its pointer is taken.
void check_memory(const char* op, const char* what, const at::Tensor& x);

// A size that is computed from others, or an error where it does not fit in 64 bits.
int64_t check_size(const char* op, const char* what, std::initializer_list<int64_t> factors);

// A number as the kernels take it, in fp32: finite there, and not 0 unless it is.
float check_number(const char* op, const char* what, double x);

// Entries between rows. A single row may have any stride, which says nothing and may not be multiplied.
int64_t row_stride(const at::Tensor& x);

// Rows a thread takes at least, so that it has about so many entries.
int64_t grain(int64_t entries, int64_t row);

// `what` [N, V] fp32, bf16 or fp16 on the CPU with contiguous rows, as the kernels' view of it.
Matrix check_matrix(const char* op, const char* what, const at::Tensor& x, double scale, double softcap);

// `what` [M, N] fp32, bf16 or fp16 on the CPU with contiguous rows, as a factor that is packed for a product. One that
// products are given as it lies is fp32, its rows apart from each other (an expanded one is refused by oneDNN).
Factor check_factor(const char* op, const char* what, const at::Tensor& x);
Factor check_wide_factor(const char* op, const char* what, const at::Tensor& x);
void check_rows_apart(const char* op, const char* what, const at::Tensor& x);

// labels [N] int64, each -100 or in [0, vocab); contiguous, and how many are not -100.
struct LabelCount {
  at::Tensor flat;
  int64_t count;
};
LabelCount count_labels(const char* op, const at::Tensor& labels, int64_t vocab);

// Those of `rows` rows; returned contiguous.
at::Tensor check_labels(const char* op, const at::Tensor& labels, int64_t rows, int64_t vocab);

// `what` [N] or [N, columns] fp32 on the CPU; returned contiguous.
at::Tensor check_values(const char* op, const char* what, const at::Tensor& x, int64_t rows, int64_t columns = 0);

// Where each sample's rows (or columns: `what`) begin, and the end; `counts` each, `size` in all.
std::vector<int64_t> sample_bounds(const char* op, const char* what, at::IntArrayRef counts, int64_t size);

float check_scalar(const char* op, const char* what, const at::Tensor& x);

struct Named {
  const char* what;
  const at::Tensor& x;
};

// What an op writes shares no memory with what it reads: every output is checked against every input. Undefined ones
// are passed over.
void check_apart(const char* op, Named out, std::initializer_list<Named> inputs);

// out has the shape and dtype of logits, rows apart from each other, and is the logits themselves or memory of its own;
// of the other inputs it is apart.
void check_out(const char* op, const at::Tensor& out, const at::Tensor& logits, std::initializer_list<Named> inputs);

// Asks for huge pages behind an output about to be written for the first time: a fresh tensor costs one page fault per
// 4 KiB otherwise, more than the kernel itself. No effect on memory that is already mapped.
void advise_huge_pages(const at::Tensor& out);

// Has the memory of `out` been written to before? False also where the system cannot say.
bool is_mapped(const at::Tensor& out);

// body(begin, end, scratch) over all rows; threads take the next few rows as they finish, since ignored rows are free.
void for_rows(int64_t rows, int64_t vocab, const std::function<void(int64_t, int64_t, float*)>& body);

}  // namespace gfast
