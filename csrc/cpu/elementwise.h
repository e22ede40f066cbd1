// The two elementwise loops, forward and backward, for every functor and storage type.
#pragma once

#include "../kernels.h"
#include "brief.h"
#include "storage.h"
#include "tanh_table.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// Calls whole(i) for full groups of neighbours from i, one(i) for full vectors, part(i, n) for the n elements left.
template <class S, class Whole, class One, class Part>
FASTACT_FN void each_vector(int64_t n, Whole whole, One one, Part part) {
  constexpr int N = LaneOf<S>::lanes;
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + Group<S>::elements <= n; i += Group<S>::elements) whole(i);
  if constexpr (Group<S>::elements > N)
    for (; i + N <= n; i += N) one(i);
  if (i < n) part(i, int(n - i));
}

/// y[i] = f(x[i])
template <class S, class F>
FASTACT_FN void map(const S* x, S* y, int64_t n, const F& f) {
  each_vector<S>(
      n,
      [&](int64_t i) __attribute__((always_inline)) {
        will_write(y + i);
        Group<S> g(x + i);
        for (LaneOf<S>& v : g.v) v = f(v);
        g.write(y + i);
      },
      [&](int64_t i) __attribute__((always_inline)) { store(y + i, f(load(x + i))); },
      [&](int64_t i, int rest)
          __attribute__((always_inline)) { store_part(y + i, rest, f(load_part(x + i, rest, LaneOf<S>(0)))); });
}

/// dx[i] = f(dy[i], saved[i], lanes), of which so many lanes count; without kWrite the results are dropped.
template <bool kWrite, class S, class F>
FASTACT_FN void map_gradient(const S* dy, const S* saved, S* dx, int64_t n, const F& f) {
  constexpr int N = LaneOf<S>::lanes;
  each_vector<S>(
      n,
      [&](int64_t i) __attribute__((always_inline)) {
        if constexpr (kWrite) will_write(dx + i);
        Group<S> g(dy + i);
        const Group<S> kept(saved + i);
#pragma GCC unroll 2
        for (int k = 0; k < Group<S>::vectors; ++k) g.v[k] = f(g.v[k], kept.v[k], N);
        if constexpr (kWrite) g.write(dx + i);
      },
      [&](int64_t i) __attribute__((always_inline)) {
        const LaneOf<S> v = f(load(dy + i), load(saved + i), N);
        if constexpr (kWrite) store(dx + i, v);
      },
      [&](int64_t i, int rest) __attribute__((always_inline)) {
        const LaneOf<S> zero(0);
        const LaneOf<S> v = f(load_part(dy + i, rest, zero), load_part(saved + i, rest, zero), rest);
        if constexpr (kWrite) store_part(dx + i, rest, v);
      });
}

template <template <class> class Functor, class S>
void forward(const void* x, void* y, int64_t n, const double* parameters) {
  using V = typename Computed<S>::Lane;
  const Functor<V> f(parameters);
  map(static_cast<const S*>(x), static_cast<S*>(y), n,
      [&](V v) __attribute__((always_inline)) -> LaneOf<S> { return f.forward(v); });
}

template <template <class> class Functor, class S>
void backward(const void* dy, const void* saved, void* dx, int64_t n, const double* parameters) {
  using V = typename Computed<S>::Lane;
  const Functor<V> f(parameters);
  map_gradient<true>(static_cast<const S*>(dy), static_cast<const S*>(saved), static_cast<S*>(dx), n,
                     [&](V v, V kept, int) __attribute__((always_inline)) -> LaneOf<S> { return f.backward(v, kept); });
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
