#define FASTACT_NAMESPACE device
#include "look.h"
#include "tables.h"

namespace fastact {
namespace cuda {

using namespace device;

const LookTable look_table = {FASTACT_EACH_DTYPE(look), FASTACT_EACH_DTYPE(look_at_rows)};

}  // namespace cuda
}  // namespace fastact
