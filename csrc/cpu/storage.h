// Numbers as they lie in memory: float64, float32, bfloat16 and float16, loaded to and stored from lanes of the compute type
// (double for float64, float for the rest). 16-bit stores round once, to nearest even.
#pragma once

#include <stdint.h>

#include "vector.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

/// For a storage type: the lane type it is computed in, and a vector of unsigned integers of its size, one per lane.
template <class S>
struct Storage {
  using Lane = Float;
  typedef uint16_t Packed __attribute__((vector_size(2 * Float::lanes)));
};
template <>
struct Storage<float> {
  using Lane = Float;
  typedef uint32_t Packed __attribute__((vector_size(sizeof(Float))));
};
template <>
struct Storage<double> {
  using Lane = Double;
  typedef uint64_t Packed __attribute__((vector_size(sizeof(Double))));
};
template <class S>
using Packed = typename Storage<S>::Packed;

using Narrow = Packed<Float16>;
using Wide = Packed<float>;

// ---- Between bit patterns and lanes ----------------------------------------------------------------------------------

/// 16-bit patterns to the low halves of 32-bit ones, and back; GCC 12 splits the wide conversion in two.
FASTACT_FN Wide widen(Narrow bits) {
#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64
  return (Wide)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__x86_64__) && FASTACT_VECTOR_BYTES == 32
  return (Wide)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Wide);
#endif
}
FASTACT_FN Narrow narrow(Wide bits) {
#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64
  return (Narrow)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, Narrow);
#endif
}

template <class S>
struct Format;

template <>
struct Format<double> {
  FASTACT_FN static Double unpack(Packed<double> bits) { return Double((Double::Raw)bits); }
  FASTACT_FN static Packed<double> pack(Double v) { return (Packed<double>)v.raw; }
};

template <>
struct Format<float> {
  FASTACT_FN static Float unpack(Wide bits) { return Float((Float::Raw)bits); }
  FASTACT_FN static Wide pack(Float v) { return (Wide)v.raw; }
};

template <>
struct Format<BFloat16> {
  FASTACT_FN static Float unpack(Narrow bits) { return Float((Float::Raw)(widen(bits) << 16)); }
  FASTACT_FN static Narrow pack(Float v) { return narrow(rounded(v, any_nan(v, v)) >> 16); }

  /// The rounded number in the high half of each lane; the low half is anything.
  FASTACT_FN static Wide rounded(Float v, bool nan) {
    const Wide u = (Wide)v.raw;
    // Adding just under half of the last kept bit, and that bit itself, rounds to nearest even; but it may carry a NaN over.
#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64
    const __mmask16 odd = _mm512_test_epi32_mask((__m512i)u, _mm512_set1_epi32(0x10000));
    const Wide half = u + 0x7fff;
    const Wide even = (Wide)_mm512_mask_add_epi32((__m512i)half, odd, (__m512i)half, _mm512_set1_epi32(1));
#else
    const Wide even = u + (((u >> 16) & 1) + 0x7fff);
#endif
    if (!nan) return even;
    return (u & 0x7fffffff) > 0x7f800000 ? u | 0x7fc00000 : even;
  }
};

template <>
struct Format<Float16> {
#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64

  FASTACT_FN static Float unpack(Narrow bits) { return Float(_mm512_cvtph_ps((__m256i)bits)); }
  FASTACT_FN static Narrow pack(Float v) { return (Narrow)_mm512_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT); }

#elif defined(__x86_64__) && FASTACT_VECTOR_BYTES == 32

  FASTACT_FN static Float unpack(Narrow bits) { return Float(_mm256_cvtph_ps((__m128i)bits)); }
  FASTACT_FN static Narrow pack(Float v) { return (Narrow)_mm256_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT); }

#else

  // Without an instruction for it. Subnormal halves are normalised by a subtraction of floats that are themselves normal, so
  // that the result does not depend on the flush-to-zero mode.
  FASTACT_FN static Float unpack(Narrow bits) {
    using Raw = Float::Raw;
    const Wide h = widen(bits), sign = (h & 0x8000) << 16, magnitude = (h & 0x7fff) << 13;
    const Wide normal = magnitude + ((127 - 15) << 23);
    const Wide special = magnitude + ((255 - 31) << 23);
    const Raw offset = (Raw)(Wide{} + ((127 - 14) << 23));
    const Wide subnormal = (Wide)((Raw)(magnitude + ((127 - 14) << 23)) - offset);
    const Wide exponent = magnitude & (0x1f << 23);
    return Float((Raw)(sign | (exponent == 0 ? subnormal : exponent == (0x1f << 23) ? special : normal)));
  }
  FASTACT_FN static Narrow pack(Float v) {
    using Raw = Float::Raw;
    const Wide u = (Wide)v.raw & 0x7fffffff, sign = ((Wide)v.raw >> 16) & 0x8000;
    // 65520 is halfway from the largest half to the next power of two: it and all above it round to infinity.
    const Wide special = u > 0x7f800000 ? 0x7e00 | ((u >> 13) & 0x3ff) : Wide{} + 0x7c00;
    // Below 2^-14 the last bit is 2^-24: adding 0.5, whose last bit that is, leaves the rounded half in the low bits.
    const Raw half = (Raw)(Wide{} + (126u << 23));
    const Wide subnormal = (Wide)((Raw)u + half) - (126u << 23);
    const Wide normal = (u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
    return narrow(sign | (u >= 0x477ff000 ? special : u < (113u << 23) ? subnormal : normal));
  }

#endif
};

// ---- Between memory and bit patterns: the first n of a vector ----------------------------------------------------------

#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64

FASTACT_FN Packed<double> load_words(const void* p, int n, Packed<double> rest) {
  return (Packed<double>)_mm512_mask_loadu_epi64((__m512i)rest, __mmask8((1u << n) - 1), p);
}
FASTACT_FN void store_words(void* p, int n, Packed<double> bits) {
  _mm512_mask_storeu_epi64(p, __mmask8((1u << n) - 1), (__m512i)bits);
}
FASTACT_FN Wide load_words(const void* p, int n, Wide rest) {
  return (Wide)_mm512_mask_loadu_epi32((__m512i)rest, __mmask16((1u << n) - 1), p);
}
FASTACT_FN void store_words(void* p, int n, Wide bits) { _mm512_mask_storeu_epi32(p, __mmask16((1u << n) - 1), (__m512i)bits); }
FASTACT_FN Narrow load_words(const void* p, int n, Narrow rest) {
  return (Narrow)_mm256_mask_loadu_epi16((__m256i)rest, __mmask16((1u << n) - 1), p);
}
FASTACT_FN void store_words(void* p, int n, Narrow bits) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)bits);
}

#else

template <class Packed>
FASTACT_FN Packed load_words(const void* p, int n, Packed rest) {
  for (int i = 0; i < n; ++i) {
    auto word = rest[0];
    __builtin_memcpy(&word, static_cast<const char*>(p) + i * sizeof word, sizeof word);
    rest[i] = word;
  }
  return rest;
}
template <class Packed>
FASTACT_FN void store_words(void* p, int n, Packed bits) {
  for (int i = 0; i < n; ++i) {
    const auto word = bits[i];
    __builtin_memcpy(static_cast<char*>(p) + i * sizeof word, &word, sizeof word);
  }
}

#endif

// ---- Between memory and lanes --------------------------------------------------------------------------------------------

template <class S>
using LaneOf = typename Storage<S>::Lane;

template <class S>
FASTACT_FN LaneOf<S> load(const S* p) {
  Packed<S> bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return Format<S>::unpack(bits);
}
template <class S>
FASTACT_FN void store(S* p, LaneOf<S> v) {
  const Packed<S> bits = Format<S>::pack(v);
  __builtin_memcpy(p, &bits, sizeof bits);
}

/// The first n lanes from memory, the others from `rest`; n below the number of lanes.
template <class S>
FASTACT_FN LaneOf<S> load_part(const S* p, int n, LaneOf<S> rest) {
  return Format<S>::unpack(load_words(p, n, Format<S>::pack(rest)));
}
template <class S>
FASTACT_FN void store_part(S* p, int n, LaneOf<S> v) {
  store_words(p, n, Format<S>::pack(v));
}

/// Fetches the cache line that will be written a few steps from now, for writing. A store that misses waits for its line behind
/// the stores before it; the hardware's own prefetching serves the loads better.
FASTACT_FN void will_write(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 512, 1, 3); }

/// As many neighbours as are fastest together, for loops that do not mind their order.
template <class S>
struct Group {
  using V = LaneOf<S>;
  static constexpr int vectors = 1, elements = V::lanes;
  V v[vectors];

  FASTACT_FN explicit Group(const S* p) : v{load(p)} {}
  FASTACT_FN void write(S* p) const { store(p, v[0]); }
};

/// bfloat16 is the high half of a float: of a pair in 32 bits, one is in place and the other a shift away. No shuffle is needed
/// to take a vector of pairs apart, nor to put it together.
template <>
struct Group<BFloat16> {
  static constexpr int vectors = 2, elements = 2 * Float::lanes;
  Float v[vectors];

  FASTACT_FN explicit Group(const BFloat16* p) {
    Wide pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    v[0] = Float((Float::Raw)(pairs << 16));
    v[1] = Float((Float::Raw)(pairs & 0xffff0000));
  }
  FASTACT_FN void write(BFloat16* p) const {
    const bool nan = any_nan(v[0], v[1]);
    const Wide low = Format<BFloat16>::rounded(v[0], nan), high = Format<BFloat16>::rounded(v[1], nan);
    const Wide pairs = (low >> 16) | (high & 0xffff0000);
    __builtin_memcpy(p, &pairs, sizeof pairs);
  }
};

/// Likewise for any n up to the number of lanes.
template <class S>
FASTACT_FN LaneOf<S> load_some(const S* p, int n, LaneOf<S> rest) {
  return n == LaneOf<S>::lanes ? load(p) : load_part(p, n, rest);
}
template <class S>
FASTACT_FN void store_some(S* p, int n, LaneOf<S> v) {
  if (n == LaneOf<S>::lanes)
    store(p, v);
  else
    store_part(p, n, v);
}

/// A number that the compiler knows.
template <int n>
struct Constant {
  static constexpr int value = n;
  FASTACT_FN constexpr operator int() const { return n; }
};

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
