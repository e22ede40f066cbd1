// The loops of maxout, for every storage type.
#pragma once

#include "../kernels.h"
#include "../maxout.h"
#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// Calls f(group, first, count) for the parts of groups that units of work are: `count` neighbours of each piece, from `first`.
template <class F>
FASTACT_FN void each_part(const MaxoutShape& s, int64_t begin, int64_t end, const F& f) {
  const int64_t parts = (s.inner + kMaxoutPart - 1) / kMaxoutPart;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit / parts, first = (unit - group * parts) * kMaxoutPart, rest = s.inner - first;
    f(group, first, rest < kMaxoutPart ? rest : kMaxoutPart);
  }
}

/// n results to y and index.
template <class S>
FASTACT_FN void write_largest(const Maxout<LaneOf<S>>& m, S* y, uint8_t* index, int n) {
  store_some(y, n, m.largest);
  for (int l = 0; l < n; ++l) index[l] = uint8_t(m.which.raw[l]);
}

/// Calls f with how many pieces there are: as a constant for the usual numbers, so that loops over neighbours become shuffles.
template <class F>
FASTACT_FN void with_pieces(int64_t pieces, const F& f) {
  switch (pieces) {
    case 2:
      return f(Constant<2>());
    case 3:
      return f(Constant<3>());
    case 4:
      return f(Constant<4>());
    default:
      return f(pieces);
  }
}

/// The bits of a number, for what only moves it.
template <int bytes>
struct Word;
template <>
struct Word<2> {
  typedef uint16_t __attribute__((may_alias)) Type;
};
template <>
struct Word<4> {
  typedef uint32_t __attribute__((may_alias)) Type;
};
template <>
struct Word<8> {
  typedef uint64_t __attribute__((may_alias)) Type;
};

/// Groups first to last, whose pieces are neighbours: those of several groups are brought side by side.
template <class S, class Pieces>
FASTACT_FN void largest_neighbours(const S* x_, S* y, uint8_t* index, Pieces pieces, int64_t first, int64_t last) {
  using L = LaneOf<S>;
  using W = typename Word<int(sizeof(S))>::Type;
  constexpr int N = L::lanes;
  const W* x = reinterpret_cast<const W*>(x_);
  for (int64_t g = first; g < last; g += N) {
    const int n = last - g < N ? int(last - g) : N;
    const W* from = x + g * pieces;
    W side[N] = {};
    const auto piece = [&](int64_t p) __attribute__((always_inline)) {
      if (n == N)
        for (int l = 0; l < N; ++l) side[l] = from[l * pieces + p];
      else
        for (int l = 0; l < n; ++l) side[l] = from[l * pieces + p];
      return load(reinterpret_cast<const S*>(side));
    };
    Maxout<L> m(piece(0));
    for (int64_t p = 1; p < pieces; ++p) m.take(piece(p), L(double(p)));
    write_largest(m, y + g, index + g, n);
  }
}

template <class S>
void maxout_forward(const void* x_, void* y_, uint8_t* index, MaxoutShape s, int64_t begin, int64_t end) {
  using L = LaneOf<S>;
  constexpr int N = L::lanes;
  const S* x = static_cast<const S*>(x_);
  S* y = static_cast<S*>(y_);
  if (s.inner > 1) {
    each_part(s, begin, end, [&](int64_t group, int64_t first, int64_t count) __attribute__((always_inline)) {
      const S* from = x + group * s.pieces * s.inner + first;
      const int64_t to = group * s.inner + first;
      for (int64_t i = 0; i < count; i += N) {
        const int n = count - i < N ? int(count - i) : N;
        Maxout<L> m(load_some(from + i, n, L(0)));
        for (int64_t p = 1; p < s.pieces; ++p) m.take(load_some(from + p * s.inner + i, n, L(0)), L(double(p)));
        write_largest(m, y + to + i, index + to + i, n);
      }
    });
    return;
  }
  const int64_t groups = s.outer * s.groups, last = end * kMaxoutGroups < groups ? end * kMaxoutGroups : groups;
  with_pieces(s.pieces, [&](auto pieces) __attribute__((always_inline)) {
    largest_neighbours(x, y, index, pieces, begin * kMaxoutGroups, last);
  });
}

template <class W>
FASTACT_FN W kept(W dy, uint8_t index, int64_t piece) {
  return W(dy & W(0 - W(index == uint8_t(piece))));
}

template <class S>
void maxout_backward(const void* dy_, const uint8_t* __restrict index, void* dx_, MaxoutShape s, int64_t begin, int64_t end) {
  using W = typename Word<int(sizeof(S))>::Type;
  const W* __restrict dy = static_cast<const W*>(dy_);
  W* __restrict dx = static_cast<W*>(dx_);
  if (s.inner > 1) {
    each_part(s, begin, end, [&](int64_t group, int64_t first, int64_t count) __attribute__((always_inline)) {
      const int64_t from = group * s.inner + first;
      for (int64_t p = 0; p < s.pieces; ++p) {
        W* to = dx + (group * s.pieces + p) * s.inner + first;
        for (int64_t i = 0; i < count; ++i) to[i] = kept(dy[from + i], index[from + i], p);
      }
    });
    return;
  }
  const int64_t groups = s.outer * s.groups, last = end * kMaxoutGroups < groups ? end * kMaxoutGroups : groups;
  with_pieces(s.pieces, [&](auto pieces) __attribute__((always_inline)) {
    for (int64_t g = begin * kMaxoutGroups; g < last; ++g)
      for (int64_t p = 0; p < pieces; ++p) dx[g * pieces + p] = kept(dy[g], index[g], p);
  });
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
