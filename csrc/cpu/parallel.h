// Loops over torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

namespace gfast {

// body(begin, end) for parts of [begin, end), of at least `grain`, as at::parallel_for. ThreadSanitizer does not see the
// barriers of torch's OpenMP, and would take whatever follows a loop for a race: in its build threads are begun and joined.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
#ifdef __SANITIZE_THREAD__
  if (begin >= end) return;
  const int64_t most = std::max<int64_t>(1, (end - begin) / std::max<int64_t>(1, grain));
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), most), step = at::divup(end - begin, threads);
  std::vector<std::thread> others;
  for (int64_t start = begin + step; start < end; start += step)
    others.emplace_back([&body, start, stop = std::min(end, start + step)] { body(start, stop); });
  body(begin, std::min(end, begin + step));
  for (std::thread& other : others) other.join();
#else
  at::parallel_for(begin, end, grain, body);
#endif
}

}  // namespace gfast
