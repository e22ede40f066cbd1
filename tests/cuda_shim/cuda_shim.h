// CUDA for a plain C++ compiler, for tests: enough to run the kernels of csrc/cuda on a CPU, each CUDA thread a fiber.
//
// It shows what a GPU may or may not: a missing barrier (a schedule that runs one warp as far as it gets before the next one
// starts gives another result), a barrier that not all threads reach, an overrun (under AddressSanitizer: the shared memory
// of a block is a heap block of the size asked for), shared memory that is read before it is written (it starts as NaN), a
// misaligned 16-byte access (under UndefinedBehaviorSanitizer), a launch beyond the limits. It cannot show what the
// hardware's approximate instructions return, nor the order of memory accesses within a warp.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(FASTACT_STAND_IN)
#include "../cuda_stand_in/stand_in.h"
#endif

#if !defined(__x86_64__)
#error "fibers are switched in the assembly of x86-64"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace shim {

/// The order in which threads get on, from barrier to barrier, and blocks after each other. Only the last two let a warp run
/// ahead of the others of its block, and a block ahead of the others of its cluster.
enum Schedule { kInOrder, kReversed, kShuffled, kWarpByWarp, kLastWarpFirst, kSchedules };
inline Schedule schedule = kInOrder;
/// Units in the last place by which every approximate result is moved, as the hardware's may be.
inline int approximate_ulps = 0;
/// The largest cluster this device can hold.
inline int most_blocks_of_cluster = 16;

constexpr int kWarp = 32, kMostThreads = 1024, kMostShared = 48 << 10;
constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

// Leaves the running fiber with its registers on its stack, and goes on where the other one left.
extern "C" void shim_switch(void** from, void* to);
asm(R"(
.weak shim_switch
.type shim_switch, @function
shim_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

#if defined(FASTACT_STAND_IN)
using stand_in::submit;
#else
/// There is one stream, and it is never busy.
inline void submit(void*, const std::function<void()>& task) { task(); }
#endif

struct Barrier {
  int arrived = 0, passed = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  int block = 0, thread = 0;  // of the cluster; of the block
  bool done = false;
  const Barrier* barrier = nullptr;  // at which it waits,
  int until = 0;                     // until that was passed so often
  int shuffles = 0;

  bool runnable() const { return !done && (!barrier || barrier->passed >= until); }
};

struct Block {
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, free};
  Barrier barrier;
  int running = 0;  // threads that have not ended
  std::vector<Barrier> warps;
  std::vector<uint64_t> exchanged;  // [2][thread]: nobody is two shuffles ahead of his warp
};

/// Runs a kernel, one cluster of blocks after the other.
class Machine {
 public:
  unsigned blocks = 0, threads = 0;
  Barrier cluster_barrier;

  static bool takes(int64_t blocks, int threads, int cluster, int shared_bytes) {
    return blocks >= 1 && blocks <= kMostBlocks && threads >= 1 && threads <= kMostThreads && cluster >= 1 &&
           cluster <= most_blocks_of_cluster && blocks % cluster == 0 && shared_bytes >= 0 && shared_bytes <= kMostShared;
  }

  void run(int64_t blocks_, int threads_, int cluster, int shared_bytes, std::function<void()> kernel) {
    blocks = unsigned(blocks_), threads = unsigned(threads_);
    kernel_ = std::move(kernel);
    while (stacks_.size() < size_t(cluster) * threads) stacks_.emplace_back(new unsigned char[kStack]);
    const unsigned clusters = blocks / unsigned(cluster);
    const bool backwards = schedule == kReversed || schedule == kLastWarpFirst;
    for (unsigned k = 0; k < clusters; ++k) {
      first_ = (backwards ? clusters - 1 - k : k) * unsigned(cluster);
      blocks_of_cluster_ = std::vector<Block>(size_t(cluster));
      for (Block& b : blocks_of_cluster_) {
        b.shared.reset(static_cast<unsigned char*>(malloc(size_t(shared_bytes))));
        if (shared_bytes > 0) memset(b.shared.get(), 0xff, size_t(shared_bytes));
        b.running = int(threads);
        b.warps.resize((threads + kWarp - 1) / kWarp);
        b.exchanged.resize(2 * threads);
      }
      fibers_.assign(size_t(cluster) * threads, Fiber());
      for (size_t i = 0; i < fibers_.size(); ++i) prepare(int(i));
      run_cluster();
    }
  }

  Fiber& current() { return *current_; }
  unsigned block_index() const { return first_ + unsigned(current_->block); }
  int cluster() const { return int(blocks_of_cluster_.size()); }
  Block& block() { return blocks_of_cluster_[size_t(current_->block)]; }
  Block& block(int rank) {
    if (rank < 0 || rank >= cluster()) fail("asks for a block that is not in its cluster");
    if (blocks_of_cluster_[size_t(rank)].running == 0) fail("asks for a block that has ended");
    return blocks_of_cluster_[size_t(rank)];
  }

  /// Until `all` threads have come.
  void wait(Barrier& barrier, int all) {
    if (++barrier.arrived == all) {
      barrier.arrived = 0;
      ++barrier.passed;
      return;
    }
    current_->barrier = &barrier;
    current_->until = barrier.passed + 1;
    leave();
    current_->barrier = nullptr;
  }

  [[noreturn]] void fail(const char* what) {
    fprintf(stderr, "block %u, thread %d: %s\n", block_index(), current_->thread, what);
    abort();
  }

 private:
  static constexpr size_t kStack = 128 << 10;

  static void enter();
  void prepare(int i) {
    Fiber& f = fibers_[size_t(i)];
    f.block = i / int(threads), f.thread = i % int(threads);
    void** top = reinterpret_cast<void**>(stacks_[size_t(i)].get() + kStack);
    *--top = nullptr;  // where enter() would return to; the stack is aligned as after a call
    *--top = reinterpret_cast<void*>(&Machine::enter);
    for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
    f.stack_pointer = top;
  }
  void leave() { shim_switch(&current_->stack_pointer, scheduler_); }
  bool step(size_t i) {
    if (!fibers_[i].runnable()) return false;
    current_ = &fibers_[i];
    shim_switch(&scheduler_, current_->stack_pointer);
    return true;
  }
  /// Each warp of a block as far as it gets, one after the other.
  bool run_warps(size_t block) {
    const size_t warps = blocks_of_cluster_[block].warps.size();
    bool any = false;
    for (size_t k = 0; k < warps; ++k) {
      const size_t warp = schedule == kLastWarpFirst ? warps - 1 - k : k;
      const size_t begin = block * threads + warp * kWarp, end = std::min(begin + kWarp, (block + 1) * threads);
      for (bool moved = true; moved; any |= moved) {
        moved = false;
        for (size_t i = begin; i < end; ++i) moved |= step(i);
      }
    }
    return any;
  }
  void run_cluster() {
    const size_t count = fibers_.size();
    std::vector<size_t> order(count);
    for (size_t i = 0; i < count; ++i) order[i] = schedule == kReversed ? count - 1 - i : i;
    std::mt19937 random(first_);
    for (bool any = true; any;) {
      any = false;
      if (schedule == kWarpByWarp || schedule == kLastWarpFirst) {
        for (size_t k = 0; k < blocks_of_cluster_.size(); ++k)
          while (run_warps(schedule == kLastWarpFirst ? blocks_of_cluster_.size() - 1 - k : k)) any = true;
      } else {
        if (schedule == kShuffled) std::shuffle(order.begin(), order.end(), random);
        for (size_t i : order) any |= step(i);
      }
    }
    for (Fiber& f : fibers_)
      if (!f.done) {
        current_ = &f;
        fail("waits at a barrier that not all threads reach");
      }
  }

  std::function<void()> kernel_;
  unsigned first_ = 0;  // block of the cluster
  std::vector<std::unique_ptr<unsigned char[]>> stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Block> blocks_of_cluster_;
  Fiber* current_ = nullptr;
  void* scheduler_ = nullptr;
};
inline Machine machine;

/// Returns what CUDA would: the launch is refused, or in the stream.
inline int launch(int64_t blocks, int threads, int cluster, int shared_bytes, void* stream, std::function<void()> kernel) {
  if (!Machine::takes(blocks, threads, cluster, shared_bytes)) return kInvalidValue;
  submit(stream, [=] { machine.run(blocks, threads, cluster, shared_bytes, kernel); });
  return 0;
}

inline void Machine::enter() {
  machine.kernel_();
  machine.current_->done = true;
  --machine.block().running;
  machine.leave();
}

/// What CUDA has as variables.
template <unsigned (*value)()>
struct Index {
  struct X {
    operator unsigned() const { return value(); }
  } x;
};
inline unsigned thread_index() { return unsigned(machine.current().thread); }
inline unsigned block_index() { return machine.block_index(); }
inline unsigned block_size() { return machine.threads; }
inline unsigned grid_size() { return machine.blocks; }

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber& f = machine.current();
  const int lane = f.thread % kWarp;
  if (mask != 0xffffffffu || machine.threads % kWarp != 0) machine.fail("shuffles with a part of a warp");
  uint64_t* places = machine.block().exchanged.data() + f.shuffles++ % 2 * machine.threads + (f.thread - lane);
  memcpy(places + lane, &value, sizeof value);
  machine.wait(machine.block().warps[size_t(f.thread / kWarp)], kWarp);
  memcpy(&value, places + source, sizeof value);
  return value;
}

}  // namespace shim

inline const shim::Index<shim::thread_index> threadIdx;
inline const shim::Index<shim::block_index> blockIdx;
inline const shim::Index<shim::block_size> blockDim;
inline const shim::Index<shim::grid_size> gridDim;

inline void __syncthreads() { shim::machine.wait(shim::machine.block().barrier, int(shim::machine.threads)); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return shim::shuffle(mask, value, (shim::machine.current().thread % shim::kWarp) ^ lanes);
}
