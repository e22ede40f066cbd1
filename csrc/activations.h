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

/// For functors whose derivative follows from the output, and for those that need the input.
struct SavesOutput {
  FASTACT_FN static bool saves_input(const double*) { return false; }
};
struct SavesInput {
  FASTACT_FN static bool saves_input(const double*) { return true; }
};

/// 1 / (1 + exp(-x)).
template <class V>
struct Sigmoid : SavesOutput {
  static constexpr bool costly = true;
  FASTACT_FN explicit Sigmoid(const double*) {}
  FASTACT_FN V forward(V x) const { return logistic_gradual(x); }
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
  FASTACT_FN V forward(V x) const { return scale * logistic_gradual(V(slope * x)); }
  // dy slope y (1 - y / scale), with the difference taken first, where it is exact.
  FASTACT_FN V backward(V dy, V y) const { return dy * ((slope * y) * ((scale - y) * inverse_scale)); }
};

/// x where x > 0, else alpha (exp(x) - 1).
template <class V>
struct ELU : SavesInput {
  static constexpr bool costly = true;
  V alpha;
  FASTACT_FN explicit ELU(const double* p) : alpha(p[0]) {}
  FASTACT_FN V forward(V x) const { return select(x < V(0), alpha * expm1_nonpositive(min(V(0), x)), x); }
  FASTACT_FN V backward(V dy, V x) const { return select(x <= V(0), dy * (alpha * exp_gradual(min(V(0), x))), dy); }
};

/// x / (1 + exp(-x)).
template <class V>
struct SiLU : SavesInput {
  static constexpr bool costly = true;
  FASTACT_FN explicit SiLU(const double*) {}
  FASTACT_FN V forward(V x) const {
    const V normal(Constants<typename ElementOf<V>::type>::exp_normal);
    const V y = x * logistic(x);
    return any_less(x, normal) ? V(select(x < normal, times_exp_subnormal(x, x), y)) : y;
  }
  FASTACT_FN V backward(V dy, V x) const {
    const V normal(Constants<typename ElementOf<V>::type>::exp_normal);
    const auto s = both_logistics(x);
    const V slope = s.of_x * fma(x, s.of_minus_x, V(1));  // 1 - s.of_x would lose what x multiplies
    return dy * (any_less(x, normal) ? V(select(x < normal, times_exp_subnormal(V(1 + x), x), slope)) : slope);
  }
};

/// log(1 + exp(z)) / beta with z = beta x; x where z > threshold.
template <class V>
struct Softplus : SavesInput {
  static constexpr bool costly = true;
  V beta, inverse_beta, threshold;
  FASTACT_FN explicit Softplus(const double* p) : beta(p[0]), inverse_beta(1 / p[0]), threshold(p[1]) {}
  FASTACT_FN V forward(V x) const {
    const V normal(Constants<typename ElementOf<V>::type>::exp_normal), z = beta * x;
    V y = max(V(0), z) + log1p_unit(exp_nonpositive(-abs(z)));
    if (any_less(z, normal)) y = select(z < normal, exp_subnormal(z), y);
    return select(z > threshold, x, y * inverse_beta);
  }
  FASTACT_FN V backward(V dy, V x) const {
    const V z = beta * x;
    return select(z > threshold, dy, dy * logistic_gradual(z));
  }
};

/// log(1 / (1 + exp(-x))).
template <class V>
struct LogSigmoid : SavesInput {
  static constexpr bool costly = true;
  FASTACT_FN explicit LogSigmoid(const double*) {}
  FASTACT_FN V forward(V x) const {
    const V normal(Constants<typename ElementOf<V>::type>::exp_normal), far = -x;
    const V y = min(V(0), x) - log1p_unit(exp_nonpositive(-abs(x)));
    return any_less(far, normal) ? V(select(far < normal, 0 - exp_subnormal(far), y)) : y;
  }
  FASTACT_FN V backward(V dy, V x) const { return dy * logistic_gradual(V(-x)); }
};

/// (x + 3) / 6, but at least 0 and at most 1. Above 0 the distance from 1 is what is divided, so that the output is 1 only
/// where x >= 3, as it is 0 only where x <= -3.
template <class V>
struct Hardsigmoid : SavesInput {
  static constexpr bool costly = false;
  FASTACT_FN explicit Hardsigmoid(const double*) {}
  FASTACT_FN V forward(V x) const {
    const V bounded = max(V(-3), min(V(3), x));
    return select(bounded > V(0), 1 - (3 - bounded) * V(1.0 / 6), (bounded + 3) * V(1.0 / 6));
  }
  FASTACT_FN V backward(V dy, V x) const { return select(x > V(-3), select(x < V(3), dy * V(1.0 / 6), V(0)), V(0)); }
};

// ---- The same with the derivative taken from the input: where the output is rounded to 16 bits, or to 1, its distance from
// the bounds is lost, and with it the gradient.

template <class V>
struct PreciseSigmoid : Sigmoid<V> {
  FASTACT_FN explicit PreciseSigmoid(const double* p) : Sigmoid<V>(p) {}
  FASTACT_FN static bool saves_input(const double*) { return true; }
  FASTACT_FN V backward(V dy, V x) const { return dy * logistic_derivative(x); }
};

template <class V>
struct PreciseTanh : Tanh<V> {
  FASTACT_FN explicit PreciseTanh(const double* p) : Tanh<V>(p) {}
  FASTACT_FN static bool saves_input(const double*) { return true; }
  FASTACT_FN V backward(V dy, V x) const { return dy * logistic_derivative(V(2 * x), 4); }
};

template <class V>
struct PreciseScaledSigmoid : ScaledSigmoid<V> {
  V steepness;
  FASTACT_FN explicit PreciseScaledSigmoid(const double* p) : ScaledSigmoid<V>(p), steepness(p[0] * p[1]) {}
  FASTACT_FN static bool saves_input(const double*) { return true; }
  FASTACT_FN V backward(V dy, V x) const { return dy * (steepness * logistic_derivative(V(this->slope * x))); }
};

// ---- And with the derivative taken from the output, for functions in place, where nothing else of the input is left.

/// The sign of y tells the branch unless alpha is negative.
template <class V>
struct ResultELU : ELU<V> {
  bool input_saved;
  FASTACT_FN explicit ResultELU(const double* p) : ELU<V>(p), input_saved(saves_input(p)) {}
  FASTACT_FN static bool saves_input(const double* p) { return p[0] < 0; }
  FASTACT_FN V backward(V dy, V saved) const {
    return input_saved ? ELU<V>::backward(dy, saved) : V(select(saved <= V(0), dy * (saved + this->alpha), dy));
  }
};

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact

/// The one list: ROW(op, functor, names of the float parameters ...). A function with `precise_grad` has two rows, and so may
/// one with `inplace`, whose row `result_...` then takes the derivative from the output.
#define FASTACT_ACTIVATIONS(ROW)                                      \
  ROW(sigmoid, Sigmoid)                                               \
  ROW(relu, ReLU)                                                     \
  ROW(leaky_relu, LeakyReLU, "negative_slope")                        \
  ROW(tanh, Tanh)                                                     \
  ROW(scaled_sigmoid, ScaledSigmoid, "scale", "slope")                \
  ROW(elu, ELU, "alpha")                                              \
  ROW(silu, SiLU)                                                     \
  ROW(softplus, Softplus, "beta", "threshold")                        \
  ROW(log_sigmoid, LogSigmoid)                                        \
  ROW(hardsigmoid, Hardsigmoid)                                       \
  ROW(precise_sigmoid, PreciseSigmoid)                                \
  ROW(precise_tanh, PreciseTanh)                                      \
  ROW(precise_scaled_sigmoid, PreciseScaledSigmoid, "scale", "slope") \
  ROW(result_elu, ResultELU, "alpha")
