// What a monitor makes of a tensor (look.h), on the CPU.
#pragma once

#include "../look.h"
#include "storage.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// Up to kRun neighbours, unpacked.
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

/// Loops that the compiler turns into SIMD: counts in integers of the elements' size, sums in several parts.
template <class S>
FASTACT_FN void add(const Run<S>& run, const Look& a, Tally& t) {
  using T = typename Run<S>::T;
  using Count = typename BitsOf<T>::Signed;
  constexpr int kParts = 8;
  const T low(a.low), high(a.high);
  Count zeros = 0, lows = 0, highs = 0, nans = 0, finites = 0;
  T largest = -T(kInfinity), smallest = T(kInfinity);
  double total[kParts] = {}, squares[kParts] = {};
  for (int k = 0; k < run.length; ++k) {
    const T v = run.v[k];
    const bool is_finite = finite(v);
    zeros += v == 0;
    lows += v <= low;
    highs += v >= high;
    nans += v != v;
    finites += is_finite;
    const T above = is_finite ? v : -T(kInfinity), below = is_finite ? v : T(kInfinity);
    largest = above > largest ? above : largest;
    smallest = below < smallest ? below : smallest;
  }
  for (int k = 0; k < run.length; k += kParts)
    for (int part = 0; part < kParts; ++part) {
      const double v = k + part < run.length && finite(run.v[k + part]) ? double(run.v[k + part]) : 0;
      total[part] += v;
      squares[part] += v * v;
    }
  t.count += uint64_t(run.length);
  t.zeros += uint64_t(zeros);
  t.low += uint64_t(lows);
  t.high += uint64_t(highs);
  t.nan += uint64_t(nans);
  t.infinite += uint64_t(run.length - nans - finites);
  if (finites > 0) {
    const uint64_t top = key(double(largest)), bottom = key(-double(smallest));
    if (top > t.largest) t.largest = top;
    if (bottom > t.smallest) t.smallest = bottom;
  }
  for (int part = 0; part < kParts; ++part) {
    t.total += total[part];
    t.squares += squares[part];
  }
}

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
  int64_t unit = i / a.inner % a.units, next = a.inner - i % a.inner;  // elements to the next unit
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

template <class S>
void look(const void* x, Look a, int64_t begin, int64_t end, Tally* tally, Histogram* histogram, uint8_t* units) {
  for (int64_t j = begin; j < end; ++j) {
    const int64_t i = start_of(a, j);
    const Run<S> run(static_cast<const S*>(x) + i, a.n - i);
    add(run, a, *tally);
    add(run, *histogram);
    if (a.units > 0) add(run, a, i, units);
  }
}

template <class S>
void look_at_rows(const void* y, RowLook a, RowTally* tally) {
  using V = LaneOf<S>;
  using T = typename V::Element;
  for (int64_t j = 0; j < a.rows; ++j) {
    const int64_t row = row_of(a, j);
    const S* p = static_cast<const S*>(y) + row / a.inner * a.length * a.inner + row % a.inner;
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
