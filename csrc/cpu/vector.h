// The SIMD lane type: N numbers of type T in one register, with the words of lane.h. Written over the compilers' vector
// extension; intrinsics stand only where that has no word for an instruction (fused multiply-add, min, max, scalef).
#pragma once

#include <stdint.h>

#include "../lane.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using Signed = int32_t;
  using Unsigned = uint32_t;
  static constexpr int fraction = 23;
};
template <>
struct BitsOf<double> {
  using Signed = int64_t;
  using Unsigned = uint64_t;
  static constexpr int fraction = 52;
};

template <class T, int N>
struct Lanes {
  using Element = T;
  using Signed = typename BitsOf<T>::Signed;
  static constexpr int lanes = N;
  typedef T Raw __attribute__((vector_size(N * sizeof(T))));
  typedef Signed Bits __attribute__((vector_size(N * sizeof(T))));
  struct Mask {
    Bits bits;  // all ones or all zeros per lane
  };

  Raw raw;

  Lanes() = default;
  FASTACT_FN explicit Lanes(Raw r) : raw(r) {}
  // c - 0 is c for every c, -0.0 and NaN included.
  FASTACT_FN Lanes(double c) : raw(T(c) - Raw{}) {}

  FASTACT_FN friend Lanes operator+(Lanes a, Lanes b) { return Lanes(a.raw + b.raw); }
  FASTACT_FN friend Lanes operator-(Lanes a, Lanes b) { return Lanes(a.raw - b.raw); }
  FASTACT_FN friend Lanes operator*(Lanes a, Lanes b) { return Lanes(a.raw * b.raw); }
  FASTACT_FN friend Lanes operator/(Lanes a, Lanes b) { return Lanes(a.raw / b.raw); }
  FASTACT_FN friend Lanes operator-(Lanes a) { return Lanes(-a.raw); }
  FASTACT_FN friend Mask operator>(Lanes a, Lanes b) { return {a.raw > b.raw}; }
  FASTACT_FN friend Mask operator<(Lanes a, Lanes b) { return {a.raw < b.raw}; }
  FASTACT_FN friend Mask operator>=(Lanes a, Lanes b) { return {a.raw >= b.raw}; }
  FASTACT_FN friend Mask operator<=(Lanes a, Lanes b) { return {a.raw <= b.raw}; }
  FASTACT_FN friend Mask operator==(Lanes a, Lanes b) { return {a.raw == b.raw}; }

  FASTACT_FN friend Lanes select(Mask m, Lanes a, Lanes b) { return Lanes(m.bits ? a.raw : b.raw); }
  FASTACT_FN friend Lanes abs(Lanes x) { return Lanes((Raw)((Bits)x.raw & ~sign())); }
  FASTACT_FN friend Lanes copysign(Lanes x, Lanes s) { return Lanes((Raw)(((Bits)x.raw & ~sign()) | ((Bits)s.raw & sign()))); }
  FASTACT_FN friend Lanes exponent(Lanes s) {
    // Put into the low bits of a number whose last bit stands for 1: no instruction set has all the conversions.
    typedef typename BitsOf<T>::Unsigned Unsigned __attribute__((vector_size(N * sizeof(T))));
    const Lanes bias(Constants<T>::round_bias);
    return Lanes((Raw)((Unsigned)bias.raw + (((Unsigned)s.raw - HalfRoot<T>::bits) >> BitsOf<T>::fraction))) - bias;
  }
  FASTACT_FN friend Lanes bits_difference(Lanes a, Lanes b) { return Lanes((Raw)((Bits)a.raw - (Bits)b.raw)); }

  /// Cut off after half of the digits.
  FASTACT_FN Lanes half() const { return Lanes((Raw)((Bits)raw & ~(((Bits{} + 1) << (BitsOf<T>::fraction + 2) / 2) - 1))); }

 private:
  FASTACT_FN static Bits sign() { return Bits{} + Signed(uint64_t(1) << (8 * sizeof(T) - 1)); }
};

#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64

using Float = Lanes<float, 16>;
using Double = Lanes<double, 8>;
FASTACT_FN Float fma(Float a, Float b, Float c) { return Float(_mm512_fmadd_ps(a.raw, b.raw, c.raw)); }
FASTACT_FN Double fma(Double a, Double b, Double c) { return Double(_mm512_fmadd_pd(a.raw, b.raw, c.raw)); }
FASTACT_FN Float max(Float a, Float b) { return Float(_mm512_max_ps(a.raw, b.raw)); }
FASTACT_FN Double max(Double a, Double b) { return Double(_mm512_max_pd(a.raw, b.raw)); }
FASTACT_FN Float min(Float a, Float b) { return Float(_mm512_min_ps(a.raw, b.raw)); }
FASTACT_FN Double min(Double a, Double b) { return Double(_mm512_min_pd(a.raw, b.raw)); }
FASTACT_FN Float product_rest(Float a, Float b, Float p) { return fma(a, b, -p); }
FASTACT_FN Double product_rest(Double a, Double b, Double p) { return fma(a, b, -p); }
FASTACT_FN Float scale2(Float x, Float n, Float) { return Float(_mm512_scalef_ps(x.raw, n.raw)); }
FASTACT_FN Double scale2(Double x, Double n, Double) { return Double(_mm512_scalef_pd(x.raw, n.raw)); }
FASTACT_FN bool any_less(Float a, Float b) { return _mm512_cmp_ps_mask(a.raw, b.raw, _CMP_LT_OQ); }
FASTACT_FN bool any_less(Double a, Double b) { return _mm512_cmp_pd_mask(a.raw, b.raw, _CMP_LT_OQ); }
FASTACT_FN bool any_nan(Float a, Float b) { return _mm512_cmp_ps_mask(a.raw, b.raw, _CMP_UNORD_Q); }
FASTACT_FN uint32_t which_less(Float a, Float b) { return _mm512_cmp_ps_mask(a.raw, b.raw, _CMP_LT_OQ); }
FASTACT_FN uint32_t which_less(Double a, Double b) { return _mm512_cmp_pd_mask(a.raw, b.raw, _CMP_LT_OQ); }
FASTACT_FN uint32_t which_differ(Float a, Float b) { return _mm512_cmp_ps_mask(a.raw, b.raw, _CMP_NEQ_UQ); }
FASTACT_FN uint32_t which_differ(Double a, Double b) { return _mm512_cmp_pd_mask(a.raw, b.raw, _CMP_NEQ_UQ); }

#else

#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 32

using Float = Lanes<float, 8>;
using Double = Lanes<double, 4>;
FASTACT_FN Float fma(Float a, Float b, Float c) { return Float(_mm256_fmadd_ps(a.raw, b.raw, c.raw)); }
FASTACT_FN Double fma(Double a, Double b, Double c) { return Double(_mm256_fmadd_pd(a.raw, b.raw, c.raw)); }
FASTACT_FN Float product_rest(Float a, Float b, Float p) { return fma(a, b, -p); }
FASTACT_FN Double product_rest(Double a, Double b, Double p) { return fma(a, b, -p); }
FASTACT_FN Float max(Float a, Float b) { return Float(_mm256_max_ps(a.raw, b.raw)); }
FASTACT_FN Double max(Double a, Double b) { return Double(_mm256_max_pd(a.raw, b.raw)); }
FASTACT_FN Float min(Float a, Float b) { return Float(_mm256_min_ps(a.raw, b.raw)); }
FASTACT_FN Double min(Double a, Double b) { return Double(_mm256_min_pd(a.raw, b.raw)); }
FASTACT_FN bool any_less(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.raw, b.raw, _CMP_LT_OQ)); }
FASTACT_FN bool any_less(Double a, Double b) { return _mm256_movemask_pd(_mm256_cmp_pd(a.raw, b.raw, _CMP_LT_OQ)); }
FASTACT_FN bool any_nan(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.raw, b.raw, _CMP_UNORD_Q)); }
FASTACT_FN uint32_t which_less(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.raw, b.raw, _CMP_LT_OQ)); }
FASTACT_FN uint32_t which_less(Double a, Double b) { return _mm256_movemask_pd(_mm256_cmp_pd(a.raw, b.raw, _CMP_LT_OQ)); }
FASTACT_FN uint32_t which_differ(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.raw, b.raw, _CMP_NEQ_UQ)); }
FASTACT_FN uint32_t which_differ(Double a, Double b) { return _mm256_movemask_pd(_mm256_cmp_pd(a.raw, b.raw, _CMP_NEQ_UQ)); }

#else

using Float = Lanes<float, 4>;
using Double = Lanes<double, 2>;
template <class T, int N>
FASTACT_FN Lanes<T, N> fma(Lanes<T, N> a, Lanes<T, N> b, Lanes<T, N> c) {
  return a * b + c;
}
/// Dekker's: the products of half as many digits are exact.
template <class T, int N>
FASTACT_FN Lanes<T, N> product_rest(Lanes<T, N> a, Lanes<T, N> b, Lanes<T, N> p) {
  const Lanes<T, N> a_high = a.half(), a_low = a - a_high, b_high = b.half(), b_low = b - b_high;
  return ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low;
}
#if defined(__x86_64__)
FASTACT_FN Float max(Float a, Float b) { return Float(_mm_max_ps(a.raw, b.raw)); }
FASTACT_FN Double max(Double a, Double b) { return Double(_mm_max_pd(a.raw, b.raw)); }
FASTACT_FN Float min(Float a, Float b) { return Float(_mm_min_ps(a.raw, b.raw)); }
FASTACT_FN Double min(Double a, Double b) { return Double(_mm_min_pd(a.raw, b.raw)); }
FASTACT_FN bool any_less(Float a, Float b) { return _mm_movemask_ps(_mm_cmplt_ps(a.raw, b.raw)); }
FASTACT_FN bool any_less(Double a, Double b) { return _mm_movemask_pd(_mm_cmplt_pd(a.raw, b.raw)); }
FASTACT_FN bool any_nan(Float a, Float b) { return _mm_movemask_ps(_mm_cmpunord_ps(a.raw, b.raw)); }
#else
template <class T, int N>
FASTACT_FN bool any_less(Lanes<T, N> a, Lanes<T, N> b) {
  typename BitsOf<T>::Signed any = 0;
  for (int l = 0; l < N; ++l) any |= (a < b).bits[l];
  return any;
}
FASTACT_FN bool any_nan(Float a, Float b) {
  bool any = false;
  for (int l = 0; l < Float::lanes; ++l) any |= a.raw[l] != a.raw[l] || b.raw[l] != b.raw[l];
  return any;
}
template <class T, int N>
FASTACT_FN Lanes<T, N> max(Lanes<T, N> a, Lanes<T, N> b) {
  return select(a > b, a, b);
}
template <class T, int N>
FASTACT_FN Lanes<T, N> min(Lanes<T, N> a, Lanes<T, N> b) {
  return select(a < b, a, b);
}
#endif
/// A bit for each lane, and for each that is not equal to the other's, NaN included.
template <class T, int N>
FASTACT_FN uint32_t which_less(Lanes<T, N> a, Lanes<T, N> b) {
  uint32_t which = 0;
  for (int l = 0; l < N; ++l) which |= uint32_t(a.raw[l] < b.raw[l]) << l;
  return which;
}
template <class T, int N>
FASTACT_FN uint32_t which_differ(Lanes<T, N> a, Lanes<T, N> b) {
  uint32_t which = 0;
  for (int l = 0; l < N; ++l) which |= uint32_t(a.raw[l] != b.raw[l]) << l;
  return which;
}

#endif

template <class T, int N>
FASTACT_FN Lanes<T, N> scale2(Lanes<T, N> x, Lanes<T, N>, Lanes<T, N> biased) {
  using L = Lanes<T, N>;
  return x * L((typename L::Raw)((typename L::Bits)biased.raw << BitsOf<T>::fraction));
}

#endif

static_assert(sizeof(Float) == FASTACT_VECTOR_BYTES && sizeof(Double) == FASTACT_VECTOR_BYTES, "one register each");

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
