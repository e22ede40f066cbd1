// The mathematics of softmax and its relatives over a row x_0 ... x_{n-1}, with m its maximum: a functor each, and the one
// list.
//
//   terms e_j, their sum s, and y_j made of x_j or e_j, m and s           backward: dx_j made of dy_j, y_j and d, a sum of
//   products
//
// A functor is a template over its lane type, as those of activations.h are; what it says of itself stands beside Softmax. All
// else -- instruction sets, dtypes, layouts, CUDA, ops, autograd of any order, tests -- follows from it and from the list.
//
// The maximum is subtracted before anything else, so that a row of huge equal numbers is right. It need not carry NaN: an x_j
// that is NaN makes e_j, and so s and the whole row, NaN. A row of -inf, or one that holds +inf, is NaN through inf - inf.
//
// On the CPU, s and d are summed in one order, whatever the layout, the vector width or the number of threads: element j goes
// to partial sum j mod kSumLanes, in order of j, and after every kSumBlock elements (1024, of double 512) the partial sums are
// added as a tree (32 apart, 16, ... 1) and the result goes to a total kept in double. So a result depends on the row alone,
// and the error of the sum does not grow with n. d is made of products that are rounded before they are added.
#pragma once

#include "kernels.h"
#include "lane.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

constexpr int kSumLanes = 64;
template <class T>
constexpr int kSumBlock = 4096 / int(sizeof(T));

template <class V>
struct SoftmaxAtOne;

/// y_j = e_j / s, e_j = exp((x_j - m) / temperature), s = sum e_j       dx_j = y_j (dy_j - d) / temperature, d = sum dy_j y_j
///
/// With masked_zero, m is at least the lowest finite number: in a row of -inf all terms are then 0, and so is the row.
template <class V>
struct Softmax {
  /// Whether it takes a temperature and masked_zero.
  static constexpr bool tempered = true;
  template <class U>
  using AtOne = SoftmaxAtOne<U>;
  /// Whether y is made of the terms; else of x.
  static constexpr bool keeps_terms = true;
  /// Whether its Jacobian is symmetric, so that backward(t, y) is the derivative in the direction of t too.
  static constexpr bool symmetric = true;
  /// Whether the factor of one row is quicker to compute as a number than as a vector.
  static constexpr bool scalar_factor = true;

  V scale, lowest;
  FASTACT_FN explicit Softmax(SoftmaxOptions o)
      : scale(1 / o.temperature), lowest(o.masked_zero ? -Constants<typename ElementOf<V>::type>::largest : -kInfinity) {}
  /// The same in another lane type.
  template <class U>
  FASTACT_FN explicit Softmax(const Softmax<U>& f) : scale(f.scale), lowest(f.lowest) {}

  /// What a row's maximum is at least.
  FASTACT_FN V least() const { return lowest; }
  FASTACT_FN V term(V x, V maximum) const { return exp_nonpositive((x - maximum) * scale); }
  /// Of the sum of a row, what all its elements need. The sum is 1 or more, or NaN; or 0, where the terms are 0 too.
  FASTACT_FN static V factor(V sum) { return 1 / max(V(1), sum); }
  FASTACT_FN V forward(V term, V, V factor) const { return term * factor; }

  FASTACT_FN static V product(V dy, V y) { return dy * y; }
  FASTACT_FN static V product(V dy, V y, V sum) { return fma(dy, y, sum); }
  FASTACT_FN V backward(V dy, V y, V dot) const { return y * (dy - dot) * scale; }
};

/// The same at a temperature of 1, for loops to which a multiplication counts.
template <class V>
struct SoftmaxAtOne : Softmax<V> {
  static constexpr bool tempered = false;

  FASTACT_FN explicit SoftmaxAtOne(SoftmaxOptions o) : Softmax<V>(o) {}
  template <class U>
  FASTACT_FN explicit SoftmaxAtOne(const SoftmaxAtOne<U>& f) : Softmax<V>(f) {}

  FASTACT_FN static V term(V x, V maximum) { return exp_nonpositive(x - maximum); }
  FASTACT_FN static V backward(V dy, V y, V dot) { return y * (dy - dot); }
};

/// y_j = x_j - m - log s, e_j = exp(x_j - m), s = sum e_j               dx_j = dy_j - exp(y_j) d, d = sum dy_j
template <class V>
struct LogSoftmax {
  static constexpr bool tempered = false, keeps_terms = false, symmetric = false, scalar_factor = false;

  FASTACT_FN explicit LogSoftmax(SoftmaxOptions) {}
  template <class U>
  FASTACT_FN explicit LogSoftmax(const LogSoftmax<U>&) {}

  FASTACT_FN static V least() { return V(-kInfinity); }
  FASTACT_FN static V term(V x, V maximum) { return exp_nonpositive(x - maximum); }
  FASTACT_FN static V factor(V sum) { return log_of_sum(sum); }
  FASTACT_FN static V forward(V x, V maximum, V factor) { return x - maximum - factor; }

  FASTACT_FN static V product(V dy, V) { return dy; }
  FASTACT_FN static V product(V dy, V, V sum) { return dy + sum; }
  FASTACT_FN static V backward(V dy, V y, V dot) { return fma(-exp_nonpositive(y), dot, dy); }
};

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact

/// The one list: ROW(op, functor).
#define FASTACT_SOFTMAXES(ROW) \
  ROW(softmax, Softmax)        \
  ROW(log_softmax, LogSoftmax)
