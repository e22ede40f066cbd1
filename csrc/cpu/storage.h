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

constexpr uint32_t kQuietNaN16 = 0x7fc0;  // bfloat16

// ---- SIMD lanes: full vectors ----------------------------------------------------------------------------------------

template <class T, int N>
FASTACT_FN void load(const T* p, Lanes<T, N>& v) {
  __builtin_memcpy(&v.raw, p, sizeof v.raw);
}
template <class T, int N>
FASTACT_FN void store(T* p, Lanes<T, N> v) {
  __builtin_memcpy(p, &v.raw, sizeof v.raw);
}

/// N 16-bit patterns, and the same widened to 32 bits.
template <int N>
struct Patterns {
  typedef uint16_t Narrow __attribute__((vector_size(N * 2)));
  typedef uint32_t Wide __attribute__((vector_size(N * 4)));
};

template <class S, int N>
FASTACT_FN auto load_bits(const S* p) {
  typename Patterns<N>::Narrow bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}
template <class S, class Narrow>
FASTACT_FN void store_bits(S* p, Narrow bits) {
  __builtin_memcpy(p, &bits, sizeof bits);
}

template <int N>
FASTACT_FN void load(const BFloat16* p, Lanes<float, N>& v) {
  typedef typename Patterns<N>::Wide Wide;
  v.raw = (typename Lanes<float, N>::Raw)(__builtin_convertvector(load_bits<BFloat16, N>(p), Wide) << 16);
}
template <int N>
FASTACT_FN void store(BFloat16* p, Lanes<float, N> v) {
  typedef typename Patterns<N>::Wide Wide;
  const Wide u = (Wide)v.raw;
  // Adding just under half of the last kept bit, and that bit itself, rounds to nearest even.
  const Wide rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Wide bits = (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | kQuietNaN16 : rounded;
  store_bits(p, __builtin_convertvector(bits, typename Patterns<N>::Narrow));
}

#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64

FASTACT_FN void load(const Float16* p, Float& v) {
  v.raw = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTACT_FN void store(Float16* p, Float v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__x86_64__) && FASTACT_VECTOR_BYTES == 32

FASTACT_FN void load(const Float16* p, Float& v) {
  v.raw = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTACT_FN void store(Float16* p, Float v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT));
}

#else

// Without an instruction for it. Subnormal halves are normalised by a subtraction of floats that are themselves normal, so that
// the result does not depend on the flush-to-zero mode.
FASTACT_FN void load(const Float16* p, Float& v) {
  typedef Patterns<Float::lanes>::Wide Wide;
  typedef Float::Raw Raw;
  const Wide h = __builtin_convertvector(load_bits<Float16, Float::lanes>(p), Wide);
  const Wide sign = (h & 0x8000) << 16, magnitude = (h & 0x7fff) << 13;
  const Wide normal = magnitude + ((127 - 15) << 23);
  const Wide special = magnitude + ((255 - 31) << 23);
  const Raw offset = (Raw)(Wide{} + ((127 - 14) << 23));
  const Wide subnormal = (Wide)((Raw)(magnitude + ((127 - 14) << 23)) - offset);
  const Wide exponent = magnitude & (0x1f << 23);
  v.raw = (Raw)(sign | (exponent == 0 ? subnormal : exponent == (0x1f << 23) ? special : normal));
}
FASTACT_FN void store(Float16* p, Float v) {
  typedef Patterns<Float::lanes>::Wide Wide;
  typedef Float::Raw Raw;
  const Wide u = (Wide)v.raw & 0x7fffffff, sign = ((Wide)v.raw >> 16) & 0x8000;
  // 65520 is halfway from the largest half to the next power of two: it and all above it round to infinity.
  const Wide special = u > 0x7f800000 ? 0x7e00 | ((u >> 13) & 0x3ff) : Wide{} + 0x7c00;
  // Below 2^-14 the last bit is 2^-24: adding 0.5, whose last bit that is, leaves the rounded half in the low bits.
  const Raw half = (Raw)(Wide{} + (126u << 23));
  const Wide subnormal = (Wide)((Raw)u + half) - (126u << 23);
  const Wide normal = (u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
  const Wide bits = u >= 0x477ff000 ? special : u < (113u << 23) ? subnormal : normal;
  store_bits(p, __builtin_convertvector(sign | bits, Patterns<Float::lanes>::Narrow));
}

#endif

// ---- SIMD lanes: the first `count` < N of a vector -------------------------------------------------------------------

#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64

template <int bytes>
struct Part;  // an integer vector of N elements of so many bytes, and its masked moves
template <>
struct Part<8> {
  using Vector = __m512i;
  FASTACT_FN static Vector load(const void* p, int n, Vector rest) { return _mm512_mask_loadu_epi64(rest, mask(n), p); }
  FASTACT_FN static void store(void* p, int n, Vector v) { _mm512_mask_storeu_epi64(p, mask(n), v); }
  FASTACT_FN static __mmask8 mask(int n) { return __mmask8((1u << n) - 1); }
};
template <>
struct Part<4> {
  using Vector = __m512i;
  FASTACT_FN static Vector load(const void* p, int n, Vector rest) { return _mm512_mask_loadu_epi32(rest, mask(n), p); }
  FASTACT_FN static void store(void* p, int n, Vector v) { _mm512_mask_storeu_epi32(p, mask(n), v); }
  FASTACT_FN static __mmask16 mask(int n) { return __mmask16((1u << n) - 1); }
};
template <>
struct Part<2> {
  using Vector = __m256i;
  FASTACT_FN static Vector load(const void* p, int n, Vector rest) { return _mm256_mask_loadu_epi16(rest, mask(n), p); }
  FASTACT_FN static void store(void* p, int n, Vector v) { _mm256_mask_storeu_epi16(p, mask(n), v); }
  FASTACT_FN static __mmask16 mask(int n) { return __mmask16((1u << n) - 1); }
};

#else

template <int bytes>
struct Word;
template <>
struct Word<8> {
  using type = uint64_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};

template <int bytes>
struct Part {
  using W = typename Word<bytes>::type;
  static constexpr int N = bytes == 8 ? Double::lanes : Float::lanes;
  typedef W Vector __attribute__((vector_size(N * bytes)));
  FASTACT_FN static Vector load(const void* p, int n, Vector rest) {
    for (int i = 0; i < n; ++i) {
      W word;
      __builtin_memcpy(&word, static_cast<const char*>(p) + i * bytes, bytes);
      rest[i] = word;
    }
    return rest;
  }
  FASTACT_FN static void store(void* p, int n, Vector v) {
    for (int i = 0; i < n; ++i) {
      const W word = v[i];
      __builtin_memcpy(static_cast<char*>(p) + i * bytes, &word, bytes);
    }
  }
};

#endif

/// The first n lanes from memory, the others from `rest`.
template <class S, class V>
FASTACT_FN V load_part(const S* p, int n, V rest) {
  S buffer[V::lanes];
  typename Part<sizeof(S)>::Vector bits;
  static_assert(sizeof buffer == sizeof bits, "one vector");
  store(buffer, rest);
  __builtin_memcpy(&bits, buffer, sizeof bits);
  bits = Part<sizeof(S)>::load(p, n, bits);
  __builtin_memcpy(buffer, &bits, sizeof bits);
  V v;
  load(buffer, v);
  return v;
}

/// The first n lanes to memory.
template <class S, class V>
FASTACT_FN void store_part(S* p, int n, V v) {
  S buffer[V::lanes];
  typename Part<sizeof(S)>::Vector bits;
  store(buffer, v);
  __builtin_memcpy(&bits, buffer, sizeof bits);
  Part<sizeof(S)>::store(p, n, bits);
}

template <class V, class S>
FASTACT_FN V load_full(const S* p) {
  V v;
  load(p, v);
  return v;
}

/// The lane type a storage type is computed in.
template <class S>
struct Compute {
  using Lane = Float;
};
template <>
struct Compute<double> {
  using Lane = Double;
};

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
