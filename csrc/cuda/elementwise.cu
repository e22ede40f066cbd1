#define FASTACT_NAMESPACE device
#include "../activations.h"
#include "elementwise.h"
#include "tables.h"

namespace fastact {
namespace cuda {

using namespace device;

const ElementwiseTable elementwise_table = {{FASTACT_ACTIVATIONS(FASTACT_FORWARD)}, {FASTACT_ACTIVATIONS(FASTACT_BACKWARD)}};

}  // namespace cuda
}  // namespace fastact
