// Memory of gradients that come and go: what a training step frees, the next one takes. Fresh memory is zeroed by the
// system page by page, which for a gradient of the logits or of the head takes longer than the kernel that fills it.
#include <ATen/ops/from_blob.h>
#include <pthread.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>

#include "cpu/checks.h"
#include "cpu/memory_limit.h"

namespace gfast {

namespace {

using Clock = std::chrono::steady_clock;

struct Block {
  void* data;
  size_t bytes;
  Clock::time_point given{};
};

// A whole number from the environment, or `otherwise` where there is none.
size_t setting(const char* name, size_t otherwise, size_t most) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == 0) return otherwise;
  size_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  TORCH_CHECK_VALUE(error == std::errc() && stop == end && value <= most, "gfast: ", name, "='", text,
                    "' is not a whole number from 0 to ", most, "; correct it or unset it");
  return value;
}

Block fresh_block(size_t bytes) {
  constexpr size_t page = size_t{2} << 20;
  const size_t whole = (bytes + page - 1) / page * page;  // no overflow: bytes fit in 63 bits
  void* data = nullptr;
  TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&data, page, whole) == 0, "gfast: no memory for a gradient of ",
                   bytes, " bytes");
  return {data, whole};
}

class Pool {
 public:
  // A kept block of at least `bytes` and at most a quarter more, else new memory.
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      read_settings();
      drop([this](const Block& oldest) { return oldest.given + age_ < Clock::now(); });
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        if (it->bytes < bytes || it->bytes > bytes + bytes / 4) continue;
        const Block found = *it;
        held_ -= found.bytes;
        kept_.erase(it);
        return found;
      }
    }
    return fresh_block(bytes);
  }

  // Keeps the block, and the newest of the others, within the limit and for a while.
  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    block.given = Clock::now();
    kept_.push_front(block);
    held_ += block.bytes;
    drop([&](const Block& oldest) { return held_ > limit_ || oldest.given + age_ < block.given; });
  }

  size_t empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t held = held_;
    drop([](const Block&) { return true; });
    return held;
  }

  // Around a fork nobody else is in the middle of a change: the child has this thread alone to finish it.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // With the first tensor: a setting that is wrong is an error of the call, which loading the library could not raise.
  void read_settings() {
    if (limit_ != unread) return;
    age_ = std::chrono::seconds(setting("GFAST_POOL_SECONDS", 60, size_t{1} << 30));
    limit_ = limit();
  }

  template <typename When>
  void drop(const When& when) {
    while (!kept_.empty() && when(kept_.back())) {
      held_ -= kept_.back().bytes;
      std::free(kept_.back().data);
      kept_.pop_back();
    }
  }

  // An eighth of the memory there is for this process, a head's gradient of a gigabyte should find its memory again too;
  // at least half a gigabyte, unless that is more than a quarter.
  static size_t limit() {
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    const uint64_t machine = pages > 0 && page > 0 ? uint64_t(pages) * uint64_t(page) : uint64_t{4} << 30;
    const uint64_t mine = std::min(machine, cgroup_limit("/proc/self/cgroup", "/sys/fs/cgroup"));
    const size_t usual = std::min(std::max<size_t>(mine / 8, size_t{512} << 20), size_t(mine / 4));
    return setting("GFAST_POOL_MIB", usual >> 20, size_t{1} << 40) << 20;
  }

  std::mutex mutex_;
  std::list<Block> kept_;  // newest first
  size_t held_ = 0;
  static constexpr size_t unread = ~size_t{0};
  size_t limit_ = unread;
  std::chrono::seconds age_{0};  // after which a block that was not taken again is freed
};

// Made as the library is loaded: a child forked while another thread makes it would wait for that thread for ever.
// Never destroyed: tensors may outlive static objects.
Pool& pool = *new Pool;
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { pool.lock(); }, [] { pool.unlock(); }, [] { pool.unlock(); });

int64_t empty_cache() { return static_cast<int64_t>(pool.empty()); }

size_t bytes_of(const char* op, at::IntArrayRef size, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(at::isFloatingType(dtype), "gfast: ", op, ": a gradient is of floating point numbers, not ", dtype);
  for (const int64_t one : size)
    TORCH_CHECK_VALUE(one >= 0, "gfast: ", op, ": a size cannot be negative: ", size);
  int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (const int64_t one : size)
    TORCH_CHECK_VALUE(!__builtin_mul_overflow(bytes, one, &bytes), "gfast: ", op, ": ", size, " is more than any memory");
  return static_cast<size_t>(bytes);
}

template <typename Free>
at::Tensor tensor_of(Block block, at::IntArrayRef size, at::ScalarType dtype, Free free) {
  at::Tensor out = at::from_blob(
      block.data, size, [block, free](void*) { free(block); }, at::TensorOptions().dtype(dtype).device(at::kCPU));
  advise_huge_pages(out);
  return out;
}

at::Tensor fresh(at::IntArrayRef size, at::ScalarType dtype) {
  return tensor_of(pool.take(bytes_of("fresh", size, dtype)), size, dtype, [](Block block) { pool.give(block); });
}

// New memory, which the system has back as soon as it is freed.
at::Tensor unpooled(at::IntArrayRef size, at::ScalarType dtype) {
  return tensor_of(fresh_block(bytes_of("unpooled", size, dtype)), size, dtype,
                   [](Block block) { std::free(block.data); });
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CompositeExplicitAutograd, m) {
  m.impl("fresh", &fresh);
  m.impl("unpooled", &unpooled);
  m.impl("empty_cache", &empty_cache);
}

}  // namespace gfast
