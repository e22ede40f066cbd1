// The boundary between the kernels and everything else: plain types and tables of function pointers. No torch, no STL.
#pragma once

#include <stdint.h>

namespace fastact {

/// The storage types that have kernels. 16-bit types are computed in float and rounded once.
enum DType { kFloat64, kFloat32, kBFloat16, kFloat16, kDTypes };

/// The most float parameters a row may have.
constexpr int kMaxParameters = 2;

/// What the rest of the library knows of an activation: one per row of activations.h, in that order.
struct Row {
  const char* name;                               // op and Python function: "leaky_relu"
  const char* functor;                            // functor, module and autograd Function: "LeakyReLU"
  const char* parameters[kMaxParameters];         // names, in order; null where there is none
  bool (*saves_input)(const double* parameters);  // whether backward wants x (else y) for these parameters

  constexpr int arity() const {
    int count = 0;
    while (count < kMaxParameters && parameters[count]) ++count;
    return count;
  }
};

/// y[i] = f(x[i]) for i in [0, n). x and y may be the same memory, else they must not overlap.
using Forward = void (*)(const void* x, void* y, int64_t n, const double* parameters);
/// dx[i] = dy[i] f'(saved[i]) for i in [0, n). dx may be dy or saved.
using Backward = void (*)(const void* dy, const void* saved, void* dx, int64_t n, const double* parameters);

/// A dense tensor seen by softmax: (outer, length, inner) in memory order, normalised along `length`. The work is
/// numbered in units that may run in any order and on any thread: softmax_units() of them.
struct SoftmaxShape {
  int64_t outer, length, inner;
};
using SoftmaxForward = void (*)(const void* x, void* y, SoftmaxShape, int64_t begin, int64_t end);
using SoftmaxBackward = void (*)(const void* dy, const void* y, void* dx, SoftmaxShape, int64_t begin, int64_t end);

/// Inner positions of one unit when inner > 1: enough to fill cache lines, few enough to stay in L1 with their sums.
constexpr int64_t kSoftmaxColumns = 64;

/// Units of work, in every file a function of its own: a row each when inner is 1, else kSoftmaxColumns neighbouring rows of
/// one outer index.
static constexpr int64_t softmax_units(SoftmaxShape s) {
  return s.inner == 1 ? s.outer : s.outer * ((s.inner + kSoftmaxColumns - 1) / kSoftmaxColumns);
}

constexpr int kMaxRows = 32;

/// Everything one instruction set offers, indexed [row][dtype].
struct Kernels {
  const char* isa;
  Forward forward[kMaxRows][kDTypes];
  Backward backward[kMaxRows][kDTypes];
  SoftmaxForward softmax_forward[kDTypes];
  SoftmaxBackward softmax_backward[kDTypes];
};

namespace cpu {

/// The kernels of the best instruction set this CPU has, or of the lower one that FASTACT_ISA names: chosen at the first call.
const Kernels& kernels();

/// Takes the kernels of that level from now on; false where this CPU has it not. For tests; not while another thread computes.
bool use_level(const char* name);

/// Names of the levels compiled in, lowest first, and their number.
extern const char* const kLevels[];
extern const int kLevelCount;

}  // namespace cpu
}  // namespace fastact
