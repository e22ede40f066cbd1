// Sums, and other reductions, over the lanes of a warp.
#pragma once

#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

__device__ __forceinline__ double shuffle(double v, int mask) { return __shfl_xor_sync(kWholeWarp, v, mask); }
__device__ __forceinline__ float shuffle(float v, int mask) { return __shfl_xor_sync(kWholeWarp, v, mask); }
__device__ __forceinline__ Quick shuffle(Quick v, int mask) { return __shfl_xor_sync(kWholeWarp, v.v, mask); }

__device__ __forceinline__ uint32_t shuffle(uint32_t v, int mask) { return __shfl_xor_sync(kWholeWarp, v, mask); }
__device__ __forceinline__ uint64_t shuffle(uint64_t v, int mask) {
  return shuffle(uint32_t(v), mask) | uint64_t(shuffle(uint32_t(v >> 32), mask)) << 32;
}

struct Sum {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};

/// Lanes of a warp whose numbers differ in the bits from `low` up to below `high`, powers of two.
template <class V, class Op>
__device__ __forceinline__ V reduce_lanes(V v, int low, int high, Op op) {
  for (int bit = low; bit < high; bit *= 2) v = op(v, shuffle(v, bit));
  return v;
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
