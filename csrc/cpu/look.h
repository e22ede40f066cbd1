// What a monitor makes of a tensor (look.h), on the CPU.
#pragma once

#include "../look.h"
#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

constexpr double kNaN = __builtin_nan("");

/// Up to kRun neighbours, unpacked, and then NaN.
template <class S>
struct Run {
  using V = LaneOf<S>;
  using T = typename V::Element;
  static constexpr int kMost = int(Look::kRun);
  T v[kMost];
  int length;

  FASTACT_FN Run(const S* p, int64_t n) : length(n < kMost ? int(n) : kMost) {
    int k = 0;
    for (; k + V::lanes <= length; k += V::lanes) put(k, load(p + k));
    if (k < length) put(k, load_part(p + k, length - k, V(0)));
    for (k = length; k < kMost; ++k) v[k] = T(kNaN);
  }
  /// Of elements that lie `stride` apart.
  FASTACT_FN Run(const S* p, int64_t n, int64_t stride) : length(n < kMost ? int(n) : kMost) {
    S neighbours[kMost] = {};
    for (int k = 0; k < length; ++k) neighbours[k] = p[k * stride];
    for (int k = 0; k < length; k += V::lanes) put(k, load(neighbours + k));
  }
  FASTACT_FN void put(int k, V lanes) { __builtin_memcpy(v + k, &lanes, sizeof lanes); }
  FASTACT_FN V vector(int k) const {
    V lanes;
    __builtin_memcpy(&lanes, v + k, sizeof lanes);
    return lanes;
  }
};

/// Counts and sums of many runs in lanes, so many that a count is exact in a float.
template <class S>
struct Lanewise {
  using V = LaneOf<S>;
  using T = typename V::Element;
  using Doubles = typename Lanes<double, V::lanes>::Raw;
  const V low, high;
  V zeros{0}, lows{0}, highs{0}, numbers{0}, finites{0}, largest{-kInfinity}, smallest{kInfinity};
  Doubles total = {}, squares = {};
  int64_t count = 0;

  FASTACT_FN explicit Lanewise(const Look& a) : low(a.low), high(a.high) {}

  /// Behind its end the run has NaN.
  FASTACT_FN void add(const Run<S>& run) {
#pragma GCC unroll 8
    for (int k = 0; k < Run<S>::kMost; k += V::lanes) {
      const V v = run.vector(k), one(1), zero(0);
      const auto is_finite = abs(v) < V(kInfinity);
      zeros = zeros + select(v == zero, one, zero);
      lows = lows + select(v <= low, one, zero);
      highs = highs + select(v >= high, one, zero);
      numbers = numbers + select(v == v, one, zero);
      finites = finites + select(is_finite, one, zero);
      largest = max(select(is_finite, v, V(-kInfinity)), largest);
      smallest = min(select(is_finite, v, V(kInfinity)), smallest);
      const Doubles wide = __builtin_convertvector(select(is_finite, v, zero).raw, Doubles);
      total += wide;
      squares += wide * wide;
    }
    count += run.length;
  }

  FASTACT_FN static uint64_t sum(V v) {
    uint64_t all = 0;
    for (int l = 0; l < V::lanes; ++l) all += uint64_t(v.raw[l]);
    return all;
  }
  FASTACT_FN void add_to(Tally& t) const {
    t.count += uint64_t(count);
    t.zeros += sum(zeros);
    t.low += sum(lows);
    t.high += sum(highs);
    t.nan += uint64_t(count) - sum(numbers);
    t.infinite += sum(numbers) - sum(finites);
    for (int l = 0; l < V::lanes; ++l) {
      t.total += total[l];
      t.squares += squares[l];
      if (finites.raw[l] == 0) continue;
      const uint64_t top = key(double(largest.raw[l])), bottom = key(-double(smallest.raw[l]));
      if (top > t.largest) t.largest = top;
      if (bottom > t.smallest) t.smallest = bottom;
    }
  }
};

template <class S>
FASTACT_FN void add(const Run<S>& run, Histogram& h) {
  int at[Run<S>::kMost];
  // What is not finite is counted in the first bin, and taken away again.
  int others = 0;
  for (int k = 0; k < run.length; ++k) {
    const auto v = run.v[k];
    const bool counts = finite(v);
    at[k] = counts ? bin(v) + (v < 0 ? Histogram::kBins : 0) : 0;
    others += !counts;
  }
  uint32_t* const counts = &h.counts[0][0];
  for (int k = 0; k < run.length; ++k) ++counts[at[k]];
  counts[0] -= uint32_t(others);
}

/// The run's first element is number i of the tensor.
template <class S>
FASTACT_FN void add(const Run<S>& run, const Look& a, int64_t i, uint8_t* units) {
  uint8_t active[Run<S>::kMost];
  for (int k = 0; k < run.length; ++k) active[k] = run.v[k] != 0;
  const int64_t line = divided(i, a.inner);
  int64_t unit = remainder_of(line, a.units), next = (line + 1) * a.inner - i;  // elements to the next unit
  if (a.inner == 1) {
    for (int k = 0; k < run.length;) {
      const int part = run.length - k < a.units - unit ? run.length - k : int(a.units - unit);
      for (int l = 0; l < part; ++l) {
        units[unit + l] = 1;
        units[a.units + unit + l] |= active[k + l];
      }
      k += part;
      unit = 0;
    }
    return;
  }
  for (int k = 0; k < run.length;) {
    const int part = run.length - k < next ? run.length - k : int(next);
    uint8_t any = 0;
    for (int l = 0; l < part; ++l) any |= active[k + l];
    units[unit] = 1;
    units[a.units + unit] |= any;
    k += part;
    unit = unit + 1 < a.units ? unit + 1 : 0;
    next = a.inner;
  }
}

/// Where run j lies in what is looked at.
FASTACT_FN int64_t place_of(const Look& a, int64_t j) { return a.gathered ? j * Look::kRun : start_of(a, j); }

/// Fetches a run that will be looked at some runs from now: it may lie in the cache of another core.
template <class S>
FASTACT_FN void fetch(const S* x, const Look& a, int64_t j, int64_t end) {
  if (j >= end) return;
  const char* p = reinterpret_cast<const char*>(x + place_of(a, j));
  for (int64_t byte = 0; byte < Look::kRun * int64_t(sizeof(S)); byte += 64) __builtin_prefetch(p + byte);
}

template <class S>
void look(const void* x, Look a, int64_t begin, int64_t end, Tally* tally, Histogram* histogram, uint8_t* units) {
  constexpr int64_t kAhead = 16;
  Lanewise<S> lanes(a);
  for (int64_t j = begin; j < begin + kAhead; ++j) fetch(static_cast<const S*>(x), a, j, end);
  for (int64_t j = begin; j < end; ++j) {
    fetch(static_cast<const S*>(x), a, j + kAhead, end);
    const int64_t i = start_of(a, j);
    const Run<S> run(static_cast<const S*>(x) + place_of(a, j), a.n - i);
    lanes.add(run);
    if (a.thinned > 0 && j % a.thinned == 0) add(run, *histogram);
    if (a.units > 0) add(run, a, i, units);
  }
  lanes.add_to(*tally);
}

template <class S>
void look_at_rows(const void* y, RowLook a, RowTally* tally) {
  using V = LaneOf<S>;
  using T = typename V::Element;
  for (int64_t j = 0; j < a.rows; ++j) {
    const S* p = static_cast<const S*>(y) + row_start(a, row_of(a, j));
    T largest = 0;
    double entropy = 0;
    bool nan = false;
    for (int64_t i = 0; i < a.length; i += Look::kRun) {
      Run<S> run(p + i * a.inner, a.length - i, a.inner);
      for (int k = 0; k < run.length; k += V::lanes) {
        if (a.logarithms) run.put(k, exp_nonpositive(run.vector(k)));
        const V terms = surprise(run.vector(k));
        for (int l = 0; l < V::lanes && k + l < run.length; ++l) {
          entropy += double(terms.raw[l]);
          nan = nan || run.v[k + l] != run.v[k + l];
          largest = run.v[k + l] > largest ? run.v[k + l] : largest;
        }
      }
    }
    ++tally->count;
    tally->nan += nan;
    tally->sure += !nan && largest > T(0.99);
    if (!nan) tally->entropy += entropy * a.scale;
  }
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
