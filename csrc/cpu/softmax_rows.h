// The functors of softmax.h (F) over the two ways in which rows can lie in memory: along vectors, or side by side in their
// lanes (rows that are columns of a matrix; and short contiguous rows, once they are transposed).
#pragma once

#include "../kernels.h"
#include "../softmax.h"
#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// The longest contiguous rows that are transposed, forward and backward: beyond them the sums across a vector cost less.
/// Measured by the lengths where both ways take the same time.
constexpr int kShortRow = 32, kShortRowBackward = 16;

/// Bytes for the rows at work, in the compute type and on the stack: what they should take to stay in L1, and the most.
constexpr int kNear = 32768, kScratch = 327680;

/// For columns that are read where they lie, and more than once: bytes that L2 still holds the next time, with as many that are
/// fetched meanwhile; and where columns are too long for that, bytes of a row that are worked on together, and of the rows that
/// are fetched ahead of them. Measured: halves and doubles of these are no faster over all.
constexpr int kReadAgain = 131072, kPiece = 512, kAhead = 4096;

// ---- Vectors abreast -------------------------------------------------------------------------------------------------

/// Vectors that go through a formula in step, so that the processor always finds instructions that do not wait for one another:
/// a lane type with those words of lane.h that terms are made of.
template <class V, int K>
struct Abreast {
  using Element = typename V::Element;
  struct Mask {
    typename V::Mask part[K];
  };
  V part[K];

  Abreast() = default;
  FASTACT_FN Abreast(double c) : Abreast(V(c)) {}
  FASTACT_FN explicit Abreast(V v) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) part[k] = v;
  }

// A word made of the same word of part k.
#define FASTACT_EACH(Result, signature, ...)                                       \
  FASTACT_FN friend Result signature {                                             \
    Result r;                                                                      \
    _Pragma("GCC unroll 4") for (int k = 0; k < K; ++k) r.part[k] = (__VA_ARGS__); \
    return r;                                                                      \
  }
  FASTACT_EACH(Abreast, operator+(Abreast a, Abreast b), a.part[k] + b.part[k])
  FASTACT_EACH(Abreast, operator-(Abreast a, Abreast b), a.part[k] - b.part[k])
  FASTACT_EACH(Abreast, operator-(Abreast a), -a.part[k])
  FASTACT_EACH(Abreast, operator*(Abreast a, Abreast b), a.part[k] * b.part[k])
  FASTACT_EACH(Mask, operator<(Abreast a, Abreast b), a.part[k] < b.part[k])
  FASTACT_EACH(Abreast, max(Abreast a, Abreast b), max(a.part[k], b.part[k]))
  FASTACT_EACH(Abreast, fma(Abreast a, Abreast b, Abreast c), fma(a.part[k], b.part[k], c.part[k]))
  FASTACT_EACH(Abreast, select(Mask m, Abreast a, Abreast b), select(m.part[k], a.part[k], b.part[k]))
  FASTACT_EACH(Abreast, scale2(Abreast x, Abreast n, Abreast biased), scale2(x.part[k], n.part[k], biased.part[k]))
#undef FASTACT_EACH

  /// From neighbours in memory; of the last part only `last` elements, the rest of its lanes from `rest`.
  template <class S>
  FASTACT_FN static Abreast read(const S* p, int last, V rest) {
    Abreast result;
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) result.part[k] = k < K - 1 ? load(p + k * V::lanes) : load_some(p + k * V::lanes, last, rest);
    return result;
  }
  template <class S>
  FASTACT_FN void write(S* p, int last) const {
#pragma GCC unroll 4
    for (int k = 0; k < K - 1; ++k) store(p + k * V::lanes, part[k]);
    store_some(p + (K - 1) * V::lanes, last, part[K - 1]);
  }
};

constexpr int kAbreast = 4;

/// Calls body(Constant<n>()), `most` for all n from there on.
template <int most, class Body>
FASTACT_FN void with_constant(int n, Body body) {
  if constexpr (most > 1) {
    if (n < most) return with_constant<most - 1>(n, body);
  }
  body(Constant<most>());
}

/// Calls body(i, K, last) for the vectors of [begin, end): K of them from i on, of which the last has `last` elements.
template <class V, class Body>
FASTACT_FN void each_chunk(int64_t begin, int64_t end, Body body) {
  constexpr int N = V::lanes;
  int64_t i = begin;
  for (; i + kAbreast * N <= end; i += kAbreast * N) body(i, Constant<kAbreast>(), N);
  if (i < end) {
    const int rest = int(end - i), vectors = (rest + N - 1) / N;
    with_constant<kAbreast>(vectors,
                            [&](auto k) __attribute__((always_inline)) { body(i, k, rest - (decltype(k)::value - 1) * N); });
  }
}

// ---- Rows along vectors ----------------------------------------------------------------------------------------------

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

/// The largest lane, in every lane.
template <class V>
FASTACT_FN V largest(V v) {
  return across<V::lanes / 2>(v, [](V a, V b) __attribute__((always_inline)) { return max(a, b); });
}

/// The sum of a row in the order that softmax.h defines.
template <class V>
struct RowSum {
  using T = typename V::Element;
  static constexpr int vectors = kSumLanes / V::lanes;
  V partial[vectors];
  double total = 0;
  bool first = true;

  FASTACT_FN RowSum() { clear(); }
  FASTACT_FN void clear() {
#pragma GCC unroll 16
    for (int k = 0; k < vectors; ++k) partial[k] = V(0);
  }
  /// Elements from i on.
  template <int K>
  FASTACT_FN void add(int64_t i, Abreast<V, K> e) {
    V* to = vectors == kAbreast ? partial : partial + i / V::lanes % vectors;
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) to[k] = to[k] + e.part[k];
  }
  FASTACT_FN V tree() {
#pragma GCC unroll 4
    for (int w = vectors / 2; w > 0; w /= 2)
#pragma GCC unroll 8
      for (int k = 0; k < w; ++k) partial[k] = partial[k] + partial[k + w];
    return across<V::lanes / 2>(partial[0], [](V a, V b) __attribute__((always_inline)) { return a + b; });
  }
  FASTACT_FN void end_block() {
    total += double(tree().raw[0]);
    clear();
    first = false;
  }
  /// Adding 0 makes a sum of -0.0 in one layout the same as one with padding in another.
  FASTACT_FN T result() {
    const T block = tree().raw[0];
    return first ? block + 0 : T(total + double(block));
  }
};

/// The same for `count` elements.
template <class S, int count>
FASTACT_FN void will_write(S* p) {
#pragma GCC unroll 4
  for (int i = 0; i < count; i += 64 / int(sizeof(S))) will_write(p + i);
}

/// Fetches `count` elements for reading.
template <class S, int count>
FASTACT_FN void fetch(const S* p) {
#pragma GCC unroll 8
  for (int i = 0; i < count; i += 64 / int(sizeof(S))) __builtin_prefetch(p + i, 0, 3);
}

/// Fetches what is read soon. The hardware does so for one long stream, but not far enough ahead where short pieces are worked
/// on.
template <class S, int count>
FASTACT_FN void will_read(const S* p) {
  fetch<S, count>(p + 1024 / sizeof(S));
}

/// The sum of body(i, K, last) over a row.
template <class V, class Body>
FASTACT_FN typename V::Element row_sum(int64_t n, Body body) {
  RowSum<V> sum;
  const auto add = [&](int64_t i, auto k, int last) __attribute__((always_inline)) { sum.add(i, body(i, k, last)); };
  int64_t begin = 0;
  constexpr int block = kSumBlock<typename V::Element>;
  for (; n - begin > block; begin += block) {
    each_chunk<V>(begin, begin + block, add);
    sum.end_block();
  }
  each_chunk<V>(begin, n, add);
  return sum.result();
}

template <class V>
struct RowMaximum {
  Abreast<V, kAbreast> part;

  FASTACT_FN explicit RowMaximum(V least) : part(least) {}
  template <int K>
  FASTACT_FN void add(Abreast<V, K> v) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) part.part[k] = max(v.part[k], part.part[k]);
  }
  FASTACT_FN V result() { return largest(max(max(part.part[0], part.part[1]), max(part.part[2], part.part[3]))); }
};

/// While a row is finished, the next one is searched for its maximum, which brings it into L1.
template <template <class> class F, class S>
void long_rows(const S* x, S* y, int64_t n, int64_t rows, F<LaneOf<S>> f) {
  using V = LaneOf<S>;
  using T = typename V::Element;
  // Terms that are wanted wait in y itself where it can hold them, else in a buffer, else they are computed again.
  constexpr bool wanted = F<V>::keeps_terms, in_place = wanted && sizeof(S) == sizeof(T);
  T scratch[!wanted || in_place ? 1 : kScratch / sizeof(T)];
  const bool kept = wanted && (in_place || n <= int64_t(kScratch / sizeof(T)));

  RowMaximum<V> first(f.least());
  each_chunk<V>(0, n, [&](int64_t i, auto k, int last) __attribute__((always_inline)) {
    first.add(Abreast<V, decltype(k)::value>::read(x + i, last, V(-kInfinity)));
  });
  V maximum = first.result();
  for (int64_t row = 0; row < rows; ++row, x += n, y += n) {
    T* terms = in_place ? reinterpret_cast<T*>(y) : scratch;
    const auto x_at = [&](int64_t i, auto k, int last) __attribute__((always_inline)) {
      return Abreast<V, decltype(k)::value>::read(x + i, last, V(-kInfinity));
    };
    const auto term_at = [&](int64_t i, auto k, int last) __attribute__((always_inline)) {
      using A = Abreast<V, decltype(k)::value>;
      return F<A>(f).term(x_at(i, k, last), A(maximum));
    };
    const T sum = row_sum<V>(n, [&](int64_t i, auto k, int last) __attribute__((always_inline)) {
      const auto e = term_at(i, k, last);
      if (in_place) will_write<S, decltype(k)::value * V::lanes>(y + i);
      if (kept) e.write(terms + i, last);
      return e;
    });
    V factor;
    if constexpr (F<V>::scalar_factor)
      factor = V(double(F<T>::factor(sum)));
    else
      factor = f.factor(V(double(sum)));
    RowMaximum<V> following(f.least());
    const S* next = row + 1 < rows ? x + n : x;
    each_chunk<V>(0, n, [&](int64_t i, auto k, int last) __attribute__((always_inline)) {
      using A = Abreast<V, decltype(k)::value>;
      const A from = !wanted ? x_at(i, k, last) : kept ? A::read(terms + i, last, V(0)) : term_at(i, k, last);
      if (!in_place) will_write<S, decltype(k)::value * V::lanes>(y + i);
      F<A>(f).forward(from, A(maximum), A(factor)).write(y + i, last);
      will_read<S, decltype(k)::value * V::lanes>(next + i);
      following.add(A::read(next + i, last, V(-kInfinity)));
    });
    maximum = following.result();
  }
}

/// While a row is finished, the products of the next one are summed.
template <template <class> class F, class S>
void long_rows_backward(const S* dy, const S* y, S* dx, int64_t n, int64_t rows, F<LaneOf<S>> f) {
  using V = LaneOf<S>;
  const auto product_at = [&](int64_t i, auto k, int last) __attribute__((always_inline)) {
    using A = Abreast<V, decltype(k)::value>;
    return F<A>::product(A::read(dy + i, last, V(0)), A::read(y + i, last, V(0)));
  };
  V dot(double(row_sum<V>(n, product_at)));
  for (; rows > 0; --rows) {
    const int64_t next = rows > 1 ? n : 0;
    const auto sum = row_sum<V>(n, [&](int64_t i, auto k, int last) __attribute__((always_inline)) {
      using A = Abreast<V, decltype(k)::value>;
      F<A>(f).backward(A::read(dy + i, last, V(0)), A::read(y + i, last, V(0)), A(dot)).write(dx + i, last);
      will_write<S, decltype(k)::value * V::lanes>(dx + i);
      will_read<S, decltype(k)::value * V::lanes>(dy + n + i);
      will_read<S, decltype(k)::value * V::lanes>(y + n + i);
      return product_at(i + next, k, last);
    });
    dot = V(double(sum));
    dy += n;
    y += n;
    dx += n;
  }
}

// ---- Rows in lanes ---------------------------------------------------------------------------------------------------

/// Rows side by side, in the compute type: element j of row r is at `at + j * stride + r`.
template <class V>
struct Panel {
  using T = typename V::Element;
  static constexpr int N = V::lanes;
  T* at;
  int stride, width;  // width: the number of rows; lanes beyond them hold anything

  /// Calls body(r, Constant<K>()) for the rows from r on, K <= most vectors of them.
  template <int most, class Body>
  FASTACT_FN void each_group(Body body) const {
    for (int r = 0; r < width; r += most * N)
      with_constant<most>((width - r + N - 1) / N, [&](auto k) __attribute__((always_inline)) { body(r, k); });
  }

  /// maximum[r] becomes that of itself and of `length` elements.
  __attribute__((noinline)) void maxima(int length, T* maximum) const {
    each_group<kAbreast>([&](int r, auto k) __attribute__((always_inline)) {
      using A = Abreast<V, decltype(k)::value>;
      A m = A::read(maximum + r, N, V(0));
      for (int j = 0; j < length; ++j) m = max(A::read(at + j * stride + r, N, V(0)), m);
      m.write(maximum + r, N);
    });
  }
  /// The terms of `length` elements, which go to the same places from `to` on; calls meanwhile(j, r, K) for each K of their
  /// vectors.
  template <template <class> class F, class Meanwhile>
  FASTACT_FN void terms(T* to, int length, const T* maximum, F<V> f, Meanwhile meanwhile) const {
    for (int j = 0; j < length; ++j)
      each_chunk<V>(0, width, [&](int64_t r, auto k, int) __attribute__((always_inline)) {
        using A = Abreast<V, decltype(k)::value>;
        const int64_t place = j * stride + r;
        meanwhile(j, r, k);
        F<A>(f).term(A::read(at + place, N, V(0)), A::read(maximum + r, N, V(0))).write(to + place, N);
      });
  }
  template <template <class> class F>
  __attribute__((noinline)) void terms(T* to, int length, const T* maximum, F<V> f) const {
    terms(to, length, maximum, f, [](int, int64_t, auto) __attribute__((always_inline)) {});
  }
  /// The partial sums l, l + w, l + 2 w ... of `length` elements, added as a tree; those from `length` on are 0 and left out.
  template <int w, class A>
  FASTACT_FN A tree(const T* p, int length, int l) const {
    if constexpr (w == kSumLanes) {
      A sum = A::read(p + l * stride, N, V(0));
      for (int j = l + kSumLanes; j < length; j += kSumLanes) sum = sum + A::read(p + j * stride, N, V(0));
      return sum;
    } else {
      const A half = tree<2 * w, A>(p, length, l);
      return l + w < length ? half + tree<2 * w, A>(p, length, l + w) : half;
    }
  }
  /// The sums of up to kSumBlock elements.
  __attribute__((noinline)) void sums(int length, T* result) const {
    each_group<2>([&](int r, auto k) __attribute__((always_inline)) {
      using A = Abreast<V, decltype(k)::value>;
      // Adding 0 makes a sum of -0.0 the same as one with padding.
      (tree<1, A>(at + r, length, 0) + A(0)).write(result + r, N);
    });
  }
};

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

/// Turns N neighbouring elements of up to N rows, n apart, into vectors of one element of each row.
template <class S>
FASTACT_FN void read_square(const S* p, int n, int rows, const S* end, LaneOf<S> (&square)[LaneOf<S>::lanes]) {
  constexpr int N = LaneOf<S>::lanes;
#pragma GCC unroll 16
  for (int r = 0; r < N; ++r) {
    const S* at = p + int64_t(r < rows ? r : rows - 1) * n;
    square[r] = end - at >= N ? load(at) : load_part(at, int(end - at), LaneOf<S>(0));
  }
  transpose(square);
}

/// And back. What a full vector writes beyond its row is written over later: the last columns go first, and rows in order.
template <class S>
FASTACT_FN void write_square(S* p, int n, int rows, S* end, LaneOf<S> (&square)[LaneOf<S>::lanes]) {
  constexpr int N = LaneOf<S>::lanes;
  transpose(square);
#pragma GCC unroll 16
  for (int r = 0; r < N; ++r) {
    if (r >= rows) return;
    S* at = p + int64_t(r) * n;
    if (end - at >= N)
      store(at, square[r]);
    else
      store_part(at, int(end - at), square[r]);
  }
}

constexpr int kSquares = 4;

template <template <class> class F, class S>
void short_rows(const S* x, S* y, int n, int rows, F<LaneOf<S>> f) {
  using V = LaneOf<S>;
  using T = typename V::Element;
  constexpr int N = V::lanes;
  if (n > kShortRow) __builtin_unreachable();
  constexpr int size = (kShortRow + N - 1) / N * N * kSquares * N;
  alignas(64) T buffer[size];
  alignas(64) T other[F<V>::keeps_terms ? 1 : size];
  alignas(64) T maximum[kSquares * N];
  alignas(64) T sum[kSquares * N];
  const Panel<V> panel{buffer, kSquares * N, rows};
  const Panel<V> terms{F<V>::keeps_terms ? buffer : other, kSquares * N, rows};
  for (int r = 0; r < rows; r += N)
    for (int c = 0; c < n; c += N) {
      V square[N];
      read_square(x + int64_t(r) * n + c, n, rows - r < N ? rows - r : N, x + int64_t(rows) * n, square);
#pragma GCC unroll 16
      for (int k = 0; k < N; ++k) store(panel.at + (c + k) * panel.stride + r, square[k]);
    }
  for (int r = 0; r < rows; r += N) store(maximum + r, f.least());
  panel.maxima(n, maximum);
  const int ahead = rows * n;
  for (int i = 0; i < ahead; i += 64 / sizeof(S)) {
    __builtin_prefetch(x + ahead + i, 0, 3);
    __builtin_prefetch(y + ahead + i, 1, 3);
  }
  panel.terms(terms.at, n, maximum, f);
  terms.sums(n, sum);
  for (int r = 0; r < rows; r += N) {
    const V factor = f.factor(load(sum + r)), m = load(maximum + r);
    for (int c = (n - 1) / N * N;; c -= N) {
      V square[N];
#pragma GCC unroll 16
      for (int k = 0; k < N; ++k) square[k] = f.forward(load(panel.at + (c + k) * panel.stride + r), m, factor);
      write_square(y + int64_t(r) * n + c, n, rows - r < N ? rows - r : N, y + int64_t(rows) * n, square);
      if (c == 0) break;
    }
  }
}

template <template <class> class F, class S>
void short_rows_backward(const S* dy, const S* y, S* dx, int n, int rows, F<LaneOf<S>> f) {
  using V = LaneOf<S>;
  using T = typename V::Element;
  constexpr int N = V::lanes;
  if (n > kShortRowBackward) __builtin_unreachable();
  constexpr int most = (kShortRowBackward + N - 1) / N * N;
  alignas(64) T buffer[most * N];
  const Panel<V> panel{buffer, N, rows};
  for (int c = 0; c < n; c += N) {
    V square[N];
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r) {
      const int64_t at = int64_t(r < rows ? r : rows - 1) * n + c, left = int64_t(rows) * n - at;
      square[r] = left >= N ? F<V>::product(load(dy + at), load(y + at))
                            : F<V>::product(load_part(dy + at, int(left), V(0)), load_part(y + at, int(left), V(0)));
    }
    transpose(square);
#pragma GCC unroll 16
    for (int k = 0; k < N; ++k) store(panel.at + (c + k) * N, square[k]);
  }
  alignas(64) T dot[N];
  panel.sums(n, dot);
  // dx may be dy or y: all is read before what a full vector writes beyond its row.
  V result[most];
  int count = 0;
  for (int c = (n - 1) / N * N; c >= 0; c -= N)
    for (int r = 0; r < rows; ++r) {
      const int64_t at = int64_t(r) * n + c, left = int64_t(rows) * n - at;
      const V d(double(dot[r]));
      result[count++] = left >= N ? f.backward(load(dy + at), load(y + at), d)
                                  : f.backward(load_part(dy + at, int(left), V(0)), load_part(y + at, int(left), V(0)), d);
    }
  count = 0;
  for (int c = (n - 1) / N * N; c >= 0; c -= N)
    for (int r = 0; r < rows; ++r) {
      const int64_t at = int64_t(r) * n + c, left = int64_t(rows) * n - at;
      if (left >= N)
        store(dx + at, result[count++]);
      else
        store_part(dx + at, int(left), result[count++]);
    }
}

// ---- Rows that are columns in memory ---------------------------------------------------------------------------------

/// Where the first element of a column is; columns are counted over all outer indices.
FASTACT_FN int64_t column_at(SoftmaxShape s, int64_t column) {
  return column / s.inner * s.length * s.inner + column % s.inner;
}

/// Where something lies that is needed soon, if anything is.
struct Soon {
  bool any;
  int64_t at;

  template <class S, int count>
  FASTACT_FN void fetch_from(const S* p) const {
    if (any) fetch<S, count>(p + at);
  }
};

/// Whether columns have so many neighbours that these are worth fetching ahead of time; a few are one stream with those of the
/// next row.
template <class V>
FASTACT_FN bool broad(SoftmaxShape s) {
  return s.inner >= kAbreast * V::lanes;
}

/// Calls body(at, j, c, K, last, soon) for pieces of neighbours in memory: K vectors from `at` on, of which the last has `last`
/// elements; of elements j from `begin` to `end`, and of columns c from `first` on, `width` of them. `soon` is what will be
/// read `ahead` rows later, if that is not 0; behind the last row comes the first one of the next columns.
template <class V, class Body>
FASTACT_FN void each_piece(SoftmaxShape s, int64_t first, int width, int64_t begin, int64_t end, int64_t ahead, Body body) {
  constexpr int N = V::lanes, chunk = kAbreast * N;
  for (int c = 0; c < width;) {
    const int64_t at = column_at(s, first + c), left = s.inner - (first + c) % s.inner;
    const int run = left < width - c ? int(left) : width - c;
    if (broad<V>(s)) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t row = at + j * s.inner, later = j + ahead;
        const int64_t soon = at + (later < s.length ? later * s.inner : (later - s.length) * s.inner + width);
        int i = 0;
        for (; i + chunk <= run; i += chunk) body(row + i, j, c + i, Constant<kAbreast>(), N, Soon{ahead > 0, soon + i});
        for (; i < run; i += N) body(row + i, j, c + i, Constant<1>(), run - i < N ? run - i : N, Soon{ahead > 0, soon + i});
      }
    } else {
      const int whole = run / N * N, rest = run - whole;
      for (int64_t j = begin; j < end; ++j) {
        const int64_t row = at + j * s.inner;
        for (int i = 0; i < whole; i += N) body(row + i, j, c + i, Constant<1>(), N, Soon{false, 0});
        if (rest > 0) body(row + whole, j, c + whole, Constant<1>(), rest, Soon{false, 0});
      }
    }
    c += run;
  }
}

/// Calls body(from, to) for the parts of a column that are summed by themselves.
template <class T, class Body>
FASTACT_FN void each_block(int64_t length, Body body) {
  for (int64_t from = 0; from < length; from += kSumBlock<T>)
    body(from, length - from < kSumBlock<T> ? length : from + kSumBlock<T>);
}

/// How columns are cut into panels that are held in a buffer: their rows, width and stride, which leaves room for a vector to
/// overrun.
template <class V>
struct Cut {
  static constexpr int unit = kSoftmaxColumns, most = 8 * unit, room = kScratch / int(sizeof(typename V::Element));
  int rows, width, stride;

  /// Whether a piece of a row is long enough to fetch its lines ahead of time.
  FASTACT_FN bool long_pieces(int element_size) const { return width * element_size >= 512; }
  /// Whether a whole column of such a length finds room.
  static FASTACT_FN bool fits(int64_t length) { return length <= room / (unit + V::lanes); }
  FASTACT_FN Cut(int64_t length, int64_t columns) {
    rows = int(fits(length) ? length : int64_t(kSumBlock<typename V::Element>));
    const int near = kNear / int(sizeof(typename V::Element)) / rows / unit * unit;
    const int fitting = (room / rows - V::lanes) / unit * unit;
    width = near > most ? most : near > unit ? near : fitting < 2 * unit ? unit : 2 * unit;
    if (columns < width) width = int(columns);
    stride = (width + V::lanes - 1) / V::lanes * V::lanes + V::lanes;
  }
};

/// The same where they are read from where they lie, as `size` bytes for each element: their width, how many rows are fetched
/// ahead, and how many in the last pass. What stays in L2 need not be fetched again, and leaves time to fetch the whole of the
/// next panel.
template <class V>
struct Flow {
  static constexpr int unit = kSoftmaxColumns, most = 8 * unit;
  int width;
  int64_t ahead, at_last;

  FASTACT_FN Flow(SoftmaxShape s, int size, int64_t columns) {
    const int64_t stays = kReadAgain / size / s.length / unit * unit;
    width = stays > most ? most : stays >= unit ? int(stays) : kPiece / size > unit ? kPiece / size : unit;
    if (columns < width) width = int(columns);
    const int rows = kAhead / (width * size);
    ahead = stays >= unit ? 0 : rows < 1 ? 1 : rows > 32 ? 32 : rows;
    at_last = stays >= unit ? s.length : ahead;
  }
};

/// The sums of columns in the order that softmax.h defines, of elements that come row by row.
template <class V>
struct ColumnSums {
  using T = typename V::Element;
  static constexpr int N = V::lanes, most = Flow<V>::most;
  int width, stride;
  alignas(64) T partial[kSumLanes * (most + N)];
  alignas(64) T block[most + N];
  alignas(64) double total[most];

  FASTACT_FN explicit ColumnSums(int columns) : width(columns), stride((columns + N - 1) / N * N + N) {
    for (int c = 0; c < width; ++c) total[c] = 0;
  }
  /// Elements j of columns from c on, of a block that begins with element `from`.
  template <int K>
  FASTACT_FN void add(int64_t from, int64_t j, int c, Abreast<V, K> e) {
    T* const p = partial + int(uint64_t(j) % kSumLanes) * stride + c;
    (j - from < kSumLanes ? e : Abreast<V, K>::read(p, N, V(0)) + e).write(p, N);
  }
  FASTACT_FN void end_block(int64_t rows) {
    Panel<V>{partial, stride, width}.sums(rows < kSumLanes ? int(rows) : kSumLanes, block);
    for (int c = 0; c < width; ++c) total[c] += double(block[c]);
  }
  FASTACT_FN void results(T* to) const {
    for (int c = 0; c < width; ++c) to[c] = T(total[c]);
  }
};

/// Columns that are longer than a buffer, and read from where they lie.
template <template <class> class F, class S>
void long_columns(const S* x, S* y, SoftmaxShape s, int64_t begin, int64_t end, F<LaneOf<S>> f) {
  using V = LaneOf<S>;
  using T = typename V::Element;
  constexpr int N = V::lanes, most = Flow<V>::most + N;
  const Flow<V> flow(s, sizeof(S), end - begin);
  alignas(64) T maximum[most];
  alignas(64) T factor[most];

  for (int64_t first = begin; first < end; first += flow.width) {
    const int width = end - first < flow.width ? int(end - first) : flow.width;
    ColumnSums<V> sums(width);
    for (int c = 0; c < width; c += N) store(maximum + c, f.least());
    each_piece<V>(s, first, width, 0, s.length, flow.ahead,
                  [&](int64_t at, int64_t, int c, auto k, int last, Soon soon) __attribute__((always_inline)) {
                    using A = Abreast<V, decltype(k)::value>;
                    soon.fetch_from<S, decltype(k)::value * N>(x);
                    max(A::read(x + at, last, V(0)), A::read(maximum + c, N, V(0))).write(maximum + c, last);
                  });
    const auto term_at = [&](int64_t at, int c, auto k, int last) __attribute__((always_inline)) {
      using A = Abreast<V, decltype(k)::value>;
      return F<A>(f).term(A::read(x + at, last, V(0)), A::read(maximum + c, N, V(0)));
    };
    each_block<T>(s.length, [&](int64_t from, int64_t to) __attribute__((always_inline)) {
      each_piece<V>(s, first, width, from, to, flow.ahead,
                    [&](int64_t at, int64_t j, int c, auto k, int last, Soon soon) __attribute__((always_inline)) {
                      soon.fetch_from<S, decltype(k)::value * N>(x);
                      sums.add(from, j, c, term_at(at, c, k, last));
                    });
      sums.end_block(to - from);
    });
    sums.results(factor);
    for (int c = 0; c < width; c += N) store(factor + c, f.factor(load(factor + c)));
    each_piece<V>(s, first, width, 0, s.length, flow.at_last,
                  [&](int64_t at, int64_t, int c, auto k, int last, Soon soon) __attribute__((always_inline)) {
                    using A = Abreast<V, decltype(k)::value>;
                    soon.fetch_from<S, decltype(k)::value * N>(x);
                    const A from = F<V>::keeps_terms ? term_at(at, c, k, last) : A::read(x + at, last, V(0));
                    F<A>(f).forward(from, A::read(maximum + c, N, V(0)), A::read(factor + c, N, V(0))).write(y + at, last);
                  });
  }
}

template <template <class> class F, class S>
void columns(const S* x, S* y, SoftmaxShape s, int64_t begin, int64_t end, F<LaneOf<S>> f) {
  using V = LaneOf<S>;
  using T = typename V::Element;
  constexpr int N = V::lanes;
  using C = Cut<V>;
  const C cut(s.length, end - begin);
  alignas(64) T buffer[C::room];
  alignas(64) T maximum[C::most + N];
  alignas(64) T factor[C::most + N];
  alignas(64) T block[C::most];
  alignas(64) double total[C::most];
  const bool whole = s.length <= cut.rows;

  for (int64_t first = begin; first < end; first += cut.width) {
    const int width = end - first < cut.width ? int(end - first) : cut.width;
    const Panel<V> panel{buffer, cut.stride, width};
    const auto fill = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
      each_piece<V>(s, first, width, from, to, 0,
                    [&](int64_t at, int64_t j, int c, auto k, int last, Soon) __attribute__((always_inline)) {
                      using A = Abreast<V, decltype(k)::value>;
                      A::read(x + at, last, V(0)).write(buffer + (j - from) * cut.stride + c, N);
                    });
    };
    const auto blocks = [&](auto body) __attribute__((always_inline)) {
      for (int64_t from = 0; from < s.length; from += cut.rows)
        body(from, s.length - from < cut.rows ? s.length : from + cut.rows);
    };
    for (int r = 0; r < width; r += N) store(maximum + r, f.least());
    for (int r = 0; r < width; ++r) total[r] = 0;
    blocks([&](int64_t from, int64_t to) __attribute__((always_inline)) {
      fill(from, to);
      panel.maxima(int(to - from), maximum);
    });
    blocks([&](int64_t from, int64_t to) __attribute__((always_inline)) {
      if (!whole) {
        fill(from, to);
        panel.terms(buffer, int(to - from), maximum, f);
      } else {
        // Memory is idle while terms are computed: it brings what the next panel will read.
        const S* next = x + column_at(s, first + width);
        panel.terms(buffer, int(to), maximum, f, [&](int j, int64_t r, auto k) __attribute__((always_inline)) {
          fetch<S, decltype(k)::value * N>(next + j * s.inner + r);
        });
      }
      for (int64_t at = from; at < to; at += kSumBlock<T>) {
        Panel<V>{buffer + (at - from) * cut.stride, cut.stride, width}.sums(
            int(to - at < kSumBlock<T> ? to - at : kSumBlock<T>), block);
        for (int r = 0; r < width; ++r) total[r] += double(block[r]);
      }
    });
    for (int r = 0; r < width; ++r) factor[r] = T(total[r]);
    for (int r = 0; r < width; r += N) store(factor + r, f.factor(load(factor + r)));
    blocks([&](int64_t from, int64_t to) __attribute__((always_inline)) {
      if (!whole && F<V>::keeps_terms) {
        fill(from, to);
        panel.terms(buffer, int(to - from), maximum, f);
      }
      each_piece<V>(s, first, width, from, to, 0,
                    [&](int64_t at, int64_t j, int c, auto k, int last, Soon) __attribute__((always_inline)) {
                      using A = Abreast<V, decltype(k)::value>;
                      if (cut.long_pieces(sizeof(S))) will_write<S, decltype(k)::value * N>(y + at);
                      const A v = F<V>::keeps_terms ? A::read(buffer + (j - from) * cut.stride + c, N, V(0))
                                                    : A::read(x + at, last, V(0));
                      F<A>(f).forward(v, A::read(maximum + c, N, V(0)), A::read(factor + c, N, V(0))).write(y + at, last);
                    });
    });
  }
}

template <template <class> class F, class S>
void columns_backward(const S* dy, const S* y, S* dx, SoftmaxShape s, int64_t begin, int64_t end, F<LaneOf<S>> f) {
  using V = LaneOf<S>;
  using T = typename V::Element;
  constexpr int N = V::lanes;
  const Flow<V> flow(s, 2 * sizeof(S), end - begin);
  alignas(64) T dot[Flow<V>::most + N];

  for (int64_t first = begin; first < end; first += flow.width) {
    const int width = end - first < flow.width ? int(end - first) : flow.width;
    ColumnSums<V> sums(width);
    each_block<T>(s.length, [&](int64_t from, int64_t to) __attribute__((always_inline)) {
      each_piece<V>(s, first, width, from, to, flow.ahead,
                    [&](int64_t at, int64_t j, int c, auto k, int last, Soon soon) __attribute__((always_inline)) {
                      using A = Abreast<V, decltype(k)::value>;
                      soon.fetch_from<S, decltype(k)::value * N>(dy);
                      soon.fetch_from<S, decltype(k)::value * N>(y);
                      sums.add(from, j, c, F<A>::product(A::read(dy + at, last, V(0)), A::read(y + at, last, V(0))));
                    });
      sums.end_block(to - from);
    });
    sums.results(dot);
    each_piece<V>(s, first, width, 0, s.length, flow.at_last,
                  [&](int64_t at, int64_t, int c, auto k, int last, Soon soon) __attribute__((always_inline)) {
                    using A = Abreast<V, decltype(k)::value>;
                    soon.fetch_from<S, decltype(k)::value * N>(dy);
                    soon.fetch_from<S, decltype(k)::value * N>(y);
                    const A d = A::read(dy + at, last, V(0)), v = A::read(y + at, last, V(0));
                    F<A>(f).backward(d, v, A::read(dot + c, N, V(0))).write(dx + at, last);
                  });
  }
}

// ---- Units ---------------------------------------------------------------------------------------------------------------

template <template <class> class F, class S>
void softmax_forward(const void* x_, void* y_, SoftmaxShape s, SoftmaxOptions options, int64_t begin, int64_t end) {
  using V = LaneOf<S>;
  if constexpr (F<V>::tempered) {
    if (options.temperature == 1) return softmax_forward<F<V>::template AtOne, S>(x_, y_, s, options, begin, end);
  }
  const S* x = static_cast<const S*>(x_);
  S* y = static_cast<S*>(y_);
  const F<V> f(options);
  if (s.inner > 1) {
    const int64_t all = s.outer * s.inner;
    const bool in_place = broad<V>(s) && !Cut<V>::fits(s.length);
    (in_place ? long_columns<F, S> : columns<F, S>)(x, y, s, begin * kSoftmaxColumns,
                                                    end * kSoftmaxColumns < all ? end * kSoftmaxColumns : all, f);
  } else if (s.length <= kShortRow) {
    constexpr int most = kSquares * V::lanes;
    for (int64_t row = begin; row < end; row += most)
      short_rows(x + row * s.length, y + row * s.length, int(s.length), int(end - row < most ? end - row : most), f);
  } else {
    long_rows(x + begin * s.length, y + begin * s.length, s.length, end - begin, f);
  }
}

template <template <class> class F, class S>
void softmax_backward(const void* dy_, const void* y_, void* dx_, SoftmaxShape s, SoftmaxOptions options, int64_t begin,
                      int64_t end) {
  using V = LaneOf<S>;
  if constexpr (F<V>::tempered) {
    if (options.temperature == 1) return softmax_backward<F<V>::template AtOne, S>(dy_, y_, dx_, s, options, begin, end);
  }
  const S* dy = static_cast<const S*>(dy_);
  const S* y = static_cast<const S*>(y_);
  S* dx = static_cast<S*>(dx_);
  const F<V> f(options);
  if (s.inner > 1) {
    const int64_t all = s.outer * s.inner;
    columns_backward(dy, y, dx, s, begin * kSoftmaxColumns, end * kSoftmaxColumns < all ? end * kSoftmaxColumns : all, f);
  } else if (s.length <= kShortRowBackward) {
    for (int64_t row = begin; row < end; row += V::lanes)
      short_rows_backward(dy + row * s.length, y + row * s.length, dx + row * s.length, int(s.length),
                          int(end - row < V::lanes ? end - row : V::lanes), f);
  } else {
    long_rows_backward(dy + begin * s.length, y + begin * s.length, dx + begin * s.length, s.length, end - begin, f);
  }
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
