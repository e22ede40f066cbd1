#define FASTACT_NAMESPACE device
#include "softmax.h"
#include "tables.h"

namespace fastact {
namespace cuda {

using namespace device;

const SoftmaxTable<SoftmaxForward> softmax_forward_table = {FASTACT_EACH_DTYPE(softmax_forward),
                                                            FASTACT_EACH_DTYPE(softmax_forward_workspace)};

}  // namespace cuda
}  // namespace fastact
