// What a monitor makes of a tensor (look.h): a thread for each element of a stride through all that is looked at, or a warp for
// each row of a softmax. Every warp adds what it has found to the counters in global memory; only the sums depend on the order.
#pragma once

#include "../look.h"
#include "reduce.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

constexpr int kLookThreads = 256;
// Blocks per multiprocessor, after which threads take a second element.
constexpr int kLookBlocks = 8;

struct Largest {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

template <class V, class Op = Sum>
__device__ __forceinline__ V of_warp(V v, Op op = {}) {
  return reduce_lanes(v, 1, kWarp, op);
}

template <class S>
__global__ void __launch_bounds__(kLookThreads) look(const S* x, Look a, Tally* tally, Histogram* histogram, uint8_t* units) {
  using T = decltype(unpack(S{}));
  const T low(a.low), high(a.high);
  uint32_t count = 0, zeros = 0, lows = 0, highs = 0, nans = 0, infinite = 0;
  uint64_t largest = 0, smallest = 0;
  double total = 0, squares = 0;
  const int64_t all = a.runs * Look::kRun, step = int64_t(gridDim.x) * kLookThreads;
  // The condition is the same for a whole block, so that its warps come to the sums below together.
  for (int64_t first = int64_t(blockIdx.x) * kLookThreads; first < all; first += step) {
    const int64_t e = first + threadIdx.x, i = start_of(a, e / Look::kRun) + e % Look::kRun;
    if (e >= all || i >= a.n) continue;
    const T v = unpack(x[i]);
    ++count;
    zeros += v == 0;
    lows += v <= low;
    highs += v >= high;
    nans += v != v;
    if (finite(v)) {
      const uint64_t up = key(double(v)), down = key(-double(v));
      largest = up > largest ? up : largest;
      smallest = down > smallest ? down : smallest;
      total += double(v);
      squares += double(v) * double(v);
      // Zeros, of which there may be many, are added together below.
      if (v != 0 && a.shown) atomicAdd(&histogram->counts[v < 0][bin(v)], 1u);
    } else {
      infinite += v == v;
    }
    if (a.units > 0) {
      const int64_t unit = remainder_of(divided(i, a.inner), a.units);
      units[unit] = 1;
      if (v != 0) units[a.units + unit] = 1;
    }
  }
  count = of_warp(count), zeros = of_warp(zeros), lows = of_warp(lows), highs = of_warp(highs);
  nans = of_warp(nans), infinite = of_warp(infinite);
  largest = of_warp(largest, Largest()), smallest = of_warp(smallest, Largest());
  total = of_warp(total), squares = of_warp(squares);
  if (threadIdx.x % kWarp != 0 || count == 0) return;
  add_to(&tally->count, count);
  add_to(&tally->zeros, zeros);
  add_to(&tally->low, lows);
  add_to(&tally->high, highs);
  add_to(&tally->nan, nans);
  add_to(&tally->infinite, infinite);
  if (a.shown && zeros > 0) atomicAdd(&histogram->counts[0][0], zeros);
  raise_to(&tally->largest, largest);
  raise_to(&tally->smallest, smallest);
  atomicAdd(&tally->total, total);
  atomicAdd(&tally->squares, squares);
}

template <class S>
__global__ void __launch_bounds__(kLookThreads) look_at_rows(const S* y, RowLook a, RowTally* tally) {
  using T = decltype(unpack(S{}));
  constexpr int kWarps = kLookThreads / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  for (int64_t first = int64_t(blockIdx.x) * kWarps; first < a.rows; first += int64_t(gridDim.x) * kWarps) {
    const int64_t j = first + threadIdx.x / kWarp;
    uint32_t sure = 0, nan = 0;
    double entropy = 0;
    if (j < a.rows) {
      const S* p = y + row_start(a, row_of(a, j));
#pragma unroll 1
      for (int64_t i = lane; i < a.length; i += kWarp) {
        T v = unpack(p[i * a.inner]);
        if (a.logarithms) v = exp_nonpositive(v);
        entropy += double(surprise(v));
        nan |= v != v;
        sure |= v > T(0.99);
      }
    }
    entropy = of_warp(entropy), nan = of_warp(nan), sure = of_warp(sure);
    if (lane != 0 || j >= a.rows) continue;
    add_to(&tally->count, 1);
    add_to(&tally->nan, nan > 0);
    add_to(&tally->sure, nan == 0 && sure > 0);
    if (nan == 0) atomicAdd(&tally->entropy, entropy * a.scale);
  }
}

template <class S>
int look(const void* x, Look a, Tally* tally, Histogram* histogram, uint8_t* units, cuda::Queue queue) {
  if (a.n == 0) return 0;
  const int64_t blocks = (a.runs * Look::kRun + kLookThreads - 1) / kLookThreads,
                most = int64_t(queue.multiprocessors) * kLookBlocks;
  return launch(look<S>, {blocks < most ? blocks : most, kLookThreads}, queue, static_cast<const S*>(x), a, tally, histogram,
                units);
}

template <class S>
int look_at_rows(const void* y, RowLook a, RowTally* tally, cuda::Queue queue) {
  if (a.rows == 0) return 0;
  const int64_t blocks = (a.rows * kWarp + kLookThreads - 1) / kLookThreads,
                most = int64_t(queue.multiprocessors) * kLookBlocks;
  return launch(look_at_rows<S>, {blocks < most ? blocks : most, kLookThreads}, queue, static_cast<const S*>(y), a, tally);
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
