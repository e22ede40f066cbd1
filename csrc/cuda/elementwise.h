// The elementwise kernel, forward and backward, for every functor and storage type.
#pragma once

#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

constexpr int kThreads = 256;
// 16-byte accesses a thread has under way per input: with the 1,536 or more threads that fit on a multiprocessor, at least the
// 48 KiB in flight that an H200's memory needs to be busy.
constexpr int kUnroll = 2;
// Blocks per multiprocessor, after which blocks take a second tile.
constexpr int kBlocks = 64;

/// Tensors of n elements in the same order. After `head` elements `out` is aligned; `congruent`: the inputs are, too.
template <class S, int kInputs>
struct Operands {
  const S* in[kInputs];
  S* out;
  int64_t n;
  int head = 0;
  bool congruent = true;
};

template <class Functor>
struct ForwardOf {
  Functor f;
  template <class V>
  __device__ __forceinline__ V operator()(const V* in) const {
    return f.forward(in[0]);
  }
};
template <class Functor>
struct BackwardOf {
  Functor f;
  template <class V>
  __device__ __forceinline__ V operator()(const V* in) const {
    return f.backward(in[0], in[1]);
  }
};

template <class F, class S, int kInputs>
__global__ void __launch_bounds__(kThreads) elementwise(Operands<S, kInputs> a, F f) {
  using V = LaneOf<S>;
  constexpr int N = kWidth<S>;
  constexpr int kTile = kThreads * kUnroll;
  const int64_t vectors = (a.n - a.head) / N;

  // Most blocks have one tile: unrolled, they would pay for the count of iterations first, a division of 64 bits.
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile * kTile < vectors; tile += gridDim.x) {
    const int64_t first = tile * kTile + threadIdx.x;
    Pack<S, N> in[kUnroll][kInputs];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = first + u * kThreads;
#pragma unroll
      for (int k = 0; k < kInputs; ++k)
        if (vector < vectors) in[u][k] = Pack<S, N>(a.in[k] + a.head + vector * N, a.congruent);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = first + u * kThreads;
      V out[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        V lanes[kInputs];
#pragma unroll
        for (int k = 0; k < kInputs; ++k) lanes[k] = in[u][k][j];
        out[j] = f(lanes);
      }
      if (vector < vectors) store<N>(a.out + a.head + vector * N, out);
    }
  }

  // What lies before the first whole vector and after the last.
  const int tail = int((a.n - a.head) % N), thread = int(threadIdx.x);
  if (blockIdx.x == 0 && thread < a.head + tail) {
    const int64_t i = thread < a.head ? thread : a.n - tail + (thread - a.head);
    V lanes[kInputs];
#pragma unroll
    for (int k = 0; k < kInputs; ++k) lanes[k] = unpack(a.in[k][i]);
    const V out = f(lanes);
    store<1>(a.out + i, &out);
  }
}

template <class F, class S, int kInputs>
int run(Operands<S, kInputs> a, F f, cuda::Queue queue) {
  if (a.n == 0) return 0;
  constexpr int N = kWidth<S>;
  const int64_t head = (16 - reinterpret_cast<uintptr_t>(a.out) % 16) % 16 / sizeof(S);
  a.head = int(head < a.n ? head : a.n);
  a.congruent = true;
  for (const S* in : a.in) a.congruent = a.congruent && aligned(in + a.head);
  const int64_t tiles = (a.n - a.head) / N / (kThreads * kUnroll) + 1, most = int64_t(queue.multiprocessors) * kBlocks;
  return launch(elementwise<F, S, kInputs>, {tiles < most ? tiles : most, kThreads}, queue, a, f);
}

template <template <class> class Functor, class S>
int forward(const void* x, void* y, int64_t n, const double* parameters, cuda::Queue queue) {
  using F = Functor<LaneOf<S>>;
  return run<ForwardOf<F>, S, 1>({{static_cast<const S*>(x)}, static_cast<S*>(y), n}, {F(parameters)}, queue);
}

template <template <class> class Functor, class S>
int backward(const void* dy, const void* saved, void* dx, int64_t n, const double* parameters, cuda::Queue queue) {
  using F = Functor<LaneOf<S>>;
  return run<BackwardOf<F>, S, 2>({{static_cast<const S*>(dy), static_cast<const S*>(saved)}, static_cast<S*>(dx), n},
                                  {F(parameters)}, queue);
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
