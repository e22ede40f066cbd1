// THE MATHEMATICS: one functor per elementwise activation, forward beside backward, then the one list of rows.
//
// A functor is a template over its lane type (lane.h says which words it may use). `forward(x)` is the activation,
// `backward(dy, saved)` is dy times its derivative, written in terms of the tensor that is kept: the output y, or the input x
// where saves_input() says so. `costly` says whether forward takes an exponential or as much time: it is then worth a second
// thread sooner. Everything else -- instruction sets, dtypes, CUDA, ops, autograd, forward and reverse mode of
// any order, tests, benchmark, documentation -- follows from these lines and from the rows at the end.
#pragma once

#include "lane.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// For functors whose derivative follows from the output.
struct SavesOutput {
  FASTACT_FN static bool saves_input(const double*) { return false; }
};

/// 1 / (1 + exp(-x)): the sum is rounded once, the quotient once. Far below zero the result is e^x, down to the last subnormal
/// number.
template <class V>
struct Sigmoid : SavesOutput {
  static constexpr bool costly = true;
  FASTACT_FN explicit Sigmoid(const double*) {}
  FASTACT_FN V forward(V x) const {
    const V normal(Constants<typename ElementOf<V>::type>::exp_normal);
    const V y = logistic(x);
    return any_less(x, normal) ? V(select(x < normal, exp_subnormal(x), y)) : y;
  }
  FASTACT_FN V backward(V dy, V y) const { return dy * (y * (1 - y)); }
};

/// max(x, 0). Exact; keeps NaN and -0.0, and lets the gradient pass at NaN, as torch does.
template <class V>
struct ReLU : SavesOutput {
  static constexpr bool costly = false;
  FASTACT_FN explicit ReLU(const double*) {}
  FASTACT_FN V forward(V x) const { return max(V(0), x); }
  FASTACT_FN V backward(V dy, V y) const { return select(y <= V(0), V(0), dy); }
};

/// x where x > 0, else negative_slope x. One rounding. The sign of y tells the branch unless the slope is negative.
template <class V>
struct LeakyReLU {
  static constexpr bool costly = false;
  V negative_slope;
  FASTACT_FN explicit LeakyReLU(const double* p) : negative_slope(p[0]) {}
  FASTACT_FN static bool saves_input(const double* p) { return p[0] < 0; }
  FASTACT_FN V forward(V x) const { return select(x > V(0), x, negative_slope * x); }
  FASTACT_FN V backward(V dy, V saved) const { return select(saved > V(0), dy, negative_slope * dy); }
};

/// tanh(x): of the magnitude, with the sign put back, so that it is odd bit for bit.
template <class V>
struct Tanh : SavesOutput {
  static constexpr bool costly = true;
  FASTACT_FN explicit Tanh(const double*) {}
  FASTACT_FN V forward(V x) const { return copysign(tanh_nonnegative(abs(x)), x); }
  // (1 - y)(1 + y) rather than 1 - y^2: both factors are exact to a rounding where y is near 1.
  FASTACT_FN V backward(V dy, V y) const { return dy * ((1 - y) * (1 + y)); }
};

/// scale / (1 + exp(-slope x)).
template <class V>
struct ScaledSigmoid : SavesOutput {
  static constexpr bool costly = true;
  V scale, slope, inverse_scale;
  FASTACT_FN explicit ScaledSigmoid(const double* p) : scale(p[0]), slope(p[1]), inverse_scale(p[0] == 0 ? 0 : 1 / p[0]) {}
  FASTACT_FN V forward(V x) const { return scale * Sigmoid<V>(nullptr).forward(slope * x); }
  // dy slope y (1 - y / scale), with the difference taken first, where it is exact.
  FASTACT_FN V backward(V dy, V y) const { return dy * ((slope * y) * ((scale - y) * inverse_scale)); }
};

/// x where x > 0, else alpha (exp(x) - 1). The sign of y tells the branch unless alpha is negative.
template <class V>
struct ELU {
  static constexpr bool costly = true;
  V alpha;
  bool input_saved;
  FASTACT_FN explicit ELU(const double* p) : alpha(p[0]), input_saved(saves_input(p)) {}
  FASTACT_FN static bool saves_input(const double* p) { return p[0] < 0; }
  FASTACT_FN V forward(V x) const { return select(x < V(0), alpha * expm1_nonpositive(min(V(0), x)), x); }
  FASTACT_FN V backward(V dy, V saved) const {
    const V slope = input_saved ? alpha * exp_gradual(min(V(0), saved)) : saved + alpha;
    return select(saved <= V(0), dy * slope, dy);
  }
};

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact

/// The one list: ROW(op, functor, names of the float parameters ...).
#define FASTACT_ACTIVATIONS(ROW)                       \
  ROW(sigmoid, Sigmoid)                                \
  ROW(relu, ReLU)                                      \
  ROW(leaky_relu, LeakyReLU, "negative_slope")         \
  ROW(tanh, Tanh)                                      \
  ROW(scaled_sigmoid, ScaledSigmoid, "scale", "slope") \
  ROW(elu, ELU, "alpha")
