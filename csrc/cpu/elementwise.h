// The two elementwise loops, forward and backward, for every functor and storage type.
#pragma once

#include "../kernels.h"
#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

template <template <class> class Functor, class S>
void forward(const void* x_, void* y_, int64_t n, const double* parameters) {
  using V = LaneOf<S>;
  const S* x = static_cast<const S*>(x_);
  S* y = static_cast<S*>(y_);
  const Functor<V> f(parameters);
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + V::lanes <= n; i += V::lanes) store(y + i, f.forward(load(x + i)));
  if (const int rest = int(n - i)) store_part(y + i, rest, f.forward(load_part(x + i, rest, V(0))));
}

template <template <class> class Functor, class S>
void backward(const void* dy_, const void* saved_, void* dx_, int64_t n, const double* parameters) {
  using V = LaneOf<S>;
  const S* dy = static_cast<const S*>(dy_);
  const S* saved = static_cast<const S*>(saved_);
  S* dx = static_cast<S*>(dx_);
  const Functor<V> f(parameters);
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + V::lanes <= n; i += V::lanes) store(dx + i, f.backward(load(dy + i), load(saved + i)));
  if (const int rest = int(n - i))
    store_part(dx + i, rest, f.backward(load_part(dy + i, rest, V(0)), load_part(saved + i, rest, V(0))));
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
