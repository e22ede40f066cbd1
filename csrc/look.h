// What a monitor makes of a tensor: counts, sums and a histogram of those elements that are looked at, and of a softmax what
// its rows are like. All of it can be added to from any thread in any order: counts come out the same.
#pragma once

#include "kernels.h"
#include "lane.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// One of the first n numbers for call `phase` and run j of it: the additive sequence whose steps are the powers of 1 / 1.3247,
/// the plastic number, in 32 bits. It fills the square of calls and runs evenly, whatever n has in common with a tensor's
/// shape.
FASTACT_FN int64_t offset_of(int64_t phase, int64_t j, int64_t n) {
  const uint32_t fraction = uint32_t(phase) * 0xC13FA9A9u + uint32_t(j) * 0x91E10DA5u;
  return int64_t((uint64_t(fraction) * uint64_t(n)) >> 32);
}
/// Where run j begins. A sample's runs jump about in what lies between them, from run to run and from call to call.
FASTACT_FN int64_t start_of(const Look& a, int64_t j) {
  return j * a.spacing + offset_of(a.phase, j, a.spacing - Look::kRun + 1);
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

/// Integers in the order of the numbers, above 0: the largest key so far may start as 0.
FASTACT_FN uint64_t key(double x) {
  const uint64_t bits = uint64_t(pattern(x));
  return bits ^ (bits >> 63 ? ~uint64_t(0) : uint64_t(1) << 63);
}

FASTACT_FN bool finite(float x) { return (pattern(x) & 0x7fffffff) < 0x7f800000; }
FASTACT_FN bool finite(double x) { return (pattern(x) & 0x7fffffffffffffff) < 0x7ff0000000000000; }

/// The bin of a finite number among those of its sign. What is exactly a power of two is the last of its octave: the bit
/// patterns are one less.
FASTACT_FN int bin(float x) {
  const int at = (((pattern(x) & 0x7fffffff) - 1) >> 19) - ((127 + Histogram::kLowest) << 4);
  return at < 0 ? 0 : at < Histogram::kBins ? at : Histogram::kBins - 1;
}
FASTACT_FN int bin(double x) {
  const int at = int(((pattern(x) & 0x7fffffffffffffff) - 1) >> 48) - ((1023 + Histogram::kLowest) << 4);
  return at < 0 ? 0 : at < Histogram::kBins ? at : Histogram::kBins - 1;
}
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
