#include "pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace fastact::pool {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
// The C library never keeps a larger block.
constexpr size_t kNeverKept = size_t(32) << 20;

struct Block {
  void* data;
  size_t size;
};

/// Sizes are rounded up to one of eight steps per power of two, so that a block serves what is nearly as large; from 16 MiB on
/// that is to whole huge pages.
size_t rounded(size_t bytes) {
  size_t step = kLeast / 8;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// The context of every block is its address, as in torch's own memory: torch's copy on write relies on it.

/// What is too small for the pool, aligned as torch's memory is, but by malloc: posix_memalign is no friend of small blocks.
class Small final : public c10::Allocator {
 public:
  static constexpr size_t kAlignment = 64, kMost = 4096;

  c10::DataPtr allocate(size_t bytes) override {
    char* const block = static_cast<char*>(std::malloc(bytes + kAlignment));
    if (!block) throw std::bad_alloc();
    // At least the 16 bytes to which malloc aligns lie before it.
    void** const data = reinterpret_cast<void**>(block + kAlignment - reinterpret_cast<uintptr_t>(block) % kAlignment);
    data[-1] = block;
    return {data, data, &give, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void give(void* data) {
    if (data) std::free(static_cast<void**>(data)[-1]);
  }
};

class Pool;
Pool& pool();

class Pool final : public c10::Allocator {
 public:
  void start(size_t limit, bool huge_pages) {
    set_limit(limit);
    const std::lock_guard<std::mutex> lock(mutex_);
    huge_pages_ = huge_pages;
  }

  /// Whether a block of that many bytes does better here than at torch's allocator. Without anything held, only blocks that the
  /// C library takes from the system each time.
  bool serves(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return rounded(bytes) <= limit_ || (huge_pages_ && bytes > kNeverKept);
  }

  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = rounded(bytes);
    void* data = take(size);
    if (!data) {
      data = obtain(size);
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.reserve(free_.size() + used_.size() + 1);  // for the day it is free, when nothing may throw
      enter(data, size);
    }
    if (c10::memoryProfilingEnabled()) report(data, int64_t(size));
    return {data, data, &give, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  Stats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {limit_, held_, free_.size(), in_use_, hits_, misses_};
  }

  void set_limit(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      limit_ = bytes;
    }
    shrink_to(bytes);
  }

  void empty_cache() { shrink_to(0); }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static void give(void* data) {
    if (data) pool().put(data);
  }

  /// With the lock held: the block belongs to a tensor from now on.
  void enter(void* data, size_t size) {
    used_.emplace(data, size);
    in_use_ += size;
  }

  void* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The one freed last is the likeliest to be in the cache.
    const auto found = std::find_if(free_.rbegin(), free_.rend(), [&](const Block& b) { return b.size == size; });
    if (found == free_.rend()) {
      ++misses_;
      return nullptr;
    }
    void* const data = found->data;
    enter(data, size);
    ++hits_;
    held_ -= size;
    free_.erase(std::next(found).base());
    return data;
  }

  /// The tensor is gone. Makes room before the block is held, so that not even for a moment more is held than the limit.
  void put(void* data) {
    if (c10::memoryProfilingEnabled()) report(data, -int64_t(size_of(data)));
    for (;;) {
      Block leaving;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto entry = used_.find(data);
        const Block block{data, entry->second};
        if (block.size <= limit_ && held_ + block.size > limit_) {
          leaving = oldest();
        } else {
          used_.erase(entry);
          in_use_ -= block.size;
          leaving = block;
          if (block.size <= limit_) {
            held_ += block.size;
            free_.push_back(block);
            return;
          }
        }
      }
      release(leaving);
      if (leaving.data == data) return;
    }
  }

  size_t size_of(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return used_.find(data)->second;
  }

  /// With the lock held: the one freed longest ago, which is held no more.
  Block oldest() {
    const Block block = free_.front();
    free_.erase(free_.begin());
    held_ -= block.size;
    return block;
  }

  /// Releases what was freed longest ago until no more than that is held; each without the lock, for that takes long.
  void shrink_to(size_t bytes) {
    for (;;) {
      Block leaving;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (held_ <= bytes) return;
        leaving = oldest();
      }
      release(leaving);
    }
  }

  /// To torch's profiler: a block that now belongs to a tensor, or (size below 0) that is about to be given back.
  void report(void* data, int64_t size) {
    const Stats now = stats();
    const size_t in_use = size < 0 ? now.in_use + size : now.in_use;
    c10::reportMemoryUsageToProfiler(data, size, in_use, in_use + now.held, c10::Device(c10::kCPU));
  }

  void* obtain(size_t size) {
    void* data = fresh(size);
    if (!data) {
      empty_cache();
      data = fresh(size);
    }
    TORCH_CHECK(data, "fastact: can't allocate memory: you tried to allocate ", size, " bytes. Error code ", errno, " (",
                std::strerror(errno), ")");
    return data;
  }

  /// Null where there is none.
  void* fresh(size_t size) {
    if (size < kLarge) return std::aligned_alloc(c10::gAlignment, size);
    // Aligned to a huge page, of which there is none in a block that only covers parts of two.
    const size_t slack = huge_pages_ ? kHugePage : 0;
    void* const start = mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return nullptr;
    if (!slack) return start;
    char* const begin = static_cast<char*>(start);
    char* const data = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
    if (data > begin) munmap(begin, data - begin);
    if (data < begin + slack) munmap(data + size, begin + slack - data);
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE);  // advice: a kernel without huge pages may decline it
#endif
    return data;
  }

  static void release(const Block& block) {
    if (block.size < kLarge)
      std::free(block.data);
    else
      munmap(block.data, block.size);
  }

  std::mutex mutex_;         // of all that follows
  std::vector<Block> free_;  // the one freed longest ago first
  std::unordered_map<void*, size_t> used_;
  size_t limit_ = 0, held_ = 0, in_use_ = 0, hits_ = 0, misses_ = 0;
  std::atomic<bool> huge_pages_ = false;
};

/// Never destroyed: a tensor may be freed after everything else is.
Pool& pool() {
  static Pool* const only = [] {
    // A child made by fork finds the lock free, whoever held it in the parent.
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
    return new Pool;
  }();
  return *only;
}

Small& small() {
  static Small* const only = new Small;
  return *only;
}

}  // namespace

c10::Allocator* allocator(size_t bytes) {
  if (bytes <= Small::kMost && bytes > 0 && !c10::memoryProfilingEnabled()) return &small();
  return bytes >= kLeast && pool().serves(bytes) ? static_cast<c10::Allocator*>(&pool()) : c10::GetCPUAllocator();
}

bool gave(c10::DeleterFnPtr deleter) { return deleter == small().raw_deleter() || deleter == pool().raw_deleter(); }

void start(size_t limit, bool huge_pages) { pool().start(limit, huge_pages); }
Stats stats() { return pool().stats(); }
void set_limit(size_t bytes) { pool().set_limit(bytes); }
void empty_cache() { pool().empty_cache(); }

}  // namespace fastact::pool
