// The boundary between the kernels and everything else: plain types and tables of function pointers. No torch, no STL.
#pragma once

#include <stdint.h>

namespace fastact {

/// The storage types that have kernels. 16-bit types are computed in float and rounded once.
enum DType { kFloat64, kFloat32, kBFloat16, kFloat16, kDTypes };

// For tables indexed by DType: a kernel template for each storage type in that order; and the two kernels of a row, of
// activations.h and of softmax.h.
#define FASTACT_EACH_DTYPE(KERNEL, ...) \
  {KERNEL<__VA_ARGS__ double>, KERNEL<__VA_ARGS__ float>, KERNEL<__VA_ARGS__ BFloat16>, KERNEL<__VA_ARGS__ Float16>}
#define FASTACT_COMMA ,
#define FASTACT_FORWARD(name, Functor, ...) FASTACT_EACH_DTYPE(forward, Functor FASTACT_COMMA),
#define FASTACT_BACKWARD(name, Functor, ...) FASTACT_EACH_DTYPE(backward, Functor FASTACT_COMMA),
#define FASTACT_SOFTMAX_FORWARD(name, Functor) FASTACT_EACH_DTYPE(softmax_forward, Functor FASTACT_COMMA),
#define FASTACT_SOFTMAX_BACKWARD(name, Functor) FASTACT_EACH_DTYPE(softmax_backward, Functor FASTACT_COMMA),

/// The most float parameters a row may have.
constexpr int kMaxParameters = 2;

/// What the rest of the library knows of an activation: one per row of activations.h, in that order.
struct Row {
  const char* name;                               // op and Python function: "leaky_relu"
  const char* functor;                            // functor, module and autograd Function: "LeakyReLU"
  const char* parameters[kMaxParameters];         // names, in order; null where there is none
  bool costly;                                    // forward takes an exponential
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
/// What a row of softmax.h may be told besides; the backward looks at the temperature only.
struct SoftmaxOptions {
  double temperature = 1;    // from 2^-126 to 2^126, so that its reciprocal is a normal number of every type computed in
  bool masked_zero = false;  // whether a row of -inf gives 0 rather than NaN
};
using SoftmaxForward = void (*)(const void* x, void* y, SoftmaxShape, SoftmaxOptions, int64_t begin, int64_t end);
using SoftmaxBackward = void (*)(const void* dy, const void* y, void* dx, SoftmaxShape, SoftmaxOptions, int64_t begin,
                                 int64_t end);

/// Rows of one unit when inner > 1: enough to fill cache lines.
constexpr int64_t kSoftmaxColumns = 64;

/// Units of work, in every file a function of its own: a row each when inner is 1, else kSoftmaxColumns neighbouring ones of
/// the outer * inner rows.
static constexpr int64_t softmax_units(SoftmaxShape s) {
  return s.inner == 1 ? s.outer : (s.outer * s.inner + kSoftmaxColumns - 1) / kSoftmaxColumns;
}

constexpr int kMaxRows = 32, kMaxSoftmaxes = 4;

/// Everything one instruction set offers, indexed [row][dtype]: rows of activations.h, and of softmax.h.
struct Kernels {
  const char* isa;
  Forward forward[kMaxRows][kDTypes];
  Backward backward[kMaxRows][kDTypes];
  SoftmaxForward softmax_forward[kMaxSoftmaxes][kDTypes];
  SoftmaxBackward softmax_backward[kMaxSoftmaxes][kDTypes];
};

namespace cuda {

/// Where a kernel is to run, and what it depends on how it is launched there.
struct Queue {
  void* stream;         // a cudaStream_t of the current device
  int multiprocessors;  // of that device
  int capability;       // 10 major + minor: 90 for sm_90
};

/// As on the CPU, and asynchronous. Every launch returns a cudaError_t: 0 is success. Nothing is launched for nothing to do.
using Forward = int (*)(const void* x, void* y, int64_t n, const double* parameters, Queue);
using Backward = int (*)(const void* dy, const void* saved, void* dx, int64_t n, const double* parameters, Queue);
/// `y`, `dx` and `workspace`, device memory of softmax_workspace() bytes, are aligned to 16.
using SoftmaxForward = int (*)(const void* x, void* y, SoftmaxShape, SoftmaxOptions, void* workspace, Queue);
using SoftmaxBackward = int (*)(const void* dy, const void* y, void* dx, SoftmaxShape, SoftmaxOptions, void* workspace, Queue);

/// Indexed [row][dtype], as cpu's.
struct Kernels {
  const Forward (*forward)[kDTypes];
  const Backward (*backward)[kDTypes];
  const SoftmaxForward (*softmax_forward)[kDTypes];
  const SoftmaxBackward (*softmax_backward)[kDTypes];
  int64_t (*softmax_workspace)(int row, DType, SoftmaxShape, bool backward, Queue);
};

/// Only in a build with CUDA.
const Kernels& kernels();

}  // namespace cuda

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
