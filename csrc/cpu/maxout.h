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
  // Pieces are neighbours: those of several groups are brought side by side.
  const int64_t groups = s.outer * s.groups;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kMaxoutGroups, last = first + kMaxoutGroups < groups ? first + kMaxoutGroups : groups;
    for (int64_t g = first; g < last; g += N) {
      const int n = last - g < N ? int(last - g) : N;
      const S* from = x + g * s.pieces;
      S side[N] = {};
      const auto piece = [&](int64_t p) __attribute__((always_inline)) {
        for (int l = 0; l < n; ++l) side[l] = from[l * s.pieces + p];
        return load(side);
      };
      Maxout<L> m(piece(0));
      for (int64_t p = 1; p < s.pieces; ++p) m.take(piece(p), L(double(p)));
      write_largest(m, y + g, index + g, n);
    }
  }
}

template <class S>
void maxout_backward(const void* dy_, const uint8_t* index, void* dx_, MaxoutShape s, int64_t begin, int64_t end) {
  const S* dy = static_cast<const S*>(dy_);
  S* dx = static_cast<S*>(dx_);
  if (s.inner > 1) {
    each_part(s, begin, end, [&](int64_t group, int64_t first, int64_t count) __attribute__((always_inline)) {
      const int64_t from = group * s.inner + first;
      for (int64_t p = 0; p < s.pieces; ++p) {
        S* to = dx + (group * s.pieces + p) * s.inner + first;
        for (int64_t i = 0; i < count; ++i) to[i] = index[from + i] == p ? dy[from + i] : S{};
      }
    });
    return;
  }
  const int64_t groups = s.outer * s.groups, last = end * kMaxoutGroups < groups ? end * kMaxoutGroups : groups;
  for (int64_t g = begin * kMaxoutGroups; g < last; ++g)
    for (int64_t p = 0; p < s.pieces; ++p) dx[g * s.pieces + p] = index[g] == p ? dy[g] : S{};
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
