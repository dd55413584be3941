// Memory of gradients that come and go: what a training step frees, the next one takes. Fresh memory is zeroed by the
// system page by page, which for a gradient of the logits or of the head takes longer than the kernel that fills it.
#include <ATen/ops/from_blob.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>

#include "cpu/checks.h"

namespace gfast {

namespace {

struct Block {
  void* data;
  size_t bytes;
};

class Pool {
 public:
  // A kept block of at least `bytes` and at most a quarter more, else new memory.
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        if (it->bytes < bytes || it->bytes > bytes + bytes / 4) continue;
        const Block found = *it;
        held_ -= found.bytes;
        kept_.erase(it);
        return found;
      }
    }
    constexpr size_t page = size_t{2} << 20;
    const size_t whole = (bytes + page - 1) / page * page;  // no overflow: bytes fit in 63 bits
    void* data = nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&data, page, whole) == 0, "gfast: no memory for a gradient of ",
                     bytes, " bytes");
    return {data, whole};
  }

  // Keeps the block, and the newest of the others, within the limit.
  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_front(block);
    held_ += block.bytes;
    while (held_ > limit_) {
      held_ -= kept_.back().bytes;
      std::free(kept_.back().data);
      kept_.pop_back();
    }
  }

 private:
  // An eighth of the machine's memory: a head's gradient of a gigabyte should find its memory again too.
  static size_t limit() {
    const char* text = std::getenv("GFAST_POOL_MIB");
    if (text != nullptr && *text != 0) return std::strtoull(text, nullptr, 10) << 20;
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    const size_t machine = pages > 0 && page > 0 ? size_t(pages) * size_t(page) : 0;
    return std::max(machine / 8, size_t{512} << 20);
  }

  std::mutex mutex_;
  std::list<Block> kept_;  // newest first
  size_t held_ = 0;
  const size_t limit_ = limit();
};

Pool& pool() {
  static Pool* const one = new Pool;  // never destroyed: tensors may outlive static objects
  return *one;
}

at::Tensor fresh(at::IntArrayRef size, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(at::isFloatingType(dtype), "gfast: fresh: a gradient is of floating point numbers, not ", dtype);
  for (const int64_t one : size)
    TORCH_CHECK_VALUE(one >= 0, "gfast: fresh: a size cannot be negative: ", size);
  int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (const int64_t one : size)
    TORCH_CHECK_VALUE(!__builtin_mul_overflow(bytes, one, &bytes), "gfast: fresh: ", size, " is more than any memory");
  const Block block = pool().take(bytes);
  at::Tensor out = at::from_blob(
      block.data, size, [block](void*) { pool().give(block); }, at::TensorOptions().dtype(dtype).device(at::kCPU));
  advise_huge_pages(out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gfast, CompositeExplicitAutograd, m) { m.impl("fresh", &fresh); }

}  // namespace gfast
