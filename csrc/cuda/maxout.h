// The kernels of maxout: a thread for a pack of neighbouring results, or where the pieces are neighbours for one.
#pragma once

#include "../maxout.h"
#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

constexpr int kMaxoutThreads = 256;

/// Which results a thread has: in y, and where the first piece of them is in x.
template <int N>
struct MaxoutPlace {
  int64_t y, x;
  bool mine;

  __device__ __forceinline__ explicit MaxoutPlace(const MaxoutShape& s) {
    y = (int64_t(blockIdx.x) * kMaxoutThreads + threadIdx.x) * N;
    mine = y < s.outer * s.groups * s.inner;
    const int64_t group = divided(y, s.inner);
    x = group * s.pieces * s.inner + (y - group * s.inner);
  }
};

template <class S, int N>
__global__ void __launch_bounds__(kMaxoutThreads)
    maxout_forward(const S* x, S* y, uint8_t* index, MaxoutShape s, bool aligned) {
  using V = LaneOf<S>;
  const MaxoutPlace<N> place(s);
  if (!place.mine) return;
  x += place.x;
  const Pack<S, N> first(x, aligned);
  V largest[N], which[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    largest[j] = first[j];
    which[j] = V(0);
  }
  for (int p = 1; p < int(s.pieces); ++p) {
    const Pack<S, N> piece(x + p * s.inner, aligned);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Maxout<V> m(largest[j]);
      m.which = which[j];
      m.take(piece[j], V(p));
      largest[j] = m.largest;
      which[j] = m.which;
    }
  }
  store<N>(y + place.y, largest);
#pragma unroll
  for (int j = 0; j < N; ++j) index[place.y + j] = uint8_t(raw(which[j]));
}

template <class S, int N>
__global__ void __launch_bounds__(kMaxoutThreads)
    maxout_backward(const S* dy, const uint8_t* index, S* dx, MaxoutShape s, bool aligned) {
  using V = LaneOf<S>;
  const MaxoutPlace<N> place(s);
  if (!place.mine) return;
  const Pack<S, N> gradient(dy + place.y, aligned);
  uint8_t which[N];
#pragma unroll
  for (int j = 0; j < N; ++j) which[j] = index[place.y + j];
  dx += place.x;
  for (int p = 0; p < int(s.pieces); ++p, dx += s.inner) {
    V out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = which[j] == p ? V(gradient[j]) : V(0);
    store<N>(dx, out);
  }
}

template <int N>
Grid maxout_grid(const MaxoutShape& s) {
  return {(s.outer * s.groups * s.inner / N + kMaxoutThreads - 1) / kMaxoutThreads, kMaxoutThreads};
}

template <class S>
int maxout_forward(const void* x_, void* y_, uint8_t* index, MaxoutShape s, cuda::Queue queue) {
  constexpr int N = kWidth<S>;
  const S* x = static_cast<const S*>(x_);
  S* y = static_cast<S*>(y_);
  if (s.inner % N == 0) return launch(maxout_forward<S, N>, maxout_grid<N>(s), queue, x, y, index, s, aligned(x));
  return launch(maxout_forward<S, 1>, maxout_grid<1>(s), queue, x, y, index, s, aligned(x));
}

template <class S>
int maxout_backward(const void* dy_, const uint8_t* index, void* dx_, MaxoutShape s, cuda::Queue queue) {
  constexpr int N = kWidth<S>;
  const S* dy = static_cast<const S*>(dy_);
  S* dx = static_cast<S*>(dx_);
  if (s.inner % N == 0) return launch(maxout_backward<S, N>, maxout_grid<N>(s), queue, dy, index, dx, s, aligned(dy));
  return launch(maxout_backward<S, 1>, maxout_grid<1>(s), queue, dy, index, dx, s, aligned(dy));
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
