// Lanes for results that are rounded to 16 bits: the logistic function without its division, which takes as long as all the
// rest of the exact one. Coefficients: tools/coefficients.py.
#pragma once

#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// The lane type that elementwise formulas are evaluated in.
template <class S>
struct Computed {
  using Lane = LaneOf<S>;
};

#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64

/// A Float whose logistic function and reciprocal are good to 21 bits.
struct Brief : Float {
  Brief() = default;
  FASTACT_FN Brief(Float v) : Float(v) {}
  FASTACT_FN Brief(double c) : Float(c) {}
};

template <>
struct Computed<BFloat16> {
  using Lane = Brief;
};
template <>
struct Computed<Float16> {
  using Lane = Brief;
};

/// A reciprocal of 14 bits, and one step of Newton's method.
FASTACT_FN Brief reciprocal(Brief x) {
  const Float r(_mm512_rcp14_ps(x.raw));
  return fma(fma(-x, r, Float(1)), r, r);
}

/// e^-x as 2^n 2^f with |f| <= 1/2. The 1 of 2^f is exact: near 0 a sigmoid comes close to the middle between two numbers of 16
/// bits.
FASTACT_FN Brief logistic(Brief x) {
  using C = Constants<float>;
  const Float bounded = min(Float(-C::exp_normal), x);
  const Float n = fma(bounded, Float(-C::log2_e), Float(C::round_bias)) - C::round_bias;
  const Float f = fma(bounded, Float(-C::log2_e), -n);
  const Float power = polynomial(f, 0x1p+0f, 0x1.62e39ep-1f, 0x1.ebfa4cp-3f, 0x1.c74348p-5f, 0x1.3cbf1p-7f, 0x1.23a60ap-10f);
  return reciprocal(Brief(scale2(power, n, n) + 1));
}

#endif

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
