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

template <template <class> class Functor, class S>
void forward(const void* x_, void* y_, int64_t n, const double* parameters) {
  using V = typename Computed<S>::Lane;
  const S* x = static_cast<const S*>(x_);
  S* y = static_cast<S*>(y_);
  const Functor<V> f(parameters);
  each_vector<S>(
      n,
      [&](int64_t i) __attribute__((always_inline)) {
        will_write(y + i);
        Group<S> g(x + i);
        for (LaneOf<S>& v : g.v) v = f.forward(v);
        g.write(y + i);
      },
      [&](int64_t i) __attribute__((always_inline)) { store(y + i, f.forward(load(x + i))); },
      [&](int64_t i, int rest)
          __attribute__((always_inline)) { store_part(y + i, rest, f.forward(load_part(x + i, rest, LaneOf<S>(0)))); });
}

template <template <class> class Functor, class S>
void backward(const void* dy_, const void* saved_, void* dx_, int64_t n, const double* parameters) {
  using V = typename Computed<S>::Lane;
  const S* dy = static_cast<const S*>(dy_);
  const S* saved = static_cast<const S*>(saved_);
  S* dx = static_cast<S*>(dx_);
  const Functor<V> f(parameters);
  each_vector<S>(
      n,
      [&](int64_t i) __attribute__((always_inline)) {
        will_write(dx + i);
        Group<S> g(dy + i);
        const Group<S> kept(saved + i);
#pragma GCC unroll 2
        for (int k = 0; k < Group<S>::vectors; ++k) g.v[k] = f.backward(g.v[k], kept.v[k]);
        g.write(dx + i);
      },
      [&](int64_t i) __attribute__((always_inline)) { store(dx + i, f.backward(load(dy + i), load(saved + i))); },
      [&](int64_t i, int rest) __attribute__((always_inline)) {
        store_part(dx + i, rest, f.backward(load_part(dy + i, rest, LaneOf<S>(0)), load_part(saved + i, rest, LaneOf<S>(0))));
      });
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
