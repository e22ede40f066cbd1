// The parts of cuda::Kernels, each filled by a .cu file of its own.
#pragma once

#include "../kernels.h"

namespace fastact {
namespace cuda {

struct ElementwiseTable {
  Forward forward[kMaxRows][kDTypes];
  Backward backward[kMaxRows][kDTypes];
};
template <class Softmax>
struct SoftmaxTable {
  Softmax run[kMaxSoftmaxes][kDTypes];
  int64_t (*workspace[kMaxSoftmaxes][kDTypes])(SoftmaxShape, Queue);
};

struct ChannelTable {
  ChannelForward forward[kMaxChannelRows][kDTypes];
  ChannelBackward backward[kMaxChannelRows][kDTypes];
  int64_t (*workspace[kDTypes])(ChannelShape, int parameters);
};

struct MaxoutTable {
  MaxoutForward forward[kDTypes];
  MaxoutBackward backward[kDTypes];
};

struct LookTable {
  LookKernel look[kDTypes];
  RowLookKernel look_at_rows[kDTypes];
};

extern const ElementwiseTable elementwise_table;
extern const SoftmaxTable<SoftmaxForward> softmax_forward_table;
extern const SoftmaxTable<SoftmaxBackward> softmax_backward_table;
extern const ChannelTable channel_table;
extern const MaxoutTable maxout_table;
extern const LookTable look_table;

}  // namespace cuda
}  // namespace fastact
