// Memory for large outputs on the CPU. The system hands out large blocks page by page, each zeroed when it is first touched,
// and takes them back when they are freed: that costs more than computing an activation. The C library, which keeps smaller
// ones, tidies up whenever it gets one of 64 KiB, and gives now this block and now that, until they are more than a cache
// holds. Here freed blocks are kept, up to a limit, the one freed last is the next one out, and new large ones lie on huge
// pages.
#pragma once

#include <c10/core/Allocator.h>

namespace fastact::pool {

/// Bytes from which an output comes from the pool.
constexpr size_t kLeast = size_t(64) << 10;
/// Bytes from which a block is one of the system's; those below are the C library's.
constexpr size_t kLarge = size_t(1) << 20;

/// The pool, or torch's own allocator where there is nothing the pool would do.
c10::Allocator* allocator(size_t bytes);

/// Whether memory with that deleter is from here.
bool gave(c10::DeleterFnPtr deleter);

/// Before that, every output comes from torch's allocator.
void start(size_t limit, bool huge_pages);

struct Stats {
  size_t limit, held, blocks, in_use, hits, misses;  // the first, the second and the fourth in bytes
};
Stats stats();

/// The most bytes that are held for later; more are released at once. 0 holds nothing.
void set_limit(size_t bytes);

/// Releases all that is held.
void empty_cache();

}  // namespace fastact::pool
