// What the Python module asks of the CUDA half, where it is built.
#pragma once

#include <c10/core/Device.h>

namespace fastact {

/// Whether the kernels run there; a device without a number is the current one.
bool cuda_device_has_kernels(c10::Device device);

}  // namespace fastact
