// The SIMD lane type: N numbers of type T in one register, with the words of lane.h. Written over the compilers' vector extension;
// intrinsics stand only where that has no word for an instruction (fused multiply-add, min, max, scalef).
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
  static constexpr int fraction = 23, bias = 127;
};
template <>
struct BitsOf<double> {
  using Signed = int64_t;
  using Unsigned = uint64_t;
  static constexpr int fraction = 52, bias = 1023;
};

template <class T, int N>
struct Lanes {
  using Element = T;
  using Signed = typename BitsOf<T>::Signed;
  static constexpr int lanes = N;
  typedef T Raw __attribute__((vector_size(N * sizeof(T))));
  typedef Signed Bits __attribute__((vector_size(N * sizeof(T))));
  typedef typename BitsOf<T>::Unsigned Unsigned __attribute__((vector_size(N * sizeof(T))));
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
  FASTACT_FN friend Lanes copysign(Lanes x, Lanes s) {
    return Lanes((Raw)(((Bits)x.raw & ~sign()) | ((Bits)s.raw & sign())));
  }

 private:
  FASTACT_FN static Bits sign() { return Bits{} + Signed(uint64_t(1) << (8 * sizeof(T) - 1)); }
};

/// 2^k for an integral k within the range of normal exponents.
template <class T, int N>
FASTACT_FN Lanes<T, N> power_of_two(typename Lanes<T, N>::Bits k) {
  using L = Lanes<T, N>;
  return L((typename L::Raw)((k + BitsOf<T>::bias) << BitsOf<T>::fraction));
}

#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64

using Float = Lanes<float, 16>;
using Double = Lanes<double, 8>;
FASTACT_FN Float fma(Float a, Float b, Float c) { return Float(_mm512_fmadd_ps(a.raw, b.raw, c.raw)); }
FASTACT_FN Double fma(Double a, Double b, Double c) { return Double(_mm512_fmadd_pd(a.raw, b.raw, c.raw)); }
FASTACT_FN Float max(Float a, Float b) { return Float(_mm512_max_ps(a.raw, b.raw)); }
FASTACT_FN Double max(Double a, Double b) { return Double(_mm512_max_pd(a.raw, b.raw)); }
FASTACT_FN Float min(Float a, Float b) { return Float(_mm512_min_ps(a.raw, b.raw)); }
FASTACT_FN Double min(Double a, Double b) { return Double(_mm512_min_pd(a.raw, b.raw)); }
FASTACT_FN Float scale2(Float x, Float n) { return Float(_mm512_scalef_ps(x.raw, n.raw)); }
FASTACT_FN Double scale2(Double x, Double n) { return Double(_mm512_scalef_pd(x.raw, n.raw)); }

#else

#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 32

using Float = Lanes<float, 8>;
using Double = Lanes<double, 4>;
FASTACT_FN Float fma(Float a, Float b, Float c) { return Float(_mm256_fmadd_ps(a.raw, b.raw, c.raw)); }
FASTACT_FN Double fma(Double a, Double b, Double c) { return Double(_mm256_fmadd_pd(a.raw, b.raw, c.raw)); }
FASTACT_FN Float max(Float a, Float b) { return Float(_mm256_max_ps(a.raw, b.raw)); }
FASTACT_FN Double max(Double a, Double b) { return Double(_mm256_max_pd(a.raw, b.raw)); }
FASTACT_FN Float min(Float a, Float b) { return Float(_mm256_min_ps(a.raw, b.raw)); }
FASTACT_FN Double min(Double a, Double b) { return Double(_mm256_min_pd(a.raw, b.raw)); }

#else

using Float = Lanes<float, 4>;
using Double = Lanes<double, 2>;
template <class T, int N>
FASTACT_FN Lanes<T, N> fma(Lanes<T, N> a, Lanes<T, N> b, Lanes<T, N> c) {
  return a * b + c;
}
#if defined(__x86_64__)
FASTACT_FN Float max(Float a, Float b) { return Float(_mm_max_ps(a.raw, b.raw)); }
FASTACT_FN Double max(Double a, Double b) { return Double(_mm_max_pd(a.raw, b.raw)); }
FASTACT_FN Float min(Float a, Float b) { return Float(_mm_min_ps(a.raw, b.raw)); }
FASTACT_FN Double min(Double a, Double b) { return Double(_mm_min_pd(a.raw, b.raw)); }
#else
template <class T, int N>
FASTACT_FN Lanes<T, N> max(Lanes<T, N> a, Lanes<T, N> b) {
  return select(a > b, a, b);
}
template <class T, int N>
FASTACT_FN Lanes<T, N> min(Lanes<T, N> a, Lanes<T, N> b) {
  return select(a < b, a, b);
}
#endif

#endif

/// x 2^n in two steps, because 2^n alone may be out of range: the second step rounds, and it alone.
template <class T, int N>
FASTACT_FN Lanes<T, N> scale2(Lanes<T, N> x, Lanes<T, N> n) {
  using L = Lanes<T, N>;
  typedef typename L::Bits Bits;
  const L bias(Constants<T>::round_bias);
  const Bits k = (Bits)(n + bias).raw - (Bits)bias.raw;
  // (k + 2048) / 2 - 1024 is floor(k / 2) by a logical shift; there is no arithmetic one for 64 bits below AVX-512.
  const Bits half = (Bits)((typename L::Unsigned)(k + 2048) >> 1) - 1024;
  return x * power_of_two<T, N>(half) * power_of_two<T, N>(k - half);
}

#endif

static_assert(sizeof(Float) == FASTACT_VECTOR_BYTES && sizeof(Double) == FASTACT_VECTOR_BYTES, "one register each");

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
