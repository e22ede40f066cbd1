// The mathematics of maxout: the largest of several numbers, and which it is. The first of equal ones; the first NaN, if any.
#pragma once

#include "lane.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

template <class V>
struct Maxout {
  V largest, which;
  FASTACT_FN explicit Maxout(V first) : largest(first), which(0) {}
  /// Number n, counted from 0, is v. Comparisons with NaN do not hold.
  FASTACT_FN void take(V v, V n) {
    which = select(v <= largest, which, select(largest == largest, n, which));
    largest = select(v <= largest, largest, select(largest == largest, v, largest));
  }
};

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
