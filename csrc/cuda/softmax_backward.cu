#define FASTACT_NAMESPACE device
#include "softmax.h"
#include "tables.h"

namespace fastact {
namespace cuda {

using namespace device;

const SoftmaxTable<SoftmaxBackward> softmax_backward_table = {FASTACT_EACH_DTYPE(softmax_backward),
                                                              FASTACT_EACH_DTYPE(softmax_backward_workspace)};

}  // namespace cuda
}  // namespace fastact
