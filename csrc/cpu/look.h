// What a monitor makes of a tensor (look.h), on the CPU.
#pragma once

#include "../look.h"
#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

constexpr double kNaN = __builtin_nan("");

// ---- Lanes together --------------------------------------------------------------------------------------------------------

template <class T, int N>
struct Halves {
  Lanes<T, N / 2> low, high;
  FASTACT_FN explicit Halves(Lanes<T, N> v) { __builtin_memcpy(this, &v, sizeof v); }
};

/// op(x, y) of all lanes: of those in the two halves, until there is one.
template <class T, int N, class Op>
FASTACT_FN T of_lanes(Lanes<T, N> v, Op op) {
  if constexpr (N == 2)
    return op(v.raw[0], v.raw[1]);
  else {
    const Halves<T, N> halves(v);
    return of_lanes(Lanes<T, N / 2>(op(halves.low.raw, halves.high.raw)), op);
  }
}

constexpr auto sum = [](auto x, auto y) { return x + y; };
constexpr auto larger = [](auto x, auto y) { return x > y ? x : y; };
constexpr auto smaller = [](auto x, auto y) { return x < y ? x : y; };

struct Doubles {
  Double a, b;
};
FASTACT_FN Doubles doubles_of(Float v) {
  const Halves halves(v);
#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64  // which GCC 12 takes in four parts
  return {Double(_mm512_cvtps_pd((__m256)halves.low.raw)), Double(_mm512_cvtps_pd((__m256)halves.high.raw))};
#endif
  return {Double(__builtin_convertvector(halves.low.raw, Double::Raw)),
          Double(__builtin_convertvector(halves.high.raw, Double::Raw))};
}
FASTACT_FN Doubles doubles_of(Double v) { return {v, Double(0)}; }

// ---- A run -----------------------------------------------------------------------------------------------------------------

FASTACT_FN int count_of(uint64_t bits) {
#if defined(__POPCNT__) || !defined(__x86_64__)
  return __builtin_popcountll(bits);
#else  // where the compiler would call its library
  bits -= bits >> 1 & 0x5555555555555555;
  bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
  return int(((bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101 >> 56);
#endif
}

/// Up to kRun neighbours in memory, as vectors; behind its end there is NaN.
template <class S>
struct Run {
  using V = LaneOf<S>;
  static constexpr int kMost = int(Look::kRun);
  const S* p;
  int length;

  FASTACT_FN Run(const S* p_, int64_t n) : p(p_), length(n < kMost ? int(n) : kMost) {}
  FASTACT_FN V vector(int k) const {
    if (k + V::lanes <= length) return load(p + k);
    return k < length ? load_part(p + k, length - k, V(kNaN)) : V(kNaN);
  }
};

template <class T, int N>
FASTACT_FN void store_bins(uint16_t* to, Lanes<T, N> v) {
  constexpr bool single = sizeof(T) == 4;
  using Bits = typename Lanes<T, N>::Bits;
  const Bits bin = bin_of((Bits)abs(v).raw, single ? 19 : 48, single ? 127 : 1023) + (((Bits)v.raw < 0) & Histogram::kBins);
  typedef uint16_t Narrow __attribute__((vector_size(2 * N)));
  const Narrow narrow = __builtin_convertvector(bin, Narrow);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

template <class S>
FASTACT_FN void look_at(const Run<S>& run, const Look& a, Glimpse& found, Bins* bins) {
  using V = LaneOf<S>;
  using Counts = typename V::Bits;
  const V low(a.low), high(a.high);
  const bool squashing = a.low == a.low;
  Counts counts = {};  // of a lane: low ones in the low byte, high ones in the next; neither is above 64
  V largest(-kInfinity), smallest(kInfinity);
  Doubles totals = {Double(0), Double(0)}, squares = totals;
  uint64_t active = 0, finite = 0, nan = 0;
#pragma GCC unroll 32
  for (int k = 0; k < Run<S>::kMost; k += V::lanes) {
    const V v = run.vector(k), zero(0);
    const auto is_finite = abs(v) < V(kInfinity);
    if (squashing) counts += ((v <= low).bits & 1) + ((v >= high).bits & 1 << 8);
    largest = max(select(is_finite, v, V(-kInfinity)), largest);
    smallest = min(select(is_finite, v, V(kInfinity)), smallest);
    const V number = select(is_finite, v, zero);
    const Doubles wide = doubles_of(number);
    totals.a = totals.a + wide.a, totals.b = totals.b + wide.b;
    squares.a = fma(wide.a, wide.a, squares.a), squares.b = fma(wide.b, wide.b, squares.b);
    active |= uint64_t(which_differ(v, zero)) << k;
    finite |= uint64_t(which_less(abs(v), V(kInfinity))) << k;
    nan |= uint64_t(which_differ(v, v)) << k;
    if (a.shown) store_bins(bins->at + k, v);
  }
  const uint64_t there = ~uint64_t(0) >> (Run<S>::kMost - run.length);
  uint32_t levels = 0;
  for (int l = 0; l < V::lanes; ++l) levels += uint32_t(counts[l]);
  found.total = of_lanes(totals.a + totals.b, sum);
  found.squares = of_lanes(squares.a + squares.b, sum);
  found.largest = double(of_lanes(largest, larger));
  found.smallest = double(of_lanes(smallest, smaller));
  found.active = active & there;
  found.length = uint8_t(run.length);
  found.low = uint8_t(levels), found.high = uint8_t(levels >> 8);
  found.nan = uint8_t(count_of(nan & there));
  found.infinite = uint8_t(count_of(~(finite | nan)));
  found.shown = finite & active;
}

/// Fetches the run that begins at element i: it may be far away by now, or in the cache of another core.
template <class S>
FASTACT_FN void fetch(const S* x, int64_t i, int64_t end) {
  if (i >= end) return;
  const char* p = reinterpret_cast<const char*>(x + i);
  for (int64_t byte = 0; byte < Look::kRun * int64_t(sizeof(S)); byte += 64) __builtin_prefetch(p + byte);
}

template <class S>
void look(const void* x_, const Look& a, int64_t begin, int64_t end, int64_t first, Glimpse* glimpses, Bins* bins) {
  constexpr int kAhead = 8;
  const S* const x = static_cast<const S*>(x_);
  // Runs before this one begin before.
  int64_t j = begin == 0 ? 0 : begin / Look::kRun * a.runs / ((a.n + Look::kRun - 1) / Look::kRun);
  for (int k = 0; k < kAhead; ++k) fetch(x, start_of(a, j + k), end);
  for (; j < a.runs; ++j) {
    const int64_t i = start_of(a, j);
    if (i >= end) break;
    if (i < begin) continue;
    fetch(x, start_of(a, j + kAhead), end);
    look_at(Run<S>(x + i, a.n - i), a, glimpses[j - first], bins + (j - first));
  }
}

// ---- What was found --------------------------------------------------------------------------------------------------------

FASTACT_FN uint64_t first_bits(int64_t count) { return count < 64 ? (uint64_t(1) << count) - 1 : ~uint64_t(0); }

FASTACT_FN void add(const Bins& bins, uint64_t which, Histogram& h) {
  uint32_t* const counts = &h.counts[0][0];
  for (; which; which &= which - 1) ++counts[bins.at[__builtin_ctzll(which)]];
}

typedef uint8_t Flags __attribute__((vector_size(Look::kRun)));

/// A byte of 1 for each bit.
FASTACT_FN Flags flags_of(uint64_t bits) {
#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64
  return (Flags)_mm512_maskz_set1_epi8(bits, 1);
#else
  uint64_t eight[8];
  for (int k = 0; k < 8; ++k) {
    const uint64_t spread = (bits >> 8 * k & 0xff) * 0x0101010101010101 & 0x8040201008040201;
    eight[k] = ((spread + 0x7f7f7f7f7f7f7f7f) | spread) >> 7 & 0x0101010101010101;
  }
  Flags flags;
  __builtin_memcpy(&flags, eight, sizeof flags);
  return flags;
#endif
}

/// to[k] |= bit k, of the first `count` bytes.
FASTACT_FN void raise(uint8_t* to, int64_t count, uint64_t bits) {
  Flags flags = flags_of(bits);
  if (count < Look::kRun) {
    for (int64_t k = 0; k < count; ++k) to[k] |= flags[k];
    return;
  }
  Flags before;
  __builtin_memcpy(&before, to, sizeof before);
  flags |= before;
  __builtin_memcpy(to, &flags, sizeof flags);
}
FASTACT_FN void raise(uint8_t* units, const Look& a, int64_t at, uint64_t seen, uint64_t active) {
  raise(units + at, a.units - at, seen);
  raise(units + a.units + at, a.units - at, active);
}

/// The run's first element is number i of the tensor.
FASTACT_FN void add(const Glimpse& found, const Look& a, int64_t i, uint8_t* units) {
  const int64_t line = divided(i, a.inner);
  int64_t unit = remainder_of(line, a.units);
  if (a.inner == 1) {
    const uint64_t seen = first_bits(found.length);
    const int64_t before_first = a.units - unit;  // elements to the next turn of the units
    if (before_first >= Look::kRun) return raise(units, a, unit, seen, found.active);
    if (a.units >= Look::kRun) {
      const int64_t shift = Look::kRun - before_first;
      raise(units, a, a.units - Look::kRun, seen << shift, found.active << shift);
      return raise(units, a, 0, seen >> before_first, found.active >> before_first);
    }
    uint64_t all_seen = seen << unit, all_active = found.active << unit;
    for (int64_t k = before_first; k < Look::kRun; k += a.units) all_seen |= seen >> k, all_active |= found.active >> k;
    return raise(units, a, 0, all_seen, all_active);
  }
  uint64_t left = found.active;
  int64_t next = (line + 1) * a.inner - i;  // elements to the next unit
  for (int k = 0; k < found.length;) {
    const int part = found.length - k < next ? found.length - k : int(next);
    const uint64_t of_unit = left << (Look::kRun - part);
    units[unit] = 1;
    units[a.units + unit] |= of_unit != 0;
    left = part < Look::kRun ? left >> part : 0;
    k += part;
    unit = unit + 1 < a.units ? unit + 1 : 0;
    next = a.inner;
  }
}

void gather(const Look& a, int64_t first, int64_t end, const Glimpse* glimpses, const Bins* bins, Tally* tally,
            Histogram* histogram, uint8_t* units) {
  Tally sum = {};
  double largest = -kInfinity, smallest = kInfinity;
  for (int64_t j = first; j < end; ++j) {
    const Glimpse& found = glimpses[j - first];
    sum.count += found.length;
    sum.zeros += found.length - count_of(found.active);
    sum.low += found.low, sum.high += found.high, sum.nan += found.nan, sum.infinite += found.infinite;
    sum.total += found.total, sum.squares += found.squares;
    largest = found.largest > largest ? found.largest : largest;
    smallest = found.smallest < smallest ? found.smallest : smallest;
    if (a.shown) add(bins[j - first], found.shown, *histogram);
    if (a.units > 0) add(found, a, start_of(a, j), units);
  }
  if (a.shown) histogram->counts[0][0] += uint32_t(sum.zeros);  // of which there may be many
  tally->count += sum.count, tally->zeros += sum.zeros, tally->low += sum.low, tally->high += sum.high;
  tally->nan += sum.nan, tally->infinite += sum.infinite, tally->total += sum.total, tally->squares += sum.squares;
  if (largest < smallest) return;  // there is no finite element
  tally->largest = key(largest) > tally->largest ? key(largest) : tally->largest;
  tally->smallest = key(-smallest) > tally->smallest ? key(-smallest) : tally->smallest;
}

// ---- Rows ------------------------------------------------------------------------------------------------------------------

/// The first n of a row's elements from p on, which lie `stride` apart; the other lanes from `rest`.
template <class S>
FASTACT_FN LaneOf<S> load_row(const S* p, int64_t stride, int n, LaneOf<S> rest) {
  if (stride == 1) return load_some(p, n, rest);
  S neighbours[LaneOf<S>::lanes];
  for (int k = 0; k < n; ++k) neighbours[k] = p[k * stride];
  return load_some(neighbours, n, rest);
}

template <class S>
void look_at_rows(const void* y, RowLook a, RowTally* tally) {
  using V = LaneOf<S>;
  const V rest(a.logarithms ? -kInfinity : 0);
  for (int64_t j = 0; j < a.rows; ++j) {
    const S* p = static_cast<const S*>(y) + row_start(a, row_of(a, j));
    V largest(0);
    Doubles entropy = {Double(0), Double(0)};
    bool nan = false;
    for (int64_t i = 0; i < a.length; i += V::lanes) {
      V v = load_row(p + i * a.inner, a.inner, a.length - i < V::lanes ? int(a.length - i) : V::lanes, rest);
      nan = nan || which_differ(v, v);
      if (a.logarithms) v = exp_nonpositive(v);
      largest = max(v, largest);
      const Doubles terms = doubles_of(surprise(v));
      entropy.a = entropy.a + terms.a, entropy.b = entropy.b + terms.b;
    }
    ++tally->count;
    tally->nan += nan;
    tally->sure += !nan && of_lanes(largest, larger) > typename V::Element(0.99);
    if (!nan) tally->entropy += of_lanes(entropy.a + entropy.b, sum) * a.scale;
  }
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
