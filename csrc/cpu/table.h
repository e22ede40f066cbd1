// Fills one table of kernels: included last by each file that is compiled for an instruction set.
#pragma once

#include "../activations.h"
#include "../channels.h"
#include "channels.h"
#include "elementwise.h"
#include "look.h"
#include "maxout.h"
#include "softmax_rows.h"

namespace fastact {
namespace FASTACT_NAMESPACE {

extern const Kernels kernels;
const Kernels kernels = {
    FASTACT_ISA,
    {FASTACT_ACTIVATIONS(FASTACT_FORWARD)},
    {FASTACT_ACTIVATIONS(FASTACT_BACKWARD)},
    {FASTACT_SOFTMAXES(FASTACT_SOFTMAX_FORWARD)},
    {FASTACT_SOFTMAXES(FASTACT_SOFTMAX_BACKWARD)},
    {FASTACT_CHANNEL_ACTIVATIONS(FASTACT_CHANNEL_FORWARD)},
    {FASTACT_CHANNEL_ACTIVATIONS(FASTACT_CHANNEL_BACKWARD)},
    FASTACT_EACH_DTYPE(channel_totals),
    FASTACT_EACH_DTYPE(maxout_forward),
    FASTACT_EACH_DTYPE(maxout_backward),
    FASTACT_EACH_DTYPE(look),
    gather,
    FASTACT_EACH_DTYPE(look_at_rows),
};

}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
