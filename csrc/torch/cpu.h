// The ops on the CPU without the dispatcher, for callers that know it would end there.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastact {

at::Tensor cpu_forward(int row, const at::Tensor& x, const double* parameters);
at::Tensor cpu_softmax(const at::Tensor& x, int64_t dim);

}  // namespace fastact
