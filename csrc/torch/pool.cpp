#include "pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <vector>

namespace fastact::pool {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
// What is held without being asked for: enough for the activations of most networks, and never more than this part of the
// memory.
constexpr size_t kDefaultLimit = size_t(1) << 30, kShareOfMemory = 8;

constexpr size_t kNeverKept = size_t(32) << 20;

struct Block {
  void* data;
  size_t size;
};

/// An environment variable that is a number of at least 0; nothing where it is not set.
std::optional<size_t> number_from(const char* variable) {
  const char* text = std::getenv(variable);
  if (!text || !*text) return {};
  size_t number = 0;
  const auto [end, error] = std::from_chars(text, text + std::strlen(text), number);
  TORCH_CHECK_VALUE(error == std::errc() && !*end, variable, " is '", text, "'; it must be a number of at least 0");
  return number;
}

size_t default_limit() {
  const size_t memory = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
  return std::min(kDefaultLimit, memory / kShareOfMemory);
}

/// Sizes are rounded up to one of eight steps per power of two, so that a block serves what is nearly as large; from 16 MiB on
/// that is to whole huge pages.
size_t rounded(size_t bytes) {
  size_t step = kLeast / 8;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

/// What is too small for the pool, aligned as torch's memory is, but by malloc: posix_memalign is no friend of small blocks.
class Small final : public c10::Allocator {
 public:
  static constexpr size_t kAlignment = 64, kMost = 4096;

  c10::DataPtr allocate(size_t bytes) override {
    void* const block = std::malloc(bytes + kAlignment);
    if (!block) throw std::bad_alloc();
    const auto address = (reinterpret_cast<uintptr_t>(block) + kAlignment - 1) / kAlignment * kAlignment;
    return {reinterpret_cast<void*>(address), block, &std::free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

class Pool;
Pool& pool();

class Pool final : public c10::Allocator {
 public:
  Pool()
      : limit_(number_from("FASTACT_POOL_LIMIT").value_or(default_limit())),
        huge_pages_(number_from("FASTACT_HUGE_PAGES").value_or(1) != 0) {}

  /// Whether a block of that many bytes does better here than at torch's allocator. Without anything held, only blocks that the
  /// C library takes from the system each time: it never keeps one above 32 MiB.
  bool serves(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return rounded(bytes) <= limit_ || (huge_pages_ && bytes > kNeverKept);
  }

  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = rounded(bytes);
    Block* block = take(size);
    if (!block) block = new Block{map(size), size};
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(block->data, int64_t(size), in_use_, in_use_ + held_, c10::Device(c10::kCPU));
    return {block->data, block, &give, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  Stats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {limit_, held_, free_.size(), in_use_, hits_, misses_};
  }

  void set_limit(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink_to(bytes);
  }

  void empty_cache() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink_to(0);
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static void give(void* block) { pool().put(static_cast<Block*>(block)); }

  Block* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ += size;
    // The one freed last is the likeliest to be in the cache.
    const auto found = std::find_if(free_.rbegin(), free_.rend(), [&](const Block* b) { return b->size == size; });
    if (found == free_.rend()) {
      ++misses_;
      return nullptr;
    }
    ++hits_;
    Block* block = *found;
    held_ -= size;
    free_.erase(std::next(found).base());
    return block;
  }

  void put(Block* block) {
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(block->data, -int64_t(block->size), in_use_, in_use_ + held_, c10::Device(c10::kCPU));
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block->size;
    // Room first, so that not even for a moment more is held than the limit.
    shrink_to(block->size > limit_ ? limit_ : limit_ - block->size);
    if (block->size > limit_) return release(block);
    held_ += block->size;
    free_.push_back(block);
  }

  /// Releases what was freed longest ago until no more than that is held.
  void shrink_to(size_t bytes) {
    size_t count = 0;
    for (; held_ > bytes; ++count) {
      held_ -= free_[count]->size;
      release(free_[count]);
    }
    free_.erase(free_.begin(), free_.begin() + count);
  }

  static void release(Block* block) {
    munmap(block->data, block->size);
    delete block;
  }

  void* map(size_t size) {
    // Aligned to a huge page, of which there is none in a block that only covers parts of two.
    const size_t slack = huge_pages_ ? kHugePage : 0;
    const auto reserve = [&] {
      return mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    };
    void* start = reserve();
    if (start == MAP_FAILED) {
      const std::lock_guard<std::mutex> lock(mutex_);
      shrink_to(0);
      start = reserve();
      if (start == MAP_FAILED) in_use_ -= size;
    }
    TORCH_CHECK(start != MAP_FAILED, "fastact: can't allocate memory: you tried to allocate ", size, " bytes. Error code ",
                errno, " (", std::strerror(errno), ")");
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

  std::mutex mutex_;          // of all that follows
  std::vector<Block*> free_;  // the one freed longest ago first
  size_t limit_, held_ = 0, in_use_ = 0, hits_ = 0, misses_ = 0;
  const bool huge_pages_;
};

/// Never destroyed: a tensor may be freed after everything else is.
Pool& pool() {
  static Pool* const only = [] {
    Pool* const made = new Pool;  // before the handlers: it throws where the environment has a bad limit
    // A child made by fork finds the lock free, whoever held it in the parent.
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
    return made;
  }();
  return *only;
}

}  // namespace

c10::Allocator* allocator(size_t bytes) {
  static Small* const small = new Small;
  if (bytes <= Small::kMost && bytes > 0 && !c10::memoryProfilingEnabled()) return small;
  return bytes >= kLeast && pool().serves(bytes) ? static_cast<c10::Allocator*>(&pool()) : c10::GetCPUAllocator();
}

Stats stats() { return pool().stats(); }
void set_limit(size_t bytes) { pool().set_limit(bytes); }
void empty_cache() { pool().empty_cache(); }

}  // namespace fastact::pool
