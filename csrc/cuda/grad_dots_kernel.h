// Interface between the ATen launcher (grad_dots.cpp) and the plain CUDA code (grad_dots_kernel.cu).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gfast::cuda {

constexpr int kMaxDirs = 2;  // directions in one launch; more take further launches
#if CUDART_VERSION >= 12010
constexpr int kParameterBytes = 32764;  // of a kernel, from Volta on
constexpr int kInlineRecords = 580;     // records among them; a model of 7B has 291 parameters
#else
constexpr int kParameterBytes = 4096;
constexpr int kInlineRecords = 70;
#endif
constexpr int64_t kChunk = 1 << 16;  // elements a block
constexpr int kGeneralPath = 255;    // any mix of dtypes, any alignment

// One tensor and its directions. Types are ElementType of grad_dots_plan.h.
struct DotRecord {
  const void* x;
  const void* y[kMaxDirs];
  int64_t numel;
  int32_t chunk_start;             // chunks of all records before this one
  int32_t group;
  int32_t group_begin, group_end;  // chunks of all records of the group
  uint8_t x_type;
  uint8_t y_type[kMaxDirs];
  uint8_t path;  // x_type * 3 + y_type where all are 16-bit or fp32, y alike, all 16-byte aligned; else kGeneralPath
};

struct DotArgs {
  const DotRecord* records;  // on the device, sorted by group; null: inline_records
  int num_records;
  int64_t num_chunks;
  double* partial;     // [num_chunks, num_dirs + 1]
  unsigned* arrived;   // [num_groups] of zeros, which are left as zeros; nobody else's while this runs
  double* out;         // [num_groups, out_columns]; rows of groups without a record are not written
  int out_columns;     // all directions of the call, and the squares
  int first_column;    // where this launch's directions go
  bool write_squares;  // into the last column
  DotRecord inline_records[kInlineRecords];
};

static_assert(sizeof(DotRecord) == 56 && sizeof(DotArgs) <= kParameterBytes, "more than a kernel's parameters hold");

// Enqueues the kernel on `stream`; num_dirs in [0, kMaxDirs].
cudaError_t launch_grad_dots(const DotArgs& args, int num_dirs, cudaStream_t stream);

}  // namespace gfast::cuda
