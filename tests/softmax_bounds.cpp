// Softmax's loops over every way in which rows are cut, in memory that ends where the tensor does, for a sanitizer to watch:
// built and run by test_softmax.py, in the place of table.h. The functor has the shape of those of softmax.h and as little to
// compile as can be.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "softmax_rows.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

template <class V>
struct Plain {
  static constexpr bool tempered = false, keeps_terms = true, scalar_factor = true;

  FASTACT_FN explicit Plain(SoftmaxOptions) {}
  template <class U>
  FASTACT_FN explicit Plain(const Plain<U>&) {}

  FASTACT_FN static V least() { return V(-kInfinity); }
  FASTACT_FN static V term(V x, V maximum) { return x - maximum; }
  FASTACT_FN static V factor(V sum) { return sum; }
  FASTACT_FN static V forward(V term, V, V factor) { return term * factor; }
  FASTACT_FN static V product(V dy, V y) { return dy * y; }
  FASTACT_FN static V backward(V dy, V y, V dot) { return y * (dy - dot); }
};

void visit(SoftmaxShape s) {
  const size_t elements = s.outer * s.length * s.inner;
  float* memory[3];
  for (float*& p : memory) p = static_cast<float*>(calloc(elements, sizeof(float)));
  const int64_t units = softmax_units(s), half = units / 2;
  for (int64_t begin : {int64_t(0), half}) {
    const int64_t end = begin < half ? half : units;
    if (begin == end) continue;
    softmax_forward<Plain, float>(memory[0], memory[1], s, SoftmaxOptions(), begin, end);
    softmax_backward<Plain, float>(memory[0], memory[1], memory[2], s, SoftmaxOptions(), begin, end);
  }
  for (float* p : memory) free(p);
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact

int main() {
  int shapes = 0;
  for (int64_t length :
       {1, 2, 3, 10, 15, 16, 17, 21, 32, 33, 63, 64, 65, 100, 300, 511, 512, 513, 1000, 1024, 1025, 2050, 5000})
    for (int64_t inner : {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 100, 127, 128, 129, 196, 511, 512, 520, 1030})
      for (int64_t outer : {1, 3, 17, 60}) {
        if (outer * length * inner > 700000) continue;
        fastact::FASTACT_NAMESPACE::visit({outer, length, inner});
        ++shapes;
      }
  printf("%d shapes\n", shapes);
}
