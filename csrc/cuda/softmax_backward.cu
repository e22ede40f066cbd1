#define FASTACT_NAMESPACE device
#include "softmax.h"
#include "tables.h"

namespace fastact {
namespace cuda {

using namespace device;

#define FASTACT_WORKSPACE(name, Functor) FASTACT_EACH_DTYPE(softmax_backward_workspace, Functor FASTACT_COMMA),

const SoftmaxTable<SoftmaxBackward> softmax_backward_table = {{FASTACT_SOFTMAXES(FASTACT_SOFTMAX_BACKWARD)},
                                                              {FASTACT_SOFTMAXES(FASTACT_WORKSPACE)}};

}  // namespace cuda
}  // namespace fastact
