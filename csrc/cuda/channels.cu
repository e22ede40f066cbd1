#define FASTACT_NAMESPACE device
#include "channels.h"
#include "tables.h"

namespace fastact {
namespace cuda {

using namespace device;

const ChannelTable channel_table = {{FASTACT_CHANNEL_ACTIVATIONS(FASTACT_CHANNEL_FORWARD)},
                                    {FASTACT_CHANNEL_ACTIVATIONS(FASTACT_CHANNEL_BACKWARD)},
                                    FASTACT_EACH_DTYPE(channel_workspace)};

}  // namespace cuda
}  // namespace fastact
