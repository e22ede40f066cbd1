#define FASTACT_NAMESPACE device
#include "softmax.h"
#include "tables.h"

namespace fastact {
namespace cuda {

using namespace device;

#define FASTACT_WORKSPACE(name, Functor) FASTACT_EACH_DTYPE(softmax_forward_workspace, Functor FASTACT_COMMA),

const SoftmaxTable<SoftmaxForward> softmax_forward_table = {{FASTACT_SOFTMAXES(FASTACT_SOFTMAX_FORWARD)},
                                                            {FASTACT_SOFTMAXES(FASTACT_WORKSPACE)}};

}  // namespace cuda
}  // namespace fastact
