// Tensors as a lane type: the backward formula of a row, evaluated on tensors that carry a tangent, gives its derivative with
// respect to the saved tensor, made of torch ops that are themselves differentiable. So no row states a second derivative.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/copysign.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sign.h>
#include <ATen/ops/where.h>

#include "../lane.h"

namespace fastact {

/// A tensor or a constant: constants stay out of the graph, and what is multiplied by the constant 0 vanishes.
struct Term {
  at::Tensor tensor;  // undefined for a constant
  double constant = 0;

  bool is(double c) const { return !tensor.defined() && constant == c; }
};

inline Term operator-(const Term& a) { return a.tensor.defined() ? Term{-a.tensor} : Term{{}, -a.constant}; }
inline Term operator+(const Term& a, const Term& b) {
  if (a.is(0)) return b;
  if (b.is(0)) return a;
  if (a.tensor.defined()) return b.tensor.defined() ? Term{a.tensor + b.tensor} : Term{a.tensor + b.constant};
  return b.tensor.defined() ? Term{b.tensor + a.constant} : Term{{}, a.constant + b.constant};
}
inline Term operator-(const Term& a, const Term& b) { return a + -b; }
inline Term operator*(const Term& a, const Term& b) {
  if (a.is(0) || b.is(0)) return {};
  if (a.is(1)) return b;
  if (b.is(1)) return a;
  if (a.tensor.defined()) return b.tensor.defined() ? Term{a.tensor * b.tensor} : Term{a.tensor * b.constant};
  return b.tensor.defined() ? Term{b.tensor * a.constant} : Term{{}, a.constant * b.constant};
}
inline Term operator/(const Term& a, const Term& b) {
  if (!b.tensor.defined()) return a * Term{{}, 1 / b.constant};
  if (a.is(0)) return {};
  return a.tensor.defined() ? Term{a.tensor / b.tensor} : Term{b.tensor.reciprocal() * a.constant};
}

/// a * b with its shape and its NaN, whatever b is.
inline Term product(const Term& a, const Term& b) {
  return a.tensor.defined() && b.is(0) ? Term{a.tensor * 0} : b.tensor.defined() && a.is(0) ? Term{b.tensor * 0} : a * b;
}

/// A value and its derivative in one direction, with the words of lane.h.
struct TensorLane {
  using Element = double;
  Term value, tangent;

  TensorLane(double c) : value{{}, c} {}
  TensorLane(Term v, Term t) : value(std::move(v)), tangent(std::move(t)) {}

  friend TensorLane operator-(const TensorLane& a) { return {-a.value, -a.tangent}; }
  friend TensorLane operator+(const TensorLane& a, const TensorLane& b) { return {a.value + b.value, a.tangent + b.tangent}; }
  friend TensorLane operator-(const TensorLane& a, const TensorLane& b) { return {a.value - b.value, a.tangent - b.tangent}; }
  friend TensorLane operator*(const TensorLane& a, const TensorLane& b) {
    return {product(a.value, b.value), a.tangent * b.value + a.value * b.tangent};
  }
  friend TensorLane operator/(const TensorLane& a, const TensorLane& b) {
    const Term q = a.value / b.value;
    return {q, (a.tangent - q * b.tangent) / b.value};
  }

  // Comparisons are made with a constant or between tensors; at least one side is a tensor.
  friend at::Tensor operator>(const TensorLane& a, const TensorLane& b) { return (a - b).value.tensor > 0; }
  friend at::Tensor operator<(const TensorLane& a, const TensorLane& b) { return (a - b).value.tensor < 0; }
  friend at::Tensor operator>=(const TensorLane& a, const TensorLane& b) { return (a - b).value.tensor >= 0; }
  friend at::Tensor operator<=(const TensorLane& a, const TensorLane& b) { return (a - b).value.tensor <= 0; }
  friend at::Tensor operator==(const TensorLane& a, const TensorLane& b) { return (a - b).value.tensor == 0; }
};

/// a where the condition holds, else b; two equal constants stay one.
inline Term select(const at::Tensor& condition, const Term& a, const Term& b, const at::Tensor& like) {
  if (!a.tensor.defined() && b.is(a.constant)) return a;
  const auto full = [&](const Term& t) { return t.tensor.defined() ? t.tensor : at::full_like(like, t.constant); };
  return {at::where(condition, full(a), full(b))};
}
inline TensorLane select(const at::Tensor& condition, const TensorLane& a, const TensorLane& b) {
  const at::Tensor* like = nullptr;
  for (const Term* t : {&a.value, &b.value, &a.tangent, &b.tangent})
    if (t->tensor.defined()) like = &t->tensor;
  const at::Tensor any = like ? *like : condition.to(at::kDouble);
  return {select(condition, a.value, b.value, any), select(condition, a.tangent, b.tangent, any)};
}

inline TensorLane max(const TensorLane& a, const TensorLane& b) { return select(a > b, a, b); }
inline TensorLane min(const TensorLane& a, const TensorLane& b) { return select(a < b, a, b); }
inline TensorLane fma(const TensorLane& a, const TensorLane& b, const TensorLane& c) { return a * b + c; }
inline TensorLane abs(const TensorLane& x) { return {{x.value.tensor.abs()}, x.tangent * Term{x.value.tensor.sign()}}; }
inline TensorLane copysign(const TensorLane& x, const TensorLane& s) {
  return {{at::copysign(x.value.tensor, s.value.tensor)},
          x.tangent * Term{at::sign(x.value.tensor) * at::sign(s.value.tensor)}};
}
inline TensorLane exp_nonpositive(const TensorLane& x) {
  const Term e{x.value.tensor.exp()};
  return {e, x.tangent * e};
}
inline TensorLane logistic(const TensorLane& x) {
  const Term s{x.value.tensor.sigmoid()}, rest{(-x.value.tensor).sigmoid()};
  return {s, x.tangent * (s * rest)};
}
inline TensorLane logistic_gradual(const TensorLane& x) { return logistic(x); }
inline auto both_logistics(const TensorLane& x) {
  struct {
    TensorLane of_x, of_minus_x;
  } both{logistic(x), logistic(-x)};
  return both;
}
inline TensorLane logistic_derivative(const TensorLane& x, int factor = 1) {
  const Term s{x.value.tensor.sigmoid()}, rest{(-x.value.tensor).sigmoid()}, d = Term{{}, double(factor)} * s * rest;
  return {d, x.tangent * (d * (rest - s))};
}
// torch's functions need no other way where results are subnormal.
inline bool any_less(const TensorLane&, const TensorLane&) { return false; }
inline TensorLane times_exp_subnormal(const TensorLane& factor, const TensorLane& x) { return factor * exp_nonpositive(x); }
inline TensorLane exp_gradual(const TensorLane& x) { return exp_nonpositive(x); }
inline TensorLane expm1_nonpositive(const TensorLane& x) {
  return {{x.value.tensor.expm1()}, x.tangent * Term{x.value.tensor.exp()}};
}

}  // namespace fastact
