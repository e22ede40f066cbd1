// The words that formulas are made of. A formula is a template over its lane type: a float or double, a SIMD vector of them
// (cpu/vector.h), a CUDA thread's scalar, or a tensor (torch/tensor_lane.h), and it may use only what stands here:
// + - * / on lanes and integers, V(constant), comparisons, and the functions of this file.
#pragma once

#if defined(__CUDACC__)
#define FASTACT_FN __host__ __device__ __forceinline__
#else
// Always inlined, so that code compiled for one instruction set can never be the copy that another one links to.
#define FASTACT_FN inline __attribute__((always_inline))
#endif

// Each translation unit that is compiled for an instruction set of its own names its own namespace.
#ifndef FASTACT_NAMESPACE
#define FASTACT_NAMESPACE generic
#endif

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// The floating-point type inside a lane type.
template <class V>
struct ElementOf {
  using type = typename V::Element;
};
template <>
struct ElementOf<float> {
  using type = float;
};
template <>
struct ElementOf<double> {
  using type = double;
};

/// The bit pattern of sqrt(1/2).
template <class T>
struct HalfRoot;
template <>
struct HalfRoot<float> {
  static constexpr unsigned bits = 0x3f3504f3;
};
template <>
struct HalfRoot<double> {
  static constexpr unsigned long long bits = 0x3fe6a09e667f3bcd;
};

// ---- Words every lane type defines for itself; here for the scalars. -----------------------------------------------

/// a where the condition holds, else b.
FASTACT_FN float select(bool condition, float a, float b) { return condition ? a : b; }
FASTACT_FN double select(bool condition, double a, double b) { return condition ? a : b; }

/// a where a > b, else b: so b where either is NaN, and where both are zero.
FASTACT_FN float max(float a, float b) { return a > b ? a : b; }
FASTACT_FN double max(double a, double b) { return a > b ? a : b; }

/// a where a < b, else b: so b where either is NaN, and where both are zero.
FASTACT_FN float min(float a, float b) { return a < b ? a : b; }
FASTACT_FN double min(double a, double b) { return a < b ? a : b; }

FASTACT_FN float abs(float x) { return __builtin_fabsf(x); }
FASTACT_FN double abs(double x) { return __builtin_fabs(x); }

/// The magnitude of x with the sign of s.
FASTACT_FN float copysign(float x, float s) { return __builtin_copysignf(x, s); }
FASTACT_FN double copysign(double x, double s) { return __builtin_copysign(x, s); }

/// a * b + c. Rounded once where the hardware can, else twice.
FASTACT_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTACT_FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

/// a * b - p, where p is a * b rounded: exact.
FASTACT_FN float product_rest(float a, float b, float p) { return __builtin_fmaf(a, b, -p); }
FASTACT_FN double product_rest(double a, double b, double p) { return __builtin_fma(a, b, -p); }

/// x * 2^n for an integral n, where 2^n and the result are normal numbers; 0 for the n below. `biased`, which is n +
/// Constants::round_bias, has in its low bits the exponent of 2^n, ready to go to its place.
FASTACT_FN float scale2(float x, float, float biased) {
  unsigned bits;
  __builtin_memcpy(&bits, &biased, sizeof bits);
  bits <<= 23;
  __builtin_memcpy(&biased, &bits, sizeof bits);
  return x * biased;
}
FASTACT_FN double scale2(double x, double, double biased) {
  unsigned long long bits;
  __builtin_memcpy(&bits, &biased, sizeof bits);
  bits <<= 52;
  __builtin_memcpy(&biased, &bits, sizeof bits);
  return x * biased;
}

/// The number whose bit pattern is the difference of those of a and b, taken as integers.
FASTACT_FN float bits_difference(float a, float b) {
  int i, j;
  __builtin_memcpy(&i, &a, sizeof i);
  __builtin_memcpy(&j, &b, sizeof j);
  i -= j;
  __builtin_memcpy(&a, &i, sizeof i);
  return a;
}
FASTACT_FN double bits_difference(double a, double b) {
  long long i, j;
  __builtin_memcpy(&i, &a, sizeof i);
  __builtin_memcpy(&j, &b, sizeof j);
  i -= j;
  __builtin_memcpy(&a, &i, sizeof i);
  return a;
}

/// The integral n for which s 2^-n lies from sqrt(1/2) to sqrt(2), for s of 1 or more.
FASTACT_FN float exponent(float s) {
  unsigned bits;
  __builtin_memcpy(&bits, &s, sizeof bits);
  return float(int((bits - HalfRoot<float>::bits) >> 23));
}
FASTACT_FN double exponent(double s) {
  unsigned long long bits;
  __builtin_memcpy(&bits, &s, sizeof bits);
  return double(int((bits - HalfRoot<double>::bits) >> 52));
}

/// Whether a < b in any lane: for a rare case that would slow down the common one.
FASTACT_FN bool any_less(float a, float b) { return a < b; }
FASTACT_FN bool any_less(double a, double b) { return a < b; }

/// The quotient of indices, in 32 bits where that will do: most of a division of 64 bits would be spent on zeros.
FASTACT_FN long long divided(long long a, long long b) {
  return (a | b) >> 32 == 0 ? (long long)(unsigned(a) / unsigned(b)) : a / b;
}
FASTACT_FN long long remainder_of(long long a, long long b) { return a - divided(a, b) * b; }

// ---- Approximations. Coefficients: tools/coefficients.py. -----------------------------------------------------------

/// c + c1 u + c2 u^2 + ..., by Horner's rule.
template <class V, class T>
FASTACT_FN V polynomial(V, T c) {
  return V(c);
}
template <class V, class T, class... Rest>
FASTACT_FN V polynomial(V u, T c, Rest... rest) {
  return fma(polynomial(u, rest...), u, V(c));
}

constexpr double kInfinity = __builtin_inf();

template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float largest = 0x1.fffffep+127f;
  static constexpr float log2_e = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  // Adding it rounds to the nearest integer, and leaves that, with the bias of an exponent, in the low bits of the sum.
  static constexpr float round_bias = 0x1.8p23f + 127;
  // The first number whose e^x is normal, -87.33654; e^exp_zero rounds to 0, x e^x below times_exp_zero, tanh tanh_one to 1.
  static constexpr float exp_normal = -0x1.5d589ep+6f, exp_zero = -104.5f, times_exp_zero = -109, tanh_one = 10;
  // Brings results from e^exp_zero to 2^-126 into the normal range; and what has 2^-149 as its last bit after that.
  static constexpr float subnormal_shift = 100, subnormal_unshift = 0x1p-100f, subnormal_bias = 0x1p-26f;

  /// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2: degree 4, 2^-28.0 of e^r.
  template <class V>
  FASTACT_FN static V exp_tail(V r) {
    return polynomial(r, 0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f4p-5f, 0x1.123a2p-7f, 0x1.6a23c8p-10f);
  }
  /// The same, degree 5, 2^-28.4 of e^r - 1.
  template <class V>
  FASTACT_FN static V expm1_tail(V r) {
    return polynomial(r, 0x1p-1f, 0x1.555556p-3f, 0x1.55549ep-5f, 0x1.11101ep-7f, 0x1.6d8398p-10f, 0x1.a2a3a4p-13f);
  }
  /// (tanh x - x) / x^3 of z = x^2 for |x| <= 0.625: degree 5, 2^-26.6 of tanh x.
  template <class V>
  FASTACT_FN static V tanh_tail(V z) {
    return polynomial(z, -0x1.555556p-2f, 0x1.1110ccp-3f, -0x1.b9fef6p-5f, 0x1.64259p-6f, -0x1.0e95e2p-7f, 0x1.218a7p-9f);
  }
  /// 2 (atanh s - s) / s^3 of z = s^2 for |s| <= 0.2: degree 2, 2^-28.2 of atanh s.
  template <class V>
  FASTACT_FN static V atanh_tail(V z) {
    return polynomial(z, 0x1.5555b4p-1f, 0x1.992b44p-2f, 0x1.36e076p-2f);
  }
};

template <>
struct Constants<double> {
  static constexpr double largest = 0x1.fffffffffffffp+1023;
  static constexpr double log2_e = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double round_bias = 0x1.8p52 + 1023;
  static constexpr double exp_normal = -0x1.6232bdd7abcd2p+9, exp_zero = -746.0, times_exp_zero = -753, tanh_one = 20;
  static constexpr double subnormal_shift = 600, subnormal_unshift = 0x1p-600, subnormal_bias = 0x1p-422;

  /// Degree 11, 2^-59.6 of e^r - 1.
  template <class V>
  FASTACT_FN static V expm1_tail(V r) {
    return polynomial(r, 0x1p-1, 0x1.5555555555555p-3, 0x1.5555555555559p-5, 0x1.1111111111118p-7, 0x1.6c16c16c14a5ap-10,
                      0x1.a01a01a01461ep-13, 0x1.a01a01aec8ca6p-16, 0x1.71de3a74c5bp-19, 0x1.27e4c9c42bfp-22,
                      0x1.ae63b7439a389p-26, 0x1.1f8f1262b0355p-29, 0x1.627d5d1168c3bp-33);
  }
  template <class V>
  FASTACT_FN static V exp_tail(V r) {
    return expm1_tail(r);
  }
  /// Degree 11, 2^-55.6 of tanh x.
  template <class V>
  FASTACT_FN static V tanh_tail(V z) {
    return polynomial(z, -0x1.5555555555555p-2, 0x1.1111111110f5cp-3, -0x1.ba1ba1b9f2c2fp-5, 0x1.664f4876a3f33p-6,
                      -0x1.226e336eb214ap-7, 0x1.d6d36fc4ebc73p-9, -0x1.7d9d2b2445a88p-10, 0x1.35130648b449ep-11,
                      -0x1.f16054e5be311p-13, 0x1.8117c551bcba4p-14, -0x1.fe7e6387a9dd5p-16, 0x1.9c3187dedd74cp-18);
  }
  /// Degree 8, 2^-60.0 of atanh s.
  template <class V>
  FASTACT_FN static V atanh_tail(V z) {
    return polynomial(z, 0x1.5555555555555p-1, 0x1.999999999990dp-2, 0x1.249249249e1c9p-2, 0x1.c71c71b788a45p-3,
                      0x1.745d1d11a45cdp-3, 0x1.3b126476ed9acp-3, 0x1.113ee03ee5bf2p-3, 0x1.da561bed7a673p-4,
                      0x1.02c5246a45c34p-3);
  }
};

/// sign x = n ln 2 + r with n integral and |r| <= ln(2) / 2. Exact to one rounding of r, for |x| below about 1000.
template <class V, int sign = 1>
struct Reduced {
  using C = Constants<typename ElementOf<V>::type>;
  V biased, n, r;
  FASTACT_FN explicit Reduced(V x) {
    biased = fma(x, V(sign * C::log2_e), V(C::round_bias));
    n = biased - V(C::round_bias);
    r = fma(n, V(-C::ln2_low), fma(n, V(-C::ln2_high), sign < 0 ? -x : x));
  }
  /// c 2^n
  FASTACT_FN V scaled(V c) const { return scale2(c, n, biased); }
  /// e^r - 1, and e^r
  FASTACT_FN V expm1() const { return fma(C::exp_tail(r) * r, r, r); }
  FASTACT_FN V exp() const { return fma(fma(C::exp_tail(r), r, V(1)), r, V(1)); }
};

/// 1 / (1 + e^-x), for x >= exp_normal; NaN for NaN. Max error 1.92 ULP, 1.96 without a fused multiply-add.
template <class V>
FASTACT_FN V logistic(V x) {
  // The bound comes first, so that NaN passes.
  const Reduced<V, -1> a(min(V(-Constants<typename ElementOf<V>::type>::exp_normal), x));
  // c / (c + c e^-x) with c = 1.875: with c = 1 the roundings of the sum and of the quotient would be largest together.
  const V c(1.875), power = a.scaled(c);
  return c / fma(power, a.expm1(), power + c);
}

/// e^x for x <= 0. Max error 1.1 ULP; 0 where e^x is subnormal (x < -87.33654 in float, -708.3964 in double); NaN for NaN.
/// Subnormal numbers are left out because an operation that makes or takes one is many times slower on x86.
template <class V>
FASTACT_FN V exp_nonpositive(V x) {
  const Reduced<V> a(x);
  return select(x < V(Constants<typename ElementOf<V>::type>::exp_normal), V(0), a.scaled(a.exp()));
}

/// e^x 2^subnormal_shift for x between exp_zero and exp_normal: a normal number.
template <class V>
FASTACT_FN V exp_shifted(V x) {
  using C = Constants<typename ElementOf<V>::type>;
  const Reduced<V> a(x);
  return scale2(a.exp(), a.n + V(C::subnormal_shift), a.biased + V(C::subnormal_shift));
}

/// e^x for x < exp_normal, where it is subnormal or 0: rounded correctly but for the error of e^r, and without an operation on
/// a subnormal number. Adding subnormal_bias, whose last bit stands for the smallest subnormal, rounds to the right grid, and
/// leaves in the low bits just the pattern of the result.
template <class V>
FASTACT_FN V exp_subnormal(V x) {
  using C = Constants<typename ElementOf<V>::type>;
  const V shifted = exp_shifted(max(V(C::exp_zero), x));
  return bits_difference(shifted + V(C::subnormal_bias), V(C::subnormal_bias));
}

/// 1 / (1 + e^-x) with gradual underflow: far below zero it is e^x, down to the last subnormal number.
template <class V>
FASTACT_FN V logistic_gradual(V x) {
  const V normal(Constants<typename ElementOf<V>::type>::exp_normal);
  const V y = logistic(x);
  return any_less(x, normal) ? V(select(x < normal, exp_subnormal(x), y)) : y;
}

/// 1 / x for x from 1 on. A lane type whose results are rounded to 16 bits may have a quicker way.
template <class V>
FASTACT_FN V reciprocal(V x) {
  return 1 / x;
}

/// The logistic function on both sides of zero.
template <class V>
struct Logistics {
  V of_x, of_minus_x;
};

/// 1 / (1 + e^-x) and 1 / (1 + e^x), of one exponential and one division; 0 where one is subnormal. Max error 2.9 ULP.
template <class V>
FASTACT_FN Logistics<V> both_logistics(V x) {
  const V e = exp_nonpositive(-abs(x)), large = reciprocal(V(1 + e)), small = e * large;
  const auto negative = x < V(0);
  return {select(negative, small, large), select(negative, large, small)};
}

/// factor e^x for x < exp_normal, where |factor| < 2^23 or infinite; rounded once where it is subnormal.
template <class V>
FASTACT_FN V times_exp_subnormal(V factor, V x) {
  using C = Constants<typename ElementOf<V>::type>;
  const V lowest(C::times_exp_zero);
  return factor * select(x < lowest, V(0), exp_shifted(max(lowest, x))) * V(C::subnormal_unshift);
}

/// e^x for x <= 0 with gradual underflow: what is subnormal costs a branch that is seldom taken.
template <class V>
FASTACT_FN V exp_gradual(V x) {
  const V normal(Constants<typename ElementOf<V>::type>::exp_normal);
  const V e = exp_nonpositive(x);
  return any_less(x, normal) ? select(x < normal, exp_subnormal(x), e) : e;
}

/// e^x - 1 for x <= 0. Max error 1.5 ULP; -1 far below zero, x near zero, NaN for NaN.
template <class V>
FASTACT_FN V expm1_nonpositive(V x) {
  using C = Constants<typename ElementOf<V>::type>;
  const Reduced<V> a(max(V(C::exp_normal), x));
  const V tail = fma(a.r * C::expm1_tail(a.r), a.r, a.r);
  const V power = a.scaled(V(1));
  return select(a.n == V(0), tail, fma(power, tail, power - 1));
}

/// log(1 + u) for 0 <= u <= 1: with 1 + u = 2^k (1 + r), |r| <= 1/2, and s = r / (2 + r), k log 2 + 2 atanh s. Max error 1 ULP;
/// NaN for NaN.
template <class V>
FASTACT_FN V log1p_unit(V u) {
  using C = Constants<typename ElementOf<V>::type>;
  const auto halved = u > V(0.5);
  const V r = select(halved, fma(u, V(0.5), V(-0.5)), u);
  const V s = r / (2 + r), z = s * s, h = V(0.5) * r * r;
  const V tail = fma(s, fma(z, C::atanh_tail(z), h), -h);
  return select(halved, (r + (tail + V(C::ln2_low))) + V(C::ln2_high), r + tail);
}

/// log s for s from 1 to 2^40, such as the sum of the terms of a row. Max error 2.0 ULP, also near 1; NaN for NaN.
template <class V>
FASTACT_FN V log_of_sum(V s) {
  using C = Constants<typename ElementOf<V>::type>;
  const V n = exponent(s);
  const V m = scale2(s, -n, C::round_bias - n);
  const V z = (m - 1) / (m + 1), w = z * z;
  return fma(n, V(C::ln2_high), fma(n, V(C::ln2_low), fma(z * w, C::atanh_tail(w), 2 * z)));
}

/// `factor` times the derivative of the logistic function, e^-|x| / (1 + e^-|x|)^2, for a power of two. Max error 1.1 ULP, with
/// gradual underflow; NaN for NaN. A plain quotient would lose more than 2 ULP: here e^-|x| is 2^n (high + low), the square of
/// the sum is kept in two parts, and what is left of the division is divided again.
template <class V>
FASTACT_FN V logistic_derivative(V x, int factor = 1) {
  const V normal(Constants<typename ElementOf<V>::type>::exp_normal), a = -abs(x);
  const Reduced<V, -1> e(min(-normal, abs(x)));
  const V tail = e.expm1(), high = tail + 1, low = tail - (high - 1);
  const V scaled = e.scaled(high), sum = scaled + 1, sum_rest = (scaled - (sum - 1)) + e.scaled(low);
  const V square = sum * sum, square_rest = product_rest(sum, sum, square) + 2 * sum * sum_rest;
  const V inverse = 1 / square, quotient = high * inverse, product = quotient * square;
  const V left = ((high - product) - product_rest(quotient, square, product)) + (low - quotient * square_rest);
  const V d = factor * e.scaled(fma(left, inverse, quotient));
  return any_less(a, normal) ? V(select(a < normal, times_exp_subnormal(V(factor), a), d)) : d;
}

/// tanh a for a >= 0: 1 - 2 / (1 + e^(2a)) above 0.625, a + a^3 P(a^2) below.
template <class V>
FASTACT_FN V tanh_nonnegative(V a) {
  using C = Constants<typename ElementOf<V>::type>;
  const V large = 1 - 2 * logistic(-2 * min(V(C::tanh_one), a));
  const V small = fma(a, (a * a) * C::tanh_tail(a * a), a);
  return select(a > V(0.625), large, small);
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
