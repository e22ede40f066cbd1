// What a monitor makes of a tensor (look.h), on the CPU.
#pragma once

#include "../look.h"
#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

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

template <class T, int N>
FASTACT_FN void store_bins(uint16_t* to, Lanes<T, N> v) {
  constexpr bool single = sizeof(T) == 4;
  using Bits = typename Lanes<T, N>::Bits;
  const Bits bin = bin_of((Bits)abs(v).raw, single ? 19 : 48, single ? 127 : 1023) + (((Bits)v.raw < 0) & Histogram::kBins);
  typedef uint16_t Narrow __attribute__((vector_size(2 * N)));
  const Narrow narrow = __builtin_convertvector(bin, Narrow);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

// Between two looks whatever lies in the caches is lost, code as well as data: what is short is fast here, so that no loop is
// unrolled, and what is rare stands apart.

template <class S>
[[gnu::noinline]] void store_bins(const S* p, Bins& bins) {
#pragma GCC unroll 1
  for (int k = 0; k < Look::kRun; k += LaneOf<S>::lanes) store_bins(bins.at + k, load(p + k));
}

template <class V>
struct Extremes {
  V largest, smallest;
  FASTACT_FN Extremes() : largest(-kInfinity), smallest(kInfinity) {}
};

/// At kRun neighbours in memory, of which `length` are elements and the rest is NaN; the largest and the smallest are kept
/// apart. kFinite takes all of them for finite, which is faster; where they are not it returns false, having found nothing.
template <bool kFinite, class S>
FASTACT_FN bool look_at(const S* p, int length, const Look& a, Glimpse& found, Extremes<LaneOf<S>>& extremes) {
  using V = LaneOf<S>;
  const V low(a.low), high(a.high), infinity(kInfinity), zero(0);
  const bool squashing = a.low == a.low;
  Extremes<V> e = extremes;
  Doubles totals = {Double(0), Double(0)}, squares = totals;
  uint64_t active = 0, above = 0, below = 0, finite = 0, nan = 0;
#pragma GCC unroll 1
  for (int k = 0; k < Look::kRun; k += V::lanes) {
    const V v = load(p + k);
    const auto number_or = [&](V other) {
      if constexpr (kFinite) return v;
      return select(abs(v) < infinity, v, other);
    };
    e.largest = max(number_or(-infinity), e.largest);
    e.smallest = min(number_or(infinity), e.smallest);
    const Doubles wide = doubles_of(number_or(zero));
    totals.a = totals.a + wide.a, totals.b = totals.b + wide.b;
    squares.a = fma(wide.a, wide.a, squares.a), squares.b = fma(wide.b, wide.b, squares.b);
    active |= uint64_t(which_differ(v, zero)) << k;
    if (squashing) {
      above |= uint64_t(which_less(low, v)) << k;
      below |= uint64_t(which_less(v, high)) << k;
    }
    if constexpr (!kFinite) {
      finite |= uint64_t(which_less(abs(v), infinity)) << k;
      nan |= uint64_t(which_differ(v, v)) << k;
    }
  }
  const double square = of_lanes(squares.a + squares.b, sum);
  if (kFinite && !(square < kInfinity)) return false;
  if (kFinite) finite = ~uint64_t(0);
  const uint64_t there = ~uint64_t(0) >> (Look::kRun - length);
  extremes = e;
  found.total = of_lanes(totals.a + totals.b, sum);
  found.squares = square;
  found.active = active & there;
  found.shown = finite & active;
  found.length = uint8_t(length);
  found.low = squashing ? uint8_t(count_of(~(above | nan))) : 0;
  found.high = squashing ? uint8_t(count_of(~(below | nan))) : 0;
  found.nan = uint8_t(count_of(nan & there));
  found.infinite = uint8_t(count_of(~(finite | nan)));
  return true;
}
template <class S>
[[gnu::noinline]] void look_carefully(const S* p, int length, const Look& a, Glimpse& found, Extremes<LaneOf<S>>& extremes) {
  look_at<false>(p, length, a, found, extremes);
}

/// The last run of a tensor, brought to kRun elements.
template <class S>
[[gnu::noinline]] const S* filled_up(const S* p, int length, S* to) {
  __builtin_memset(to, 0xff, uint64_t(Look::kRun) * sizeof(S));  // NaN, in every format
  __builtin_memcpy(to, p, uint64_t(length) * sizeof(S));
  return to;
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
  const int64_t from = begin == 0 ? 0 : begin / Look::kRun * a.runs / ((a.n + Look::kRun - 1) / Look::kRun);
  Extremes<LaneOf<S>> extremes;
  Glimpse* last = nullptr;
  for (int64_t j = from, ahead = from; j < a.runs; ++j) {
    for (; ahead < j + kAhead && ahead < a.runs; ++ahead) fetch(x, start_of(a, ahead), end);
    const int64_t i = start_of(a, j);
    if (i >= end) break;
    if (i < begin) continue;
    const int length = a.n - i < Look::kRun ? int(a.n - i) : int(Look::kRun);
    S part[Look::kRun];
    const S* const p = length < Look::kRun ? filled_up(x + i, length, part) : x + i;
    last = glimpses + (j - first);
    last->largest = -kInfinity, last->smallest = kInfinity;
    if (length < Look::kRun || !look_at<true>(p, length, a, *last, extremes)) look_carefully(p, length, a, *last, extremes);
    if (a.shown) store_bins(p, bins[j - first]);
  }
  if (!last) return;
  last->largest = double(of_lanes(extremes.largest, larger));
  last->smallest = double(of_lanes(extremes.smallest, smaller));
}

// ---- What was found --------------------------------------------------------------------------------------------------------

FASTACT_FN uint64_t first_bits(int64_t count) { return count < 64 ? (uint64_t(1) << count) - 1 : ~uint64_t(0); }

FASTACT_FN void add(const Bins& bins, uint64_t which, Histogram& h) {
  uint32_t* const counts = &h.counts[0][0];
  for (; which; which &= which - 1) ++counts[bins.at[__builtin_ctzll(which)]];
}

/// Sets a byte to 1 for each bit; of the kRun there are, the others stay.
FASTACT_FN void raise(uint8_t* flags, uint64_t bits) {
#if defined(__x86_64__) && FASTACT_VECTOR_BYTES == 64  // without waiting for what was stored there just before
  _mm512_mask_storeu_epi8(flags, bits, _mm512_set1_epi8(1));
#else
  for (int k = 0; k < 8; ++k, flags += 8) {
    const uint64_t spread = (bits >> 8 * k & 0xff) * 0x0101010101010101 & 0x8040201008040201;
    uint64_t eight;
    __builtin_memcpy(&eight, flags, sizeof eight);
    eight |= ((spread + 0x7f7f7f7f7f7f7f7f) | spread) >> 7 & 0x0101010101010101;
    __builtin_memcpy(flags, &eight, sizeof eight);
  }
#endif
}

/// Of elements that go through the units in turns of which each has `inner` of a unit.
[[gnu::noinline]] void add_lines(const Glimpse& found, const Look& a, int64_t i, uint8_t* units) {
  const int64_t line = divided(i, a.inner);
  int64_t unit = remainder_of(line, a.units);
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

/// The run's first element is number i of the tensor.
FASTACT_FN void add(const Glimpse& found, const Look& a, int64_t i, uint8_t* units) {
  if (a.inner != 1) return add_lines(found, a, i, units);
  int64_t unit = remainder_of(i, a.units), next = a.units - unit;  // elements to the next turn
  uint64_t seen[] = {first_bits(found.length), found.active};
  if (a.units < Look::kRun) {  // turns are put on top of each other
    for (uint64_t& bits : seen) {
      uint64_t all = bits << unit;
      for (int64_t k = next; k < Look::kRun; k += a.units) all |= bits >> k;
      bits = all & first_bits(a.units);
    }
    unit = 0, next = Look::kRun;
  }
  for (;;) {
    raise(units + unit, seen[0] & first_bits(next));
    raise(units + a.units + unit, seen[1] & first_bits(next));
    if (next >= Look::kRun) return;
    for (uint64_t& bits : seen) bits >>= next;
    unit = 0, next = Look::kRun;
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
