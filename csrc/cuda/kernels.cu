// The table of all CUDA kernels, put together from its parts.
#include "tables.h"

namespace fastact {
namespace cuda {

static int64_t softmax_workspace(int row, DType dtype, SoftmaxShape s, bool backward, Queue queue) {
  return (backward ? softmax_backward_table.workspace : softmax_forward_table.workspace)[row][dtype](s, queue);
}

static int64_t channel_workspace(DType dtype, ChannelShape s, int parameters) {
  return channel_table.workspace[dtype](s, parameters);
}

const Kernels& kernels() {
  static const Kernels all = {
      elementwise_table.forward, elementwise_table.backward, softmax_forward_table.run, softmax_backward_table.run,
      softmax_workspace,         channel_table.forward,      channel_table.backward,    channel_workspace,
      maxout_table.forward,      maxout_table.backward,      look_table.look,           look_table.look_at_rows};
  return all;
}

}  // namespace cuda
}  // namespace fastact
