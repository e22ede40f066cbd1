// What a monitor makes of a tensor: counts, sums and a histogram of those elements that are looked at, and of a softmax what
// its rows are like. All of it can be added to from any thread in any order: counts come out the same.
#pragma once

#include "kernels.h"
#include "lane.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// For call `phase` and run j of it a number below 1, in units of 2^-32: the additive sequence whose steps are the powers of
/// 1 / 1.3247, the plastic number. It fills the square of calls and runs evenly, whatever the shape of a tensor is.
FASTACT_FN uint32_t fraction_of(int64_t phase, int64_t j) { return uint32_t(phase) * 0xC13FA9A9u + uint32_t(j) * 0x91E10DA5u; }
/// Where run j begins: at block (j + fraction) * blocks / runs. A sample's runs jump about from run to run and from call to
/// call.
FASTACT_FN int64_t start_of(const Look& a, int64_t j) {
  const uint64_t at = (uint64_t(j) << 32) + fraction_of(a.phase, j);
  return int64_t(uint64_t((unsigned __int128)(at)*a.spacing >> 64)) * Look::kRun;
}
/// Any of the first n numbers.
FASTACT_FN int64_t offset_of(int64_t phase, int64_t j, int64_t n) {
  return int64_t((uint64_t(fraction_of(phase, j)) * uint64_t(n)) >> 32);
}
/// Which row is looked at as number j.
FASTACT_FN int64_t row_of(const RowLook& a, int64_t j) { return j * a.spacing + offset_of(a.phase, j, a.spacing); }

/// Where that row begins.
FASTACT_FN int64_t row_start(const RowLook& a, int64_t row) {
  const int64_t outer = divided(row, a.inner);
  return outer * a.length * a.inner + (row - outer * a.inner);
}

/// The bit pattern of a number, as a signed integer.
FASTACT_FN int32_t pattern(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
FASTACT_FN int64_t pattern(double x) {
  int64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

/// Integers in the order of the numbers, above 0: the largest key so far may start as 0. That of -0 is that of 0, so that it is
/// the same whichever of the two came first.
FASTACT_FN uint64_t key(double x) {
  const uint64_t bits = uint64_t(pattern(x + 0.0));
  return bits ^ (bits >> 63 ? ~uint64_t(0) : uint64_t(1) << 63);
}

FASTACT_FN bool finite(float x) { return (pattern(x) & 0x7fffffff) < 0x7f800000; }
FASTACT_FN bool finite(double x) { return (pattern(x) & 0x7fffffffffffffff) < 0x7ff0000000000000; }

/// The bin of a finite number of that magnitude, among those of its sign, or of one in every lane. What is exactly
/// a power of two is the last of its octave: the bit patterns are one less.
template <class I>
FASTACT_FN I bin_of(I magnitude, int shift, int bias) {
  const I at = ((magnitude - 1) >> shift) - ((bias + Histogram::kLowest) << 4), none = magnitude - magnitude,
          most = none + (Histogram::kBins - 1);
  return at < 0 ? none : at < most ? at : most;
}
FASTACT_FN int bin(float x) { return bin_of(pattern(x) & 0x7fffffff, 19, 127); }
FASTACT_FN int bin(double x) { return int(bin_of(pattern(x) & 0x7fffffffffffffff, 48, 1023)); }
static_assert(Histogram::kParts == 16, "the four bits of the fraction that are kept above");

/// - p log p, 0 below 2^-40.
template <class V>
FASTACT_FN V surprise(V p) {
  const V least(0x1p-40);
  return select(p > least, p * log_of_sum(1 / max(least, p)), V(0) * p);
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
