// The kernels of the functors of softmax.h (F). Each reads its input once and writes its output once, as long as the threads
// that share a row can hold it in their registers: a part of a warp, a warp, a block, or on sm_90 a cluster of blocks. Longer
// rows are read twice.
//
// Which element goes to which thread, and so the order in which a row is summed, follows from length, inner and the kind of
// device; not from where in the tensor the row lies, from its address, its neighbours, or how many there are.
#pragma once

#include "../softmax.h"
#include "reduce.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

// Threads of a block: where a row takes less than a warp or little more; and the most, which may use 128 registers each.
constexpr int kUsualThreads = 128, kMostThreads = 512;
// The most blocks of a cluster, where the device has them.
constexpr int kMostBlocks = 16;

/// What the terms of a row are computed with.
template <class S>
struct Terms {
  using Lane = LaneOf<S>;
};
template <>
struct Terms<Float16> {
  using Lane = Quick;
};
template <class S>
using TermOf = typename Terms<S>::Lane;

__device__ __forceinline__ double larger(double a, double b) { return __builtin_fmax(a, b); }
__device__ __forceinline__ float larger(float a, float b) { return __builtin_fmaxf(a, b); }
__device__ __forceinline__ Quick larger(Quick a, Quick b) { return __builtin_fmaxf(a.v, b.v); }

// ---- Reductions: trees, whose result every thread gets -------------------------------------------------------------------

struct Larger {
  /// What changes nothing: below every number. NaN does not come through, and need not (../softmax.h).
  template <class V>
  __device__ __forceinline__ static V none() {
    return V(-__builtin_inff());
  }
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return larger(a, b);
  }
};
/// Those who share a row: 2^bits threads, up to a block, or all of a cluster of blocks.
struct Team {
  int size, rank;  // rank: which of them this thread is
  int blocks;      // 1, or those of the cluster
  int64_t row;

  __device__ __forceinline__ Team(int bits, int blocks_) : size(1 << bits), blocks(blocks_) {
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    row = thread >> bits;
    rank = int(thread & (size - 1));
  }

  /// `slot`: 0, 1, ... for the first, second, ... reduction of a kernel: each leaves its results where no later one writes.
  template <class V, class Op>
  __device__ __forceinline__ V reduce(V v, Op op, int slot) const {
    v = reduce_lanes(v, 1, size < kWarp ? size : kWarp, op);
    if (size <= kWarp) return v;
    V* shared = static_cast<V*>(shared_memory()) + slot * (kWarp + 1);
    const int warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    if (lane == 0) shared[threadIdx.x / kWarp] = v;
    __syncthreads();
    v = reduce_lanes(shared[lane & (warps - 1)], 1, warps, op);
    if (blocks == 1) return v;
    if (threadIdx.x == 0) shared[kWarp] = v;
    cluster_barrier();
    return reduce_lanes(*cluster_peer(shared + kWarp, lane & (blocks - 1)), 1, blocks, op);
  }
  /// No block may end while another one reads its shared memory.
  __device__ __forceinline__ void finish() const {
    if (blocks > 1) cluster_barrier();
  }

  /// Bytes of shared memory that so many reductions of numbers of that size need.
  static constexpr int shared(int slots, int size) { return slots * (kWarp + 1) * size; }
};

// ---- Rows along memory ---------------------------------------------------------------------------------------------------

/// What a thread holds of its row: E elements, as packs of N neighbours, pack i being number i * team.size + team.rank.
template <class S, int N, int E>
struct RowShare {
  int64_t first;  // where in the tensor pack 0 begins
  int step;       // from a pack to the next
  int count;      // the packs this thread has
  int most;       // the packs the first of the team has

  __device__ __forceinline__ RowShare(const Team& team, int64_t rows, int length)
      : first(team.row * length + team.rank * N), step(team.size * N) {
    const int rest = team.row < rows ? length : 0;
    most = (rest + step - 1) / step;
    count = rest > team.rank * N ? (rest - team.rank * N + step - 1) / step : 0;
  }

  /// What the row does not have is `rest`.
  __device__ __forceinline__ void load_all(const S* p, bool aligned, Pack<S, N> (&packs)[E / N], S rest) const {
    p += first;
#pragma unroll
    for (int i = 0; i < E / N; ++i, p += step) {
      packs[i] = Pack<S, N>(rest);
      if (i < count) packs[i] = Pack<S, N>(p, aligned);
    }
  }
};

/// A sum of many terms in four parts, so that additions need not wait for each other and errors stay small.
template <class V>
struct Parts {
  V part[4];
  __device__ __forceinline__ Parts() : part{V(0), V(0), V(0), V(0)} {}
  __device__ __forceinline__ V total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

template <template <class> class F, class S, int N, int E>
__global__ void __launch_bounds__(kMostThreads, 1)
    softmax_rows(const S* x, S* y, F<TermOf<S>> f, int64_t rows, int length, int team_bits, int blocks, bool aligned) {
  using V = TermOf<S>;
  const Team team(team_bits, blocks);
  const RowShare<S, N, E> share(team, rows, length);

  Pack<S, N> packs[E / N];
  share.load_all(x, aligned, packs, rounded<S>(Larger::none<V>()));
  V e[E];
  V m = f.least();
#pragma unroll
  for (int i = 0; i < E; ++i) {
    e[i] = packs[i / N][i % N];
    m = larger(m, e[i]);
  }
  m = team.reduce(m, Larger(), 0);

  Parts<V> sum;
#pragma unroll
  for (int i = 0; i < E / N; ++i) {
    if (i >= share.most) break;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const V term = f.term(e[i * N + k], m);
      sum.part[(i * N + k) % 4] = sum.part[(i * N + k) % 4] + term;
      if constexpr (F<V>::keeps_terms) e[i * N + k] = term;
    }
  }
  const V factor = f.factor(team.reduce(sum.total(), Sum(), 1));
  y += share.first;
#pragma unroll
  for (int i = 0; i < E / N; ++i, y += share.step) {
    if (i >= share.count) break;
#pragma unroll
    for (int k = 0; k < N; ++k) e[i * N + k] = f.forward(e[i * N + k], m, factor);
    store<N>(y, e + i * N);
  }
  team.finish();
}

template <template <class> class F, class S, int N, int E>
__global__ void __launch_bounds__(kMostThreads, 1)
    softmax_backward_rows(const S* dy, const S* y, S* dx, F<TermOf<S>> f, int64_t rows, int length, int team_bits, int blocks,
                          bool aligned) {
  using V = TermOf<S>;
  const Team team(team_bits, blocks);
  const RowShare<S, N, E> share(team, rows, length);

  Pack<S, N> gradient[E / N], kept[E / N];
  share.load_all(dy, aligned, gradient, S{});
  share.load_all(y, aligned, kept, S{});
  Parts<V> sum;
#pragma unroll
  for (int i = 0; i < E; ++i) sum.part[i % 4] = f.product(gradient[i / N][i % N], kept[i / N][i % N], sum.part[i % 4]);
  const V dot = team.reduce(sum.total(), Sum(), 0);
  dx += share.first;
#pragma unroll
  for (int i = 0; i < E / N; ++i, dx += share.step) {
    if (i >= share.count) break;
    gradient[i].renew();
    kept[i].renew();
    V out[N];
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = f.backward(gradient[i][k], kept[i][k], dot);
    store<N>(dx, out);
  }
  team.finish();
}

// ---- Rows across memory --------------------------------------------------------------------------------------------------

/// How a tensor (outer, length, inner) is cut: a block has `columns` threads along inner, each with a pack of N columns, and
/// `lines` along length, each with kDepth places of the row; both powers of two. Where these two are less than a warp, `group`
/// outer indices share the block. A row has the lines of one block, of the blocks of a cluster, or of `chunks` blocks.
struct Cut {
  int columns, lines, group, blocks;
  unsigned tiles;   // of columns * N along inner
  unsigned chunks;  // of the length

  template <class V>
  int shared(int n) const {
    return columns * lines <= kWarp ? 0 : (columns * lines / kWarp + 2) * columns * n * int(sizeof(V));
  }
};

/// A thread's place in the cut.
template <int N, int kDepth>
struct Place {
  int64_t outer, column;  // the first of the pack's columns
  int64_t chunk;
  int64_t first, step;  // where in the tensor the thread's packs are: first, first + step, ...
  int count;            // how many
  bool leads;           // on the first line

  __device__ __forceinline__ Place(const SoftmaxShape& s, const Cut& c) {
    const int thread = int(threadIdx.x);
    unsigned block = blockIdx.x / unsigned(c.blocks);
    chunk = block % c.chunks;
    block /= c.chunks;
    outer = int64_t(block / c.tiles) * c.group + thread / (c.columns * c.lines);
    column = (int64_t(block % c.tiles) * c.columns + thread % c.columns) * N;
    const int lines = c.lines * c.blocks;
    const int line = (c.blocks > 1 ? cluster_rank() * c.lines : 0) + thread / c.columns % c.lines;
    const int64_t begin = chunk * (int64_t(lines) * kDepth) + line;
    const int64_t rest = outer < s.outer && column < s.inner && begin < s.length ? s.length - begin : 0;
    count = rest >= int64_t(lines) * kDepth ? kDepth : (int(rest) + lines - 1) / lines;
    leads = line == 0 && rest > 0;
    first = (outer * s.length + begin) * s.inner + column;
    step = lines * s.inner;
  }
};

/// Over all lines, each of N columns by itself.
template <int N, class V, class Op>
__device__ __forceinline__ void reduce_lines(V (&v)[N], const Cut& c, Op op) {
  const int threads = c.columns * c.lines;
#pragma unroll
  for (int k = 0; k < N; ++k) v[k] = reduce_lanes(v[k], c.columns, threads < kWarp ? threads : kWarp, op);
  if (threads <= kWarp) return;

  const int width = c.columns * N, warps = threads / kWarp, thread = int(threadIdx.x), column = thread % c.columns * N;
  V* parts = static_cast<V*>(shared_memory());  // [warps][width]
  V* block = parts + warps * width;             // [width]
  V* total = block + width;                     // [width]
  if (thread % kWarp < c.columns)
    for (int k = 0; k < N; ++k) parts[thread / kWarp * width + column + k] = v[k];
  __syncthreads();
  V* result = c.blocks > 1 ? block : total;
  for (int t = thread; t < width; t += threads) {
    V sum = parts[t];
    for (int w = 1; w < warps; ++w) sum = op(sum, parts[w * width + t]);
    result[t] = sum;
  }
  if (c.blocks > 1) {
    cluster_barrier();
    for (int t = thread; t < width; t += threads) {
      V sum = *cluster_peer(block + t, 0);
      for (int b = 1; b < c.blocks; ++b) sum = op(sum, *cluster_peer(block + t, b));
      total[t] = sum;
    }
    cluster_barrier();
  } else {
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < N; ++k) v[k] = total[column + k];
}

/// What the two-read kernels keep of a chunk of a row, and then of the row. [chunk or row][which][column].
template <class V>
struct Notes {
  V* parts;   // [outer][chunks][2][inner]
  V* totals;  // [outer][2][inner]

  __host__ __device__ Notes(void* workspace, const SoftmaxShape& s, const Cut& c)
      : parts(static_cast<V*>(workspace)), totals(parts + s.outer * c.chunks * 2 * s.inner) {}
  static int64_t bytes(const SoftmaxShape& s, const Cut& c) {
    return s.outer * (c.chunks + 1) * 2 * s.inner * int64_t(sizeof(V));
  }
};

enum Phase { kWhole, kPart, kRest };

/// The notes of this thread's chunk, and of its row.
template <class V, class Place>
__device__ __forceinline__ V* part_of(void* workspace, const SoftmaxShape& s, const Cut& c, const Place& place) {
  return Notes<V>(workspace, s, c).parts + (place.outer * c.chunks + place.chunk) * 2 * s.inner + place.column;
}
template <class V, class Place>
__device__ __forceinline__ const V* total_of(void* workspace, const SoftmaxShape& s, const Cut& c, const Place& place) {
  return Notes<V>(workspace, s, c).totals + place.outer * 2 * s.inner + place.column;
}

/// kWhole: the row is held by this block or its cluster. kPart: maximum and sum of a chunk go to the notes. kRest: those of the
/// row come from there.
template <template <class> class F, class S, int N, int kDepth, Phase phase>
__global__ void __launch_bounds__(kMostThreads, 1)
    softmax_columns(const S* x, S* y, F<TermOf<S>> f, SoftmaxShape s, Cut c, bool aligned, void* workspace) {
  using V = TermOf<S>;
  const Place<N, kDepth> place(s, c);
  V e[kDepth][N], m[N], factor[N];
  x += place.first;
#pragma unroll
  for (int i = 0; i < kDepth; ++i, x += place.step) {
#pragma unroll
    for (int k = 0; k < N; ++k) e[i][k] = Larger::none<V>();
    if (i < place.count) {
      const Pack<S, N> p(x, aligned);
#pragma unroll
      for (int k = 0; k < N; ++k) e[i][k] = p[k];
    }
  }
  if constexpr (phase == kRest) {
    const V* notes = total_of<V>(workspace, s, c, place);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      m[k] = place.count > 0 ? notes[k] : V(0);
      factor[k] = place.count > 0 ? notes[s.inner + k] : V(0);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      m[k] = e[0][k];
#pragma unroll
      for (int i = 1; i < kDepth; ++i) m[k] = larger(m[k], e[i][k]);
    }
    reduce_lines(m, c, Larger());
#pragma unroll
    for (int k = 0; k < N; ++k)
      if constexpr (phase == kWhole) m[k] = larger(m[k], f.least());
  }
  // Of a chunk the sum alone is wanted, of the rest the terms alone, and those only where y is made of them.
  if constexpr (phase != kRest || F<V>::keeps_terms) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      // A chunk that is all -inf counts for nothing in a row that is not.
      const V shift = phase == kPart && m[k] == Larger::none<V>() ? V(0) : m[k];
      V sum;
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        const V term = f.term(e[i][k], shift);
        sum = i == 0 ? term : sum + term;
        if constexpr (F<V>::keeps_terms) e[i][k] = term;
      }
      if constexpr (phase != kRest) factor[k] = sum;
    }
  }
  if constexpr (phase != kRest) reduce_lines(factor, c, Sum());
  if constexpr (phase == kPart) {
    if (place.leads) {
      V* notes = part_of<V>(workspace, s, c, place);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        notes[k] = m[k];
        notes[s.inner + k] = factor[k];
      }
    }
  } else {
    if constexpr (phase == kWhole)
#pragma unroll
      for (int k = 0; k < N; ++k) factor[k] = f.factor(factor[k]);
    y += place.first;
#pragma unroll
    for (int i = 0; i < kDepth; ++i, y += place.step) {
      if (i >= place.count) break;
#pragma unroll
      for (int k = 0; k < N; ++k) e[i][k] = f.forward(e[i][k], m[k], factor[k]);
      store<N>(y, e[i]);
    }
  }
}

/// Likewise, with the sum of the products.
template <template <class> class F, class S, int N, int kDepth, Phase phase>
__global__ void __launch_bounds__(kMostThreads, 1)
    softmax_backward_columns(const S* dy, const S* y, S* dx, F<TermOf<S>> f, SoftmaxShape s, Cut c, bool aligned,
                             void* workspace) {
  using V = TermOf<S>;
  const Place<N, kDepth> place(s, c);
  Pack<S, N> gradient[kDepth], kept[kDepth];
  V dot[N];
  dy += place.first;
  y += place.first;
#pragma unroll
  for (int i = 0; i < kDepth; ++i, dy += place.step, y += place.step) {
    gradient[i] = kept[i] = Pack<S, N>(S{});
    if (i < place.count) {
      gradient[i] = Pack<S, N>(dy, aligned);
      kept[i] = Pack<S, N>(y, aligned);
    }
  }
  if constexpr (phase == kRest) {
    const V* notes = total_of<V>(workspace, s, c, place);
#pragma unroll
    for (int k = 0; k < N; ++k) dot[k] = place.count > 0 ? notes[k] : V(0);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      dot[k] = V(0);
#pragma unroll
      for (int i = 0; i < kDepth; ++i) dot[k] = f.product(gradient[i][k], kept[i][k], dot[k]);
    }
    reduce_lines(dot, c, Sum());
  }
  if constexpr (phase == kPart) {
    if (place.leads) {
      V* notes = part_of<V>(workspace, s, c, place);
#pragma unroll
      for (int k = 0; k < N; ++k) notes[k] = dot[k];
    }
  } else {
    dx += place.first;
#pragma unroll
    for (int i = 0; i < kDepth; ++i, dx += place.step) {
      if (i >= place.count) break;
      gradient[i].renew();
      kept[i].renew();
      V out[N];
#pragma unroll
      for (int k = 0; k < N; ++k) out[k] = f.backward(gradient[i][k], kept[i][k], dot[k]);
      store<N>(dx, out);
    }
  }
}

/// From the notes of the chunks to those of the row: a warp per row.
template <template <class> class F, class V, bool kForward>
__global__ void __launch_bounds__(kMostThreads, 1) softmax_totals(F<V> f, SoftmaxShape s, Cut c, void* workspace) {
  const Notes<V> notes(workspace, s, c);
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  if (row >= s.outer * s.inner) return;  // all lanes of the warp alike
  const int64_t outer = row / s.inner, column = row % s.inner, stride = 2 * s.inner;
  const V* parts = notes.parts + outer * c.chunks * stride + column;
  V* total = notes.totals + outer * stride + column;
  V m = f.least();
  if constexpr (kForward) {
    for (int64_t i = lane; i < c.chunks; i += kWarp) m = larger(m, parts[i * stride]);
    m = reduce_lanes(m, 1, kWarp, Larger());
  }
  // There may be thousands of chunks to a lane: in double, so that their number does not show.
  double sum = 0;
  for (int64_t i = lane; i < c.chunks; i += kWarp)
    sum += raw(kForward ? parts[i * stride + s.inner] * f.term(parts[i * stride], m) : parts[i * stride]);
  sum = reduce_lanes(sum, 1, kWarp, Sum());
  if (lane == 0) {
    total[0] = kForward ? m : V(sum);
    if (kForward) total[s.inner] = f.factor(V(sum));
  }
}

// ---- Launches --------------------------------------------------------------------------------------------------------------

/// How much of a row a thread holds: elements of a row along memory, where a warp has enough and where more threads share it;
/// places of a pack of columns, and of a single one, of rows across memory. Registers have room for it beside the arithmetic.
template <class S>
struct Share {
  static constexpr int kFew = sizeof(S) == 8 ? 4 : 8, kMany = sizeof(S) == 8 ? 16 : 32;
  static constexpr int kDeep = sizeof(S) == 8 ? 4 : 8, kSingle = 16;
};

inline int bits_for(int64_t n) {
  int bits = 0;
  while ((int64_t(1) << bits) < n) ++bits;
  return bits;
}

/// For rows along memory: so many elements a thread, 2^bits threads a row.
struct RowPlan {
  int elements, bits;
  Grid grid;

  /// False where no block, and no cluster where there are clusters, can hold the row.
  bool make(const SoftmaxShape& s, int few, int many, int lane_size, bool clusters) {
    if (s.inner != 1) return false;
    elements = s.length <= kWarp * few ? few : many;
    bits = bits_for((s.length + elements - 1) / elements);
    const int64_t team = int64_t(1) << bits, most = clusters ? kMostThreads * kMostBlocks : kMostThreads;
    if (team > most) return false;
    grid.threads = team <= kWarp ? kUsualThreads : team < kMostThreads ? int(team) : kMostThreads;
    grid.cluster = team > kMostThreads ? int(team / kMostThreads) : 1;
    grid.blocks = (s.outer * team + grid.threads - 1) / grid.threads;
    grid.shared = team > kWarp ? Team::shared(2, lane_size) : 0;
    return true;
  }
};

/// For rows across memory, and for what is too long for the other.
inline Cut make_cut(const SoftmaxShape& s, int n, int depth, bool clusters) {
  Cut c;
  const int64_t packs = (s.inner + n - 1) / n;
  const int lines = bits_for((s.length + depth - 1) / depth);
  int columns = bits_for(packs) < 5 ? bits_for(packs) : 5;
  // 128 bytes of neighbours are read at once, or 64 of 16-bit numbers one by one.
  const int least = n > 1 ? 3 : 5, most = bits_for(kMostThreads);
  while (columns > least && columns + lines > most) --columns;
  const int threads = columns + lines < most ? columns + lines : most, blocks = columns + lines - threads;
  c.columns = 1 << columns;
  c.lines = 1 << (threads - columns);
  c.blocks = clusters && blocks <= bits_for(kMostBlocks) ? 1 << blocks : 1;
  c.group = threads > 5 ? 1 : kUsualThreads >> threads;
  c.tiles = unsigned((packs + c.columns - 1) / c.columns);
  const int64_t chunk = int64_t(c.lines) * c.blocks * depth;
  c.chunks = unsigned((s.length + chunk - 1) / chunk);
  return c;
}

/// Everything decided about the launches for one shape.
template <template <class> class F, class S, bool kForward>
struct Plan {
  using V = TermOf<S>;
  using Mine = Share<S>;

  SoftmaxShape s;
  cuda::Queue queue;
  bool wide;   // whether rows, or what is next to each other across rows, come in whole packs
  bool along;  // by `rows`; else by `cut`
  RowPlan rows;
  Cut cut;

  Plan(const SoftmaxShape& shape, cuda::Queue queue_) : s(shape), queue(queue_) {
    const bool clusters = queue.capability >= 90;
    wide = (s.inner == 1 ? s.length : s.inner) % kWidth<S> == 0;
    along = rows.make(s, Mine::kFew, Mine::kMany, sizeof(V), clusters);
    if (along && rows.grid.cluster > 1 && !fits(rows_kernel(), rows.grid))
      along = rows.make(s, Mine::kFew, Mine::kMany, sizeof(V), false);
    if (along) return;
    wide = wide && s.inner > 1;
    cut = make_cut(s, width(), depth(), clusters);
    if (cut.blocks > 1 && !fits(columns_kernel<kWhole>(), grid())) cut = make_cut(s, width(), depth(), false);
  }

  int width() const { return wide ? kWidth<S> : 1; }
  int depth() const { return wide ? Mine::kDeep : Mine::kSingle; }
  Grid grid() const {
    return {(s.outer + cut.group - 1) / cut.group * cut.tiles * cut.chunks * cut.blocks, cut.columns * cut.lines * cut.group,
            cut.blocks, cut.template shared<V>(width())};
  }
  int64_t workspace() const { return along || cut.chunks == 1 ? 0 : Notes<V>::bytes(s, cut); }

  auto rows_kernel() const {
    constexpr int N = kWidth<S>, few = Mine::kFew, many = Mine::kMany;
    if constexpr (kForward) {
      if (rows.elements == few) return wide ? softmax_rows<F, S, N, few> : softmax_rows<F, S, 1, few>;
      return wide ? softmax_rows<F, S, N, many> : softmax_rows<F, S, 1, many>;
    } else {
      if (rows.elements == few) return wide ? softmax_backward_rows<F, S, N, few> : softmax_backward_rows<F, S, 1, few>;
      return wide ? softmax_backward_rows<F, S, N, many> : softmax_backward_rows<F, S, 1, many>;
    }
  }
  template <Phase phase>
  auto columns_kernel() const {
    constexpr int N = kWidth<S>, deep = Mine::kDeep, single = Mine::kSingle;
    if constexpr (kForward)
      return wide ? softmax_columns<F, S, N, deep, phase> : softmax_columns<F, S, 1, single, phase>;
    else
      return wide ? softmax_backward_columns<F, S, N, deep, phase> : softmax_backward_columns<F, S, 1, single, phase>;
  }

  /// `tensors`: inputs and output, as the kernels take them.
  template <class... T>
  int run(bool aligned, void* workspace, SoftmaxOptions options, T... tensors) const {
    if (s.outer * s.length * s.inner == 0) return 0;
    const F<V> f(options);
    if (along)
      return launch(rows_kernel(), rows.grid, queue, tensors..., f, s.outer, int(s.length), rows.bits, rows.grid.cluster,
                    aligned);
    if (cut.chunks == 1) return launch(columns_kernel<kWhole>(), grid(), queue, tensors..., f, s, cut, aligned, workspace);
    if (int error = launch(columns_kernel<kPart>(), grid(), queue, tensors..., f, s, cut, aligned, workspace)) return error;
    const Grid totals = {(s.outer * s.inner * kWarp + kUsualThreads - 1) / kUsualThreads, kUsualThreads};
    if (int error = launch(softmax_totals<F, V, kForward>, totals, queue, f, s, cut, workspace)) return error;
    return launch(columns_kernel<kRest>(), grid(), queue, tensors..., f, s, cut, aligned, workspace);
  }
};

template <template <class> class F, class S>
int softmax_forward(const void* x, void* y, SoftmaxShape s, SoftmaxOptions options, void* workspace, cuda::Queue queue) {
  return Plan<F, S, true>(s, queue).run(aligned(x), workspace, options, static_cast<const S*>(x), static_cast<S*>(y));
}
template <template <class> class F, class S>
int softmax_backward(const void* dy, const void* y, void* dx, SoftmaxShape s, SoftmaxOptions options, void* workspace,
                     cuda::Queue queue) {
  return Plan<F, S, false>(s, queue).run(aligned(dy) && aligned(y), workspace, options, static_cast<const S*>(dy),
                                         static_cast<const S*>(y), static_cast<S*>(dx));
}
template <template <class> class F, class S>
int64_t softmax_forward_workspace(SoftmaxShape s, cuda::Queue queue) {
  return Plan<F, S, true>(s, queue).workspace();
}
template <template <class> class F, class S>
int64_t softmax_backward_workspace(SoftmaxShape s, cuda::Queue queue) {
  return Plan<F, S, false>(s, queue).workspace();
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
