#define FASTACT_NAMESPACE device
#include "maxout.h"
#include "tables.h"

namespace fastact {
namespace cuda {

using namespace device;

const MaxoutTable maxout_table = {FASTACT_EACH_DTYPE(maxout_forward), FASTACT_EACH_DTYPE(maxout_backward)};

}  // namespace cuda
}  // namespace fastact
