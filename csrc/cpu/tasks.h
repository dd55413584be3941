// Work of uneven size over the threads, each with memory of its own to compute in.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/parallel.h"

namespace gfast {

inline int64_t up(int64_t x, int64_t unit) { return at::divup(x, unit) * unit; }

struct Floats {
  explicit Floats(int64_t size) : memory(c10::GetCPUAllocator()->allocate(std::max<int64_t>(size, 1) * sizeof(float))) {}
  float* get() const { return static_cast<float*>(memory.get()); }
  at::DataPtr memory;  // aligned to cache lines
};

// body(task, scratch) for each task; threads take the next one as they finish, so a thread that is held up holds up no
// other. `scratch` has so many floats.
template <typename Body>
void for_tasks(int64_t tasks, int64_t floats, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    const Floats scratch(floats);
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, scratch.get());
  });
}

}  // namespace gfast
