// The mathematics of softmax over a row x_0 ... x_{n-1}, with m its maximum:
//
//   y_j = e_j / s,  e_j = exp(x_j - m),  s = sum e_j            backward: dx_j = y_j (dy_j - d),  d = sum dy_j y_j
//
// The maximum is subtracted before anything else, so that a row of huge equal numbers is right. It need not carry NaN: an x_j
// that is NaN makes e_j, and so s and the whole row, NaN. A row of -inf, or one that holds +inf, is NaN through inf - inf.
//
// On the CPU, s and d are summed in one order, whatever the layout, the vector width or the number of threads: element j goes
// to partial sum j mod kSumLanes, in order of j, and after every kSumBlock elements (1024, of double 512) the partial sums are
// added as a tree (32 apart, 16, ... 1) and the result goes to a total kept in double. So a result depends on the row alone,
// and the error of the sum does not grow with n. d is made of products that are rounded before they are added.
#pragma once

#include "lane.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

constexpr int kSumLanes = 64;
template <class T>
constexpr int kSumBlock = 4096 / int(sizeof(T));

template <class V>
struct Softmax {
  FASTACT_FN static V term(V x, V maximum) { return exp_nonpositive(x - maximum); }
  FASTACT_FN static V forward(V term, V inverse_sum) { return term * inverse_sum; }
  FASTACT_FN static V product(V dy, V y, V sum) { return fma(dy, y, sum); }
  FASTACT_FN static V backward(V dy, V y, V dot) { return y * (dy - dot); }
};

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
