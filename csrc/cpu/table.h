// Fills one table of kernels: included last by each file that is compiled for an instruction set.
#pragma once

#include "../activations.h"
#include "elementwise.h"
#include "softmax_rows.h"

namespace fastact {
namespace FASTACT_NAMESPACE {

// The storage types in the order of DType.
#define FASTACT_EACH_DTYPE(KERNEL, ...) \
  {KERNEL<__VA_ARGS__ double>, KERNEL<__VA_ARGS__ float>, KERNEL<__VA_ARGS__ BFloat16>, KERNEL<__VA_ARGS__ Float16>}
#define FASTACT_COMMA ,
#define FASTACT_FORWARD(name, Functor, ...) FASTACT_EACH_DTYPE(forward, Functor FASTACT_COMMA),
#define FASTACT_BACKWARD(name, Functor, ...) FASTACT_EACH_DTYPE(backward, Functor FASTACT_COMMA),

extern const Kernels kernels;
const Kernels kernels = {
    FASTACT_ISA,
    {FASTACT_ACTIVATIONS(FASTACT_FORWARD)},
    {FASTACT_ACTIVATIONS(FASTACT_BACKWARD)},
    FASTACT_EACH_DTYPE(softmax_forward),
    FASTACT_EACH_DTYPE(softmax_backward),
};

}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
