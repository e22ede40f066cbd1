// Softmax over the three memory layouts a row can have: short contiguous rows (a lane per row, through transposed tiles), long
// contiguous rows (a vector along the row), and rows that are columns in memory (a lane per column).
#pragma once

#include "../kernels.h"
#include "../softmax.h"
#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// The longest rows that go through tiles, which cost one transposition forward for each tensor, and backward two and one:
/// beyond them the sums across a vector cost less. Measured by the lengths where both ways take the same time.
constexpr int kShortRow = 32, kShortRowBackward = 16;

/// Bytes of terms kept on the stack, for 16-bit rows, whose terms must not be rounded before they are scaled.
constexpr int kScratch = 16384;

// ---- Sums in the order that softmax.h defines ------------------------------------------------------------------------

/// A lane per row: element j of every row is added as one vector.
template <class V>
struct LaneSum {
  using T = typename V::Element;
  V partial[kSumLanes];
  double total[V::lanes];
  bool first = true;

  FASTACT_FN void clear() {
#pragma GCC unroll 16
    for (int l = 0; l < kSumLanes; ++l) partial[l] = V(0);
  }
  FASTACT_FN V tree() {
#pragma GCC unroll 16
    for (int w = kSumLanes / 2; w > 0; w /= 2)
#pragma GCC unroll 16
      for (int l = 0; l < w; ++l) partial[l] = partial[l] + partial[l + w];
    return partial[0];
  }
  FASTACT_FN void end_block() {
    T block[V::lanes];
    store(block, tree());
    for (int l = 0; l < V::lanes; ++l) total[l] = (first ? 0.0 : total[l]) + double(block[l]);
    first = false;
    clear();
  }
  /// Adding 0 makes a sum of -0.0 in one layout the same as one with padding in another.
  FASTACT_FN V result() {
    if (first) return tree() + V(0);
    end_block();
    T sum[V::lanes];
    for (int l = 0; l < V::lanes; ++l) sum[l] = T(total[l]);
    return load(sum);
  }
};

/// Lane l of the result is lane l xor `distance` of v.
template <int distance, class T, int N>
FASTACT_FN Lanes<T, N> exchange(Lanes<T, N> v) {
  typename Lanes<T, N>::Bits index;
#pragma GCC unroll 16
  for (int l = 0; l < N; ++l) index[l] = l ^ distance;
  return Lanes<T, N>(__builtin_shuffle(v.raw, index));
}

/// Combines all lanes as a tree, the far halves first; every lane of the result holds the whole.
template <int distance, class V, class Combine>
FASTACT_FN V across(V v, Combine combine) {
  if constexpr (distance > 0)
    return across<distance / 2>(combine(v, exchange<distance>(v)), combine);
  else
    return v;
}

/// A vector along one row: kSumLanes neighbours are added to the partial sums at a time.
template <class V>
struct RowSum {
  using T = typename V::Element;
  static constexpr int vectors = kSumLanes / V::lanes;
  V partial[vectors];
  double total = 0;
  bool first = true;

  FASTACT_FN RowSum() { clear(); }
  FASTACT_FN void clear() {
    for (int k = 0; k < vectors; ++k) partial[k] = V(0);
  }
  FASTACT_FN V tree() {
#pragma GCC unroll 4
    for (int w = vectors / 2; w > 0; w /= 2)
#pragma GCC unroll 4
      for (int k = 0; k < w; ++k) partial[k] = partial[k] + partial[k + w];
    return across<V::lanes / 2>(partial[0], [](V a, V b) __attribute__((always_inline)) { return a + b; });
  }
  /// Between blocks; the last block ends in result().
  FASTACT_FN void end_block() {
    const double block = double(tree().raw[0]);
    total = (first ? 0.0 : total) + block;
    first = false;
    clear();
  }
  FASTACT_FN V result() {
    if (first) return tree() + V(0);
    end_block();
    return V(double(T(total)));
  }
};

/// The largest lane, in every lane.
template <class V>
FASTACT_FN V largest(V v) {
  return across<V::lanes / 2>(v, [](V a, V b) __attribute__((always_inline)) { return max(a, b); });
}

/// Calls body(i, k, count) for the row's vectors in order, `count` elements from i for partial sum k, and end_block() between
/// blocks.
template <class V, class Body, class EndBlock>
FASTACT_FN void along(int64_t n, Body body, EndBlock end_block) {
  constexpr int N = V::lanes, vectors = kSumLanes / N;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = n - begin < kSumBlock ? n : begin + kSumBlock;
    int64_t i = begin;
    for (; i + kSumLanes <= end; i += kSumLanes)
#pragma GCC unroll 16
      for (int k = 0; k < vectors; ++k) body(i + k * N, k, N);
#pragma GCC unroll 16
    for (int k = 0; k < vectors; ++k) {
      const int64_t from = i + k * N, count = end - from;
      if (count > 0) body(from, k, count < N ? int(count) : N);
    }
    if (end < n) end_block();
  }
}

// ---- Long rows -------------------------------------------------------------------------------------------------------

constexpr double kInfinity = __builtin_inf();

template <class S>
void long_row(const S* x, S* y, int64_t n) {
  using V = LaneOf<S>;
  using T = typename V::Element;
  constexpr int N = V::lanes;

  V maxima[4] = {V(-kInfinity), V(-kInfinity), V(-kInfinity), V(-kInfinity)};
  int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N)
#pragma GCC unroll 16
    for (int k = 0; k < 4; ++k) maxima[k] = max(load(x + i + k * N), maxima[k]);
  for (; i < n; i += N) {
    const int count = n - i < N ? int(n - i) : N;
    maxima[0] = max(load_some(x + i, count, V(-kInfinity)), maxima[0]);
  }
  const V maximum = largest(max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3])));

  // The terms wait for their scale in y itself where it can hold them, else in a buffer, else they are computed again.
  constexpr bool in_place = sizeof(S) == sizeof(T);
  T scratch[in_place ? 1 : kScratch / sizeof(T)];
  const bool kept = in_place || n <= int64_t(kScratch / sizeof(T));
  T* terms = in_place ? reinterpret_cast<T*>(y) : scratch;

  RowSum<V> sum;
  along<V>(
      n,
      [&](int64_t at, int k, int count) __attribute__((always_inline)) {
        const V e = Softmax<V>::term(load_some(x + at, count, V(-kInfinity)), maximum);
        if (kept) store_some(terms + at, count, e);
        sum.partial[k] = sum.partial[k] + e;
      },
      [&]() __attribute__((always_inline)) { sum.end_block(); });
  const V inverse = 1 / sum.result();

  for (i = 0; i < n; i += N) {
    const int count = n - i < N ? int(n - i) : N;
    const V e = kept ? load_some(terms + i, count, V(0)) : Softmax<V>::term(load_some(x + i, count, V(-kInfinity)), maximum);
    store_some(y + i, count, Softmax<V>::forward(e, inverse));
  }
}

template <class S>
void long_row_backward(const S* dy, const S* y, S* dx, int64_t n) {
  using V = LaneOf<S>;
  constexpr int N = V::lanes;
  RowSum<V> sum;
  along<V>(
      n,
      [&](int64_t at, int k, int count) __attribute__((always_inline)) {
        sum.partial[k] = Softmax<V>::product(load_some(dy + at, count, V(0)), load_some(y + at, count, V(0)), sum.partial[k]);
      },
      [&]() __attribute__((always_inline)) { sum.end_block(); });
  const V dot = sum.result();
  for (int64_t i = 0; i < n; i += N) {
    const int count = n - i < N ? int(n - i) : N;
    store_some(dx + i, count, Softmax<V>::backward(load_some(dy + i, count, V(0)), load_some(y + i, count, V(0)), dot));
  }
}

// ---- Short rows ------------------------------------------------------------------------------------------------------

/// Lanes of a and b in turn, a0 b0 a1 b1 ...: the first (half 0) or the last (half 1) N of them.
template <class V, int half>
struct Zip;  // the shuffle's constant indices
template <class T, int N, int half>
struct Zip<Lanes<T, N>, half> {
  using V = Lanes<T, N>;
  FASTACT_FN static V apply(V a, V b) {
    typename V::Bits index;
#pragma GCC unroll 16
    for (int l = 0; l < N; ++l) index[l] = half * (N / 2) + l / 2 + (l % 2 ? N : 0);
    return V(__builtin_shuffle(a.raw, b.raw, index));
  }
};

/// Transposes N vectors of N lanes: log2 N rounds of a perfect shuffle of the whole square.
template <class V>
FASTACT_FN void transpose(V (&square)[V::lanes]) {
  constexpr int N = V::lanes;
#pragma GCC unroll 16
  for (int round = 1; round < N; round *= 2) {
    V next[N];
#pragma GCC unroll 16
    for (int k = 0; k < N / 2; ++k) {
      next[2 * k] = Zip<V, 0>::apply(square[k], square[k + N / 2]);
      next[2 * k + 1] = Zip<V, 1>::apply(square[k], square[k + N / 2]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < N; ++k) square[k] = next[k];
  }
}

/// Up to N neighbouring rows of n <= kShortRow elements: column j of the tile holds element j of every row.
template <class V>
struct Tile {
  static constexpr int N = V::lanes;
  V column[(kShortRow + N - 1) / N * N];

  /// Reads `rows` rows from p; lanes beyond them repeat the last row.
  template <class S>
  FASTACT_FN void read(const S* p, int n, int rows) {
    const S* end = p + int64_t(rows) * n;
    for (int c = 0; c < n; c += N) {
      V square[N];
#pragma GCC unroll 16
      for (int r = 0; r < N; ++r) {
        const S* at = p + int64_t(r < rows ? r : rows - 1) * n + c;
        // What a full vector reads beyond its row lands in columns that nobody uses.
        square[r] = end - at >= N ? load(at) : load_part(at, int(end - at), V(0));
      }
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < N; ++r) column[c + r] = square[r];
    }
  }

  /// Writes them. What a full vector writes beyond its row is written over later: the last columns go first, and rows in order.
  template <class S>
  FASTACT_FN void write(S* p, int n, int rows) const {
    const int last = (n - 1) / N * N;
    write_columns(p, n, rows, last);
    for (int c = 0; c < last; c += N) write_columns(p, n, rows, c);
  }

 private:
  template <class S>
  void write_columns(S* p, int n, int rows, int c) const {
    const S* end = p + int64_t(rows) * n;
    V square[N];
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r) square[r] = column[c + r];
    transpose(square);
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r) {
      if (r >= rows) return;
      S* at = p + int64_t(r) * n + c;
      if (end - at >= N)
        store(at, square[r]);
      else
        store_part(at, int(end - at), square[r]);
    }
  }
};

template <class S>
void short_rows(const S* x, S* y, int n, int rows) {
  using V = LaneOf<S>;
  Tile<V> t;
  t.read(x, n, rows);
  V maximum(-kInfinity);
  for (int j = 0; j < n; ++j) maximum = max(t.column[j], maximum);
  LaneSum<V> sum;
  sum.clear();
  for (int j = 0; j < n; ++j) {
    t.column[j] = Softmax<V>::term(t.column[j], maximum);
    sum.partial[j % kSumLanes] = sum.partial[j % kSumLanes] + t.column[j];
  }
  const V inverse = 1 / sum.result();
  for (int j = 0; j < n; ++j) t.column[j] = Softmax<V>::forward(t.column[j], inverse);
  t.write(y, n, rows);
}

template <class S>
void short_rows_backward(const S* dy, const S* y, S* dx, int n, int rows) {
  using V = LaneOf<S>;
  Tile<V> g, t;
  g.read(dy, n, rows);
  t.read(y, n, rows);
  LaneSum<V> sum;
  sum.clear();
  for (int j = 0; j < n; ++j)
    sum.partial[j % kSumLanes] = Softmax<V>::product(g.column[j], t.column[j], sum.partial[j % kSumLanes]);
  const V dot = sum.result();
  for (int j = 0; j < n; ++j) t.column[j] = Softmax<V>::backward(g.column[j], t.column[j], dot);
  t.write(dx, n, rows);
}

// ---- Rows that are columns in memory -----------------------------------------------------------------------------------

/// A unit's columns as vectors; only the last may be partial.
template <class V>
struct Columns {
  static constexpr int N = V::lanes;
  static constexpr int most = kSoftmaxColumns / N;
  int width;
  FASTACT_FN int vectors() const { return (width + N - 1) / N; }
  FASTACT_FN int count(int k) const { return width - k * N < N ? width - k * N : N; }
};

template <class S>
void columns(const S* x, S* y, int64_t n, int64_t inner, int width) {
  using V = LaneOf<S>;
  using T = typename V::Element;
  using C = Columns<V>;
  constexpr int N = V::lanes;
  const C c{width};
  const int vectors = c.vectors();

  V maximum[C::most];
  for (int k = 0; k < vectors; ++k) maximum[k] = V(-kInfinity);
  for (int64_t j = 0; j < n; ++j)
    for (int k = 0; k < vectors; ++k) maximum[k] = max(load_some(x + j * inner + k * N, c.count(k), V(0)), maximum[k]);

  constexpr bool in_place = sizeof(S) == sizeof(T);
  T scratch[in_place ? 1 : kScratch / sizeof(T)];
  const bool kept = in_place || n * kSoftmaxColumns <= int64_t(kScratch / sizeof(T));

  LaneSum<V> sum[C::most];
  for (int k = 0; k < vectors; ++k) sum[k].clear();
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = n - begin < kSumBlock ? n : begin + kSumBlock;
    for (int64_t j = begin; j < end; ++j)
      for (int k = 0; k < vectors; ++k) {
        const int count = c.count(k);
        const V e = Softmax<V>::term(load_some(x + j * inner + k * N, count, V(0)), maximum[k]);
        if (in_place)
          store_some(reinterpret_cast<T*>(y) + j * inner + k * N, count, e);
        else if (kept)
          store(scratch + j * kSoftmaxColumns + k * N, e);
        V& partial = sum[k].partial[j % kSumLanes];
        partial = partial + e;
      }
    if (end < n)
      for (int k = 0; k < vectors; ++k) sum[k].end_block();
  }
  V inverse[C::most];
  for (int k = 0; k < vectors; ++k) inverse[k] = 1 / sum[k].result();

  for (int64_t j = 0; j < n; ++j)
    for (int k = 0; k < vectors; ++k) {
      const int count = c.count(k);
      const V e = in_place ? load_some(reinterpret_cast<const T*>(y) + j * inner + k * N, count, V(0))
                  : kept   ? load(scratch + j * kSoftmaxColumns + k * N)
                           : Softmax<V>::term(load_some(x + j * inner + k * N, count, V(0)), maximum[k]);
      store_some(y + j * inner + k * N, count, Softmax<V>::forward(e, inverse[k]));
    }
}

template <class S>
void columns_backward(const S* dy, const S* y, S* dx, int64_t n, int64_t inner, int width) {
  using V = LaneOf<S>;
  using C = Columns<V>;
  constexpr int N = V::lanes;
  const C c{width};
  const int vectors = c.vectors();

  LaneSum<V> sum[C::most];
  for (int k = 0; k < vectors; ++k) sum[k].clear();
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = n - begin < kSumBlock ? n : begin + kSumBlock;
    for (int64_t j = begin; j < end; ++j)
      for (int k = 0; k < vectors; ++k) {
        const int64_t at = j * inner + k * N;
        V& partial = sum[k].partial[j % kSumLanes];
        partial = Softmax<V>::product(load_some(dy + at, c.count(k), V(0)), load_some(y + at, c.count(k), V(0)), partial);
      }
    if (end < n)
      for (int k = 0; k < vectors; ++k) sum[k].end_block();
  }
  V dot[C::most];
  for (int k = 0; k < vectors; ++k) dot[k] = sum[k].result();

  for (int64_t j = 0; j < n; ++j)
    for (int k = 0; k < vectors; ++k) {
      const int64_t at = j * inner + k * N;
      store_some(dx + at, c.count(k),
                 Softmax<V>::backward(load_some(dy + at, c.count(k), V(0)), load_some(y + at, c.count(k), V(0)), dot[k]));
    }
}

// ---- Units ---------------------------------------------------------------------------------------------------------------

/// Calls, for the units [begin, end): short(at, rows), long_(at) or columns(at, width), with `at` the offset of the first
/// element.
template <class V, int longest_short, class Short, class Long, class Column>
FASTACT_FN void each_unit(SoftmaxShape s, int64_t begin, int64_t end, Short short_, Long long_, Column column) {
  if (s.inner > 1) {
    const int64_t chunks = softmax_units(s) / s.outer;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % chunks * kSoftmaxColumns;
      column(unit / chunks * s.length * s.inner + first,
             int(s.inner - first < kSoftmaxColumns ? s.inner - first : kSoftmaxColumns));
    }
  } else if (s.length <= longest_short) {
    for (int64_t row = begin; row < end; row += V::lanes)
      short_(row * s.length, int(end - row < V::lanes ? end - row : V::lanes));
  } else {
    for (int64_t row = begin; row < end; ++row) long_(row * s.length);
  }
}

template <class S>
void softmax_forward(const void* x_, void* y_, SoftmaxShape s, int64_t begin, int64_t end) {
  const S* x = static_cast<const S*>(x_);
  S* y = static_cast<S*>(y_);
  each_unit<LaneOf<S>, kShortRow>(
      s, begin, end, [=](int64_t at, int rows) { short_rows(x + at, y + at, int(s.length), rows); },
      [=](int64_t at) { long_row(x + at, y + at, s.length); },
      [=](int64_t at, int width) { columns(x + at, y + at, s.length, s.inner, width); });
}

template <class S>
void softmax_backward(const void* dy_, const void* y_, void* dx_, SoftmaxShape s, int64_t begin, int64_t end) {
  const S* dy = static_cast<const S*>(dy_);
  const S* y = static_cast<const S*>(y_);
  S* dx = static_cast<S*>(dx_);
  each_unit<LaneOf<S>, kShortRowBackward>(
      s, begin, end, [=](int64_t at, int rows) { short_rows_backward(dy + at, y + at, dx + at, int(s.length), rows); },
      [=](int64_t at) { long_row_backward(dy + at, y + at, dx + at, s.length); },
      [=](int64_t at, int width) { columns_backward(dy + at, y + at, dx + at, s.length, s.inner, width); });
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
