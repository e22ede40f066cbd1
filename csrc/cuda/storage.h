// Numbers as they lie in the GPU's memory, and the lanes a thread computes with.
#pragma once

#include "device.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// ---- Lanes ---------------------------------------------------------------------------------------------------------------

/// A float whose exponential and quotient are the hardware's approximate ones, good to about 22 bits.
struct Quick {
  using Element = float;
  float v;

  Quick() = default;
  FASTACT_FN Quick(float x) : v(x) {}
  FASTACT_FN Quick(double x) : v(float(x)) {}
  FASTACT_FN Quick(int x) : v(float(x)) {}
};

FASTACT_FN Quick operator+(Quick a, Quick b) { return a.v + b.v; }
FASTACT_FN Quick operator-(Quick a, Quick b) { return a.v - b.v; }
FASTACT_FN Quick operator*(Quick a, Quick b) { return a.v * b.v; }
FASTACT_FN Quick operator-(Quick a) { return -a.v; }
FASTACT_FN bool operator<(Quick a, Quick b) { return a.v < b.v; }
FASTACT_FN bool operator<=(Quick a, Quick b) { return a.v <= b.v; }
FASTACT_FN bool operator>(Quick a, Quick b) { return a.v > b.v; }
FASTACT_FN bool operator==(Quick a, Quick b) { return a.v == b.v; }

FASTACT_FN Quick select(bool condition, Quick a, Quick b) { return condition ? a : b; }
FASTACT_FN Quick max(Quick a, Quick b) { return max(a.v, b.v); }
FASTACT_FN Quick min(Quick a, Quick b) { return min(a.v, b.v); }
FASTACT_FN Quick abs(Quick x) { return abs(x.v); }
FASTACT_FN Quick copysign(Quick x, Quick s) { return copysign(x.v, s.v); }
FASTACT_FN Quick fma(Quick a, Quick b, Quick c) { return fma(a.v, b.v, c.v); }
FASTACT_FN Quick product_rest(Quick a, Quick b, Quick p) { return product_rest(a.v, b.v, p.v); }
FASTACT_FN Quick scale2(Quick x, Quick n, Quick biased) { return scale2(x.v, n.v, biased.v); }
FASTACT_FN Quick exponent(Quick s) { return exponent(s.v); }
FASTACT_FN Quick bits_difference(Quick a, Quick b) { return bits_difference(a.v, b.v); }
FASTACT_FN bool any_less(Quick a, Quick b) { return a.v < b.v; }

/// Divisors of formulas lie between 1 and 2^126, sums of softmax between 1 and the length of a row.
__device__ __forceinline__ Quick operator/(Quick a, Quick b) { return a.v * reciprocal_approx(b.v); }

/// The rounding error of x log2(e), which counts where x is large, is put back.
__device__ __forceinline__ Quick logistic(Quick x_) {
  using C = Constants<float>;
  const float x = min(-C::exp_normal, x_.v);
  const float t = x * -C::log2_e;
  const float rest = fma(x, -C::log2_e, -t);
  const float e = exp2_approx(t);
  return 1 / Quick(1 + fma(e, rest * (C::ln2_high + C::ln2_low), e));
}

/// The terms of a softmax. What is lost of x log2(e) for terms far below 1 does not show in 16 bits.
__device__ __forceinline__ Quick exp_nonpositive(Quick x) { return exp2_approx(x.v * Constants<float>::log2_e); }

FASTACT_FN double raw(double x) { return x; }
FASTACT_FN float raw(float x) { return x; }
FASTACT_FN float raw(Quick x) { return x.v; }

/// What elementwise formulas compute with. Rounding to bfloat16 hides what Quick lacks. Rounding to float16 does not: near 0 a
/// sigmoid comes close to the middle between two of these, and only the last bits of a float tell which is nearer.
template <class S>
struct Storage {
  using Lane = float;
};
template <>
struct Storage<double> {
  using Lane = double;
};
template <>
struct Storage<BFloat16> {
  using Lane = Quick;
};
template <class S>
using LaneOf = typename Storage<S>::Lane;

// ---- Between memory and lanes ----------------------------------------------------------------------------------------

__device__ __forceinline__ double unpack(double x) { return x; }
__device__ __forceinline__ float unpack(float x) { return x; }
__device__ __forceinline__ float unpack(BFloat16 x) { return bit_pattern<float>(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float unpack(Float16 x) { return unpack_float16(x.bits); }

/// As many neighbours as fill the widest access a thread has.
template <class S>
constexpr int kWidth = 16 / int(sizeof(S));

template <class T, int N>
struct Array {
  T v[N];
};

/// N neighbours as they lie in memory: kWidth of them, or one. Kept in whole registers until they are needed.
template <class S, int N>
struct Pack {
  static_assert(N == kWidth<S>);
  Words words;

  Pack() = default;
  __device__ __forceinline__ explicit Pack(S all) {
    Array<S, N> each;
#pragma unroll
    for (int k = 0; k < N; ++k) each.v[k] = all;
    words = bit_pattern<Words>(each);
  }
  __device__ __forceinline__ Pack(const S* p, bool aligned) {
    if (aligned) {
      words = load_words(p);
    } else {
      Array<S, N> each;
#pragma unroll
      for (int k = 0; k < N; ++k) each.v[k] = p[k];
      words = bit_pattern<Words>(each);
    }
  }
  /// To be called between two uses that lie far apart: unpacking twice is cheaper than keeping what was unpacked.
  __device__ __forceinline__ void renew() { FASTACT_NAMESPACE::renew(words); }
  __device__ __forceinline__ auto operator[](int k) const { return unpack(bit_pattern<Array<S, N>>(words).v[k]); }
};

template <class S>
struct Pack<S, 1> {
  S one;

  Pack() = default;
  __device__ __forceinline__ explicit Pack(S all) : one(all) {}
  __device__ __forceinline__ Pack(const S* p, bool) : one(*p) {}
  __device__ __forceinline__ void renew() {}
  __device__ __forceinline__ auto operator[](int) const { return unpack(one); }
};

__device__ __forceinline__ uint32_t pack_pair(BFloat16, float low, float high) { return pack_bfloat16(low, high); }
__device__ __forceinline__ uint32_t pack_pair(Float16, float low, float high) { return pack_float16(low, high); }

/// One number, rounded to S.
template <class S, class V>
__device__ __forceinline__ S rounded(V v) {
  if constexpr (sizeof(S) == 2)
    return {uint16_t(pack_pair(S{}, raw(v), raw(v)))};
  else
    return raw(v);
}

/// N lanes to memory: one, or as many as fill the access that p is aligned for.
template <int N, class S, class V>
__device__ __forceinline__ void store(S* p, const V* v) {
  if constexpr (N == 1) {
    *p = rounded<S>(*v);
  } else if constexpr (sizeof(S) == 2) {
    Array<uint32_t, 4> pairs;
#pragma unroll
    for (int k = 0; k < 4; ++k) pairs.v[k] = pack_pair(S{}, raw(v[2 * k]), raw(v[2 * k + 1]));
    store_words(p, bit_pattern<Words>(pairs));
  } else {
    Array<S, N> each;
#pragma unroll
    for (int k = 0; k < N; ++k) each.v[k] = raw(v[k]);
    store_words(p, bit_pattern<Words>(each));
  }
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
