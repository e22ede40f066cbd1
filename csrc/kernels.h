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
#define FASTACT_CHANNEL_FORWARD(name, Functor, ...) FASTACT_EACH_DTYPE(channel_forward, Functor FASTACT_COMMA),
#define FASTACT_CHANNEL_BACKWARD(name, Functor, ...) FASTACT_EACH_DTYPE(channel_backward, Functor FASTACT_COMMA),

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
/// 2 to this is the highest temperature, whose reciprocal is the lowest: both are normal numbers of every type computed in.
constexpr int kTemperatureExponent = 126;
/// What a row of softmax.h may be told besides; the backward looks at the temperature only.
struct SoftmaxOptions {
  double temperature = 1;
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

/// What the rest of the library knows of an activation with parameters per channel: one per row of channels.h, in that order.
struct ChannelRow {
  const char* name;
  const char* functor;
  const char* parameters[kMaxParameters];
  bool costly;

  constexpr int arity() const { return kMaxParameters > 1 && parameters[1] ? 2 : 1; }
};

/// A dense tensor whose channels have parameters of their own: (outer, channels, inner) in memory order.
struct ChannelShape {
  int64_t outer, channels, inner;
};

/// How the CPU goes through such a tensor. It follows from the shape alone, so that the sums do not depend on the number of
/// threads. In memory a channel has lines of `inner` elements. Where these are long, or there is one channel, a unit of work is
/// up to kChunk elements of a line. Else the tensor is a matrix each of whose columns belongs to one channel, its rows made of
/// `repeat` times all channels, and a unit is a tile of up to kRows by kColumns elements.
///
/// A unit leaves a number per line or column in the sums of a parameter: (before, channels, after) of them in memory order, to
/// be added up in that order.
struct ChannelWork {
  static constexpr int64_t kShortest = 32, kChunk = 4096, kRows = 64, kColumns = 512;
  bool lines;
  int64_t repeat, units, before, after;
};

/// In every file a function of its own.
static constexpr ChannelWork channel_work(ChannelShape s) {
  using W = ChannelWork;
  if (s.channels == 1 || s.inner >= W::kShortest) {
    const int64_t chunks = (s.inner + W::kChunk - 1) / W::kChunk;
    return {true, 1, s.outer * s.channels * chunks, s.outer, chunks};
  }
  const int64_t period = s.channels * s.inner, sixteen = W::kColumns / 16 / period * 16;
  // Sixteen at a time, so that rows end with a whole vector.
  const int64_t repeat = sixteen > 0 ? sixteen : period < W::kColumns ? W::kColumns / period : 1;
  const int64_t rows = (s.outer + repeat - 1) / repeat, blocks = (rows + W::kRows - 1) / W::kRows;
  return {false, repeat, blocks * ((period * repeat + W::kColumns - 1) / W::kColumns), blocks * repeat, s.inner};
}

/// `parameters`: an array each, of `channels` numbers of the tensors' type. For units of work in [begin, end).
using ChannelForward = void (*)(const void* x, void* y, const void* const* parameters, ChannelShape, int64_t begin,
                                int64_t end);
/// dx may be dy or x; it may be null, and so may `sums`: not wanted. `sums`: those of one parameter after those of the other.
using ChannelBackward = void (*)(const void* dy, const void* x, void* dx, const void* const* parameters, double* sums,
                                 ChannelShape, int64_t begin, int64_t end);
/// From the sums of a parameter to its gradient. `totals`: space for a number per channel.
using ChannelTotals = void (*)(const double* sums, double* totals, void* gradient, ChannelShape);

constexpr int64_t kMostPieces = 255;  // what counts up to it fits into the byte per result that is saved
/// A dense tensor whose channels are taken in groups of `pieces`: (outer, groups, pieces, inner) in memory order.
struct MaxoutShape {
  int64_t outer, groups, pieces, inner;
};
using MaxoutForward = void (*)(const void* x, void* y, uint8_t* index, MaxoutShape, int64_t begin, int64_t end);
using MaxoutBackward = void (*)(const void* dy, const uint8_t* index, void* dx, MaxoutShape, int64_t begin, int64_t end);

/// Units of work: so many groups where inner is 1, else so many neighbours of a group.
constexpr int64_t kMaxoutGroups = 256, kMaxoutPart = 4096;
static constexpr int64_t maxout_units(MaxoutShape s) {
  const int64_t groups = s.outer * s.groups;
  if (s.inner == 1) return (groups + kMaxoutGroups - 1) / kMaxoutGroups;
  return groups * ((s.inner + kMaxoutPart - 1) / kMaxoutPart);
}

/// Which elements of a dense tensor a monitor looks at, in memory order, and what it wants to know of them. The tensor is cut
/// into blocks of kRun neighbours, the last of which may be shorter; a run is one of them.
struct Look {
  static constexpr int64_t kRun = 64;
  int64_t n;             // elements of the tensor
  int64_t runs;          // to be looked at, in the order of their blocks
  uint64_t spacing;      // blocks from one run to the next, in units of 2^-32; kDense: all are
  int64_t phase;         // counts the calls
  double low, high;      // saturated are those up to `low`, and from `high`; NaN: none
  int64_t units, inner;  // element i belongs to unit i / inner % units; no units: 0
  bool shown;            // in the histogram
  static constexpr uint64_t kDense = uint64_t(1) << 32;

  // Instead of a number of elements: all; and as many as cost little beside what the activation itself costs, so fewer of a
  // small tensor, and half of that of a gradient, of which there are two.
  static constexpr int64_t kAll = 0, kAuto = -1;
  static constexpr int64_t sample_of(int64_t sample, int64_t n, bool gradient = false) {
    if (sample != kAuto) return sample == kAll ? n : sample;
    if (n <= 256) return n;
    return (n < 256 * 512 ? 256 : n < 2048 * 512 ? n / 512 : 2048) >> int(gradient);
  }

  /// Of n elements all, or about `sample` of them where that is below n.
  static constexpr Look at(int64_t n, int64_t sample, int64_t phase, bool gradient = false) {
    sample = sample_of(sample, n, gradient);
    const int64_t blocks = (n + kRun - 1) / kRun, runs = sample / kRun > 0 ? sample / kRun : 1;
    if (n <= sample || runs >= blocks) return {n, blocks, kDense, 0, 0, 0, 0, 1, true};
    // A shift where that will do.
    const auto by_runs = [r = uint64_t(runs)](uint64_t x) { return (r & (r - 1)) == 0 ? x >> __builtin_ctzll(r) : x / r; };
    const uint64_t whole = by_runs(uint64_t(blocks)), rest = uint64_t(blocks) - whole * uint64_t(runs);
    return {n, runs, (whole << 32) + by_runs(rest << 32), phase, 0, 0, 0, 1, true};
  }
};

/// What one run is like: a line of a cache, so that one thread can write it for another.
struct alignas(64) Glimpse {
  double total, squares;                     // of the finite elements
  double largest, smallest;                  // of those too, of this run or of all that were looked at together up to it
  uint64_t active, shown;                    // bit k: element k is not 0, and is finite too
  uint8_t length, low, high, nan, infinite;  // counts
};
/// The bins of its elements, of those that `shown` has.
struct Bins {
  uint16_t at[Look::kRun];
};

/// Counters of magnitudes for either sign: [2][kBins], the negative ones last. An octave holds those above 2^k and up to
/// 2^(k + 1), in equal parts; the first bin also what is smaller, with 0 as positive, and the last one what is larger.
struct Histogram {
  static constexpr int kOctaves = 64, kParts = 16, kLowest = -44, kBins = kOctaves * kParts;
  uint32_t counts[2][kBins];
};

/// Of one tensor; all zero before the first look. The sums and the extremes are those of the finite elements.
struct Tally {
  uint64_t count, zeros, low, high, nan, infinite;
  uint64_t largest, smallest;  // keys (look.h) of the largest, and of the largest negated; 0: none
  double total, squares;
};

/// Of the rows of a softmax.
struct RowTally {
  uint64_t count, sure, nan;
  double entropy;  // of rows without NaN, as a share of the largest there can be
};

/// What a monitor gathers of one layer: its output, and the gradients that come to it and that it passes on.
enum { kOutput, kGradientIn, kGradientOut, kSides };
struct Ledger {
  Tally sides[kSides];
  RowTally rows;
};

/// Rows that a monitor looks at, of outer * inner, `spacing` apart.
struct RowLook {
  int64_t length, inner, rows, spacing, phase;
  bool logarithms;  // of the probabilities
  double scale;     // 1 / log(length); 0 where length is 1
};

/// Looks at those runs that begin among elements [begin, end) of x. What is found of run j is written to glimpses[j - first]
/// and, where all is shown, to bins[j - first].
using LookKernel = void (*)(const void* x, const Look&, int64_t begin, int64_t end, int64_t first, Glimpse*, Bins*);
/// Adds up what was found of runs [first, end). `units`: a byte each, 1 where one of its elements was looked at, then as many,
/// 1 where one of these was not 0, and kRun more that are left as they are, but not to others.
using GatherKernel = void (*)(const Look&, int64_t first, int64_t end, const Glimpse*, const Bins*, Tally*, Histogram*,
                              uint8_t* units);
using RowLookKernel = void (*)(const void* y, RowLook, RowTally*);

constexpr int kMaxRows = 32, kMaxSoftmaxes = 4, kMaxChannelRows = 8;

/// Everything one instruction set offers, indexed [row][dtype]: rows of activations.h, and of softmax.h.
struct Kernels {
  const char* isa;
  Forward forward[kMaxRows][kDTypes];
  Backward backward[kMaxRows][kDTypes];
  SoftmaxForward softmax_forward[kMaxSoftmaxes][kDTypes];
  SoftmaxBackward softmax_backward[kMaxSoftmaxes][kDTypes];
  ChannelForward channel_forward[kMaxChannelRows][kDTypes];
  ChannelBackward channel_backward[kMaxChannelRows][kDTypes];
  ChannelTotals channel_totals[kDTypes];
  MaxoutForward maxout_forward[kDTypes];
  MaxoutBackward maxout_backward[kDTypes];
  LookKernel look[kDTypes];
  GatherKernel gather;
  RowLookKernel look_at_rows[kDTypes];
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

/// As on the CPU, whole; `gradients`: null for those that are not wanted. `workspace`: channel_workspace() bytes, aligned to
/// 16; null where no gradient of a parameter is wanted.
using ChannelForward = int (*)(const void* x, void* y, const void* const* parameters, ChannelShape, Queue);
using ChannelBackward = int (*)(const void* dy, const void* x, void* dx, const void* const* parameters, void* const* gradients,
                                void* workspace, ChannelShape, Queue);

using MaxoutForward = int (*)(const void* x, void* y, uint8_t* index, MaxoutShape, Queue);
using MaxoutBackward = int (*)(const void* dy, const uint8_t* index, void* dx, MaxoutShape, Queue);

/// As on the CPU, whole, into device memory.
using LookKernel = int (*)(const void* x, Look, Tally*, Histogram*, uint8_t* units, Queue);
using RowLookKernel = int (*)(const void* y, RowLook, RowTally*, Queue);

/// Indexed [row][dtype], as cpu's.
struct Kernels {
  const Forward (*forward)[kDTypes];
  const Backward (*backward)[kDTypes];
  const SoftmaxForward (*softmax_forward)[kDTypes];
  const SoftmaxBackward (*softmax_backward)[kDTypes];
  int64_t (*softmax_workspace)(int row, DType, SoftmaxShape, bool backward, Queue);
  const ChannelForward (*channel_forward)[kDTypes];
  const ChannelBackward (*channel_backward)[kDTypes];
  int64_t (*channel_workspace)(DType, ChannelShape, int parameters);
  const MaxoutForward* maxout_forward;
  const MaxoutBackward* maxout_backward;
  const LookKernel* look;
  const RowLookKernel* look_at_rows;
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
