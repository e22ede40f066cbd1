// The kernels of activations with parameters per channel: forward; and backward, whose sums are made in two stages. A block
// leaves a number per channel that it has seen in a workspace, and a second kernel adds these up, in an order that follows from
// the shape alone.
#pragma once

#include "../channels.h"
#include "reduce.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

constexpr int kChannelThreads = 256;
// Packs a thread has of each input, all under way at once.
constexpr int kChannelPacks = 4;

/// What the sums of a block are kept in.
template <class S>
using SumOf = typename ElementOf<LaneOf<S>>::type;

template <class S>
struct ChannelOperands {
  const S* in[2];  // x; or dy, x
  S* out;          // null: not wanted
  const S* parameters[kMaxParameters];
  SumOf<S>* sums;  // [parameter][slice][channel]; null: not wanted
  bool aligned;    // whether `in` is
  bool congruent;  // whether `parameters` are
};

/// Which elements a block has. Where a channel has lines along memory, a slice of all that the channel has, in order; so many
/// packs. Else, where neighbours in memory are channels, so many rows of a tile of columns.
struct ChannelPlan {
  bool lines, wide;
  int bits;        // columns: 2^bits threads side by side
  int64_t slices;  // blocks that share a channel
  int64_t tiles;   // blocks side by side: of lines, a channel each

  ChannelPlan(const ChannelShape& s, int width) {
    lines = s.channels == 1 || s.inner > 1;
    wide = (lines ? s.inner : s.channels) % width == 0;
    const int n = wide ? width : 1;
    const auto parts = [](int64_t all, int64_t each) { return (all + each - 1) / each; };
    if (lines) {
      bits = 0;
      tiles = s.channels;
      slices = parts(s.outer * (s.inner / n), kChannelThreads * kChannelPacks);
    } else {
      const int64_t packs = s.channels / n;
      for (bits = 0; bits < 5 && (int64_t(1) << bits) < packs;) ++bits;
      tiles = parts(packs, int64_t(1) << bits);
      slices = parts(s.outer, int64_t(kChannelThreads >> bits) * kChannelPacks);
    }
  }
};

/// One pack: what comes out, and what it adds to the sums of the parameters.
template <bool kForward, class F, class V, class P, int K>
__device__ __forceinline__ V channel_element(const F& f, const P (&in)[kForward ? 1 : 2], int j, V (&sums)[K]) {
  if constexpr (kForward) {
    return f.forward(in[0][j]);
  } else {
    V terms[K];
    const V out = f.backward(in[0][j], in[1][j], terms);
#pragma unroll
    for (int k = 0; k < K; ++k) sums[k] = sums[k] + terms[k];
    return out;
  }
}

template <template <class> class Functor, class S, int N, bool kForward>
__global__ void __launch_bounds__(kChannelThreads) channel_lines(ChannelOperands<S> a, ChannelShape s, ChannelPlan plan) {
  using V = LaneOf<S>;
  constexpr int K = Functor<V>::parameters, kInputs = kForward ? 1 : 2;
  const int64_t channel = blockIdx.x % unsigned(plan.tiles), slice = blockIdx.x / unsigned(plan.tiles);
  const int64_t packs = s.inner / N, all = s.outer * packs;

  const int64_t start = slice * (kChannelPacks * kChannelThreads), first = divided(start, packs);
  const int64_t rest = start - first * packs;

  Pack<S, N> in[kChannelPacks][kInputs];
  int64_t at[kChannelPacks];
#pragma unroll
  for (int u = 0; u < kChannelPacks; ++u) {
    const int next = u * kChannelThreads + int(threadIdx.x);
    at[u] = -1;
    if (start + next < all) {
      const int64_t pack = rest + next, lines = packs >> 31 ? pack >= packs : uint32_t(pack) / uint32_t(packs);
      at[u] = ((first + lines) * s.channels + channel) * s.inner + (pack - lines * packs) * N;
#pragma unroll
      for (int i = 0; i < kInputs; ++i) in[u][i] = Pack<S, N>(a.in[i] + at[u], a.aligned);
    }
  }
  V parameters[K], sums[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    parameters[k] = unpack(a.parameters[k][channel]);
    sums[k] = V(0);
  }
  const Functor<V> f(parameters);
#pragma unroll
  for (int u = 0; u < kChannelPacks; ++u) {
    if (at[u] < 0) continue;
    V out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = channel_element<kForward>(f, in[u], j, sums);
    if (kForward || a.out) store<N>(a.out + at[u], out);
  }

  if constexpr (!kForward) {
    if (!a.sums) return;
    constexpr int kWarps = kChannelThreads / kWarp;
    V* shared = static_cast<V*>(shared_memory());  // [parameter][warp]
#pragma unroll
    for (int k = 0; k < K; ++k) {
      sums[k] = reduce_lanes(sums[k], 1, kWarp, Sum());
      if (threadIdx.x % kWarp == 0) shared[k * kWarps + threadIdx.x / kWarp] = sums[k];
    }
    __syncthreads();
    if (threadIdx.x < K) {
      V sum = shared[threadIdx.x * kWarps];
      for (int w = 1; w < kWarps; ++w) sum = sum + shared[threadIdx.x * kWarps + w];
      a.sums[(threadIdx.x * plan.slices + slice) * s.channels + channel] = raw(sum);
    }
  }
}

template <template <class> class Functor, class S, int N, bool kForward>
__global__ void __launch_bounds__(kChannelThreads) channel_columns(ChannelOperands<S> a, ChannelShape s, ChannelPlan plan) {
  using V = LaneOf<S>;
  constexpr int K = Functor<V>::parameters, kInputs = kForward ? 1 : 2;
  const int across = 1 << plan.bits, lines = kChannelThreads >> plan.bits;
  const int column = int(threadIdx.x) & (across - 1), line = int(threadIdx.x) >> plan.bits;
  const int64_t tile = blockIdx.x % unsigned(plan.tiles), slice = blockIdx.x / unsigned(plan.tiles);
  const int64_t channel = (tile * across + column) * N, first = slice * kChannelPacks * lines + line;
  const bool mine = channel < s.channels;

  Pack<S, N> in[kChannelPacks][kInputs], parameters[K];
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (mine) parameters[k] = Pack<S, N>(a.parameters[k] + channel, a.congruent);
#pragma unroll
  for (int u = 0; u < kChannelPacks; ++u) {
    const int64_t row = first + u * lines;
#pragma unroll
    for (int i = 0; i < kInputs; ++i)
      if (mine && row < s.outer) in[u][i] = Pack<S, N>(a.in[i] + row * s.channels + channel, a.aligned);
  }
  V sums[N][K];
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int k = 0; k < K; ++k) sums[j][k] = V(0);
#pragma unroll
  for (int u = 0; u < kChannelPacks; ++u) {
    const int64_t row = first + u * lines;
    if (!mine || row >= s.outer) continue;
    V out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      V p[K];
#pragma unroll
      for (int k = 0; k < K; ++k) p[k] = parameters[k][j];
      out[j] = channel_element<kForward>(Functor<V>(p), in[u], j, sums[j]);
    }
    if (kForward || a.out) store<N>(a.out + row * s.channels + channel, out);
  }

  if constexpr (!kForward) {
    if (!a.sums) return;
    const int width = across * N;
    V* shared = static_cast<V*>(shared_memory());  // [parameter][line][column]
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j) shared[(k * lines + line) * width + column * N + j] = sums[j][k];
    __syncthreads();
    for (int t = int(threadIdx.x); t < K * width; t += kChannelThreads) {
      const int k = t / width, c = t - k * width;
      const int64_t to = tile * width + c;
      V sum = shared[k * lines * width + c];
      for (int l = 1; l < lines; ++l) sum = sum + shared[(k * lines + l) * width + c];
      if (to < s.channels) a.sums[(k * plan.slices + slice) * s.channels + to] = raw(sum);
    }
  }
}

/// From what the blocks have left to the gradient of a parameter: a warp per channel.
template <class S>
__global__ void __launch_bounds__(kChannelThreads)
    channel_totals(const SumOf<S>* sums, S* gradient, ChannelShape s, int64_t slices) {
  const int64_t channel = (int64_t(blockIdx.x) * kChannelThreads + threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  if (channel >= s.channels) return;  // all lanes of the warp alike
  // There may be thousands of slices to a lane: in double, so that their number does not show.
  double sum = 0;
  for (int64_t i = lane; i < slices; i += kWarp) sum += sums[i * s.channels + channel];
  sum = reduce_lanes(sum, 1, kWarp, Sum());
  if (lane == 0) gradient[channel] = rounded<S>(LaneOf<S>(sum));
}

template <template <class> class Functor, bool kForward, class S>
int run_channels(const ChannelOperands<S>& a, const ChannelShape& s, const ChannelPlan& plan, cuda::Queue queue) {
  constexpr int N = kWidth<S>, K = Functor<LaneOf<S>>::parameters;
  const int kept = plan.lines ? kChannelThreads / kWarp : kChannelThreads * (plan.wide ? N : 1);
  const Grid grid = {plan.tiles * plan.slices, kChannelThreads, 1, a.sums ? K * kept * int(sizeof(SumOf<S>)) : 0};
  auto* kernel = plan.lines  ? plan.wide ? channel_lines<Functor, S, N, kForward> : channel_lines<Functor, S, 1, kForward>
                  : plan.wide ? channel_columns<Functor, S, N, kForward>
                             : channel_columns<Functor, S, 1, kForward>;
  return launch(kernel, grid, queue, a, s, plan);
}

template <template <class> class Functor, class S>
ChannelOperands<S> channel_operands(const void* first, const void* second, void* out, const void* const* parameters) {
  constexpr int K = Functor<LaneOf<S>>::parameters;
  ChannelOperands<S> a = {{static_cast<const S*>(first), static_cast<const S*>(second)},
                          static_cast<S*>(out),
                          {},
                          nullptr,
                          aligned(first) && aligned(second),
                          true};
  for (int k = 0; k < K; ++k) {
    a.parameters[k] = static_cast<const S*>(parameters[k]);
    a.congruent = a.congruent && aligned(parameters[k]);
  }
  return a;
}

template <template <class> class Functor, class S>
int channel_forward(const void* x, void* y, const void* const* parameters, ChannelShape s, cuda::Queue queue) {
  return run_channels<Functor, true>(channel_operands<Functor, S>(x, nullptr, y, parameters), s, ChannelPlan(s, kWidth<S>),
                                     queue);
}

template <template <class> class Functor, class S>
int channel_backward(const void* dy, const void* x, void* dx, const void* const* parameters, void* const* gradients,
                     void* workspace, ChannelShape s, cuda::Queue queue) {
  constexpr int K = Functor<LaneOf<S>>::parameters;
  const ChannelPlan plan(s, kWidth<S>);
  ChannelOperands<S> a = channel_operands<Functor, S>(dy, x, dx, parameters);
  a.sums = static_cast<SumOf<S>*>(workspace);
  if (int error = run_channels<Functor, false>(a, s, plan, queue)) return error;
  const Grid totals = {(s.channels * kWarp + kChannelThreads - 1) / kChannelThreads, kChannelThreads};
  for (int k = 0; workspace && k < K; ++k) {
    if (!gradients[k]) continue;
    const SumOf<S>* sums = a.sums + k * plan.slices * s.channels;
    if (int error = launch(channel_totals<S>, totals, queue, sums, static_cast<S*>(gradients[k]), s, plan.slices)) return error;
  }
  return 0;
}

template <class S>
int64_t channel_workspace(ChannelShape s, int parameters) {
  return parameters * ChannelPlan(s, kWidth<S>).slices * s.channels * int64_t(sizeof(SumOf<S>));
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
