// The ops on the CPU without the dispatcher, for callers that know it would end there.
#pragma once

#include <ATen/core/Tensor.h>

#include "../kernels.h"

namespace fastact {

/// Whether below autograd the dispatcher would lead a call with x to the CPU kernel and nowhere else: a plain CPU tensor
/// outside any mode, transform or profile. Going there directly saves a small call up to a third of its time.
bool plain(const at::Tensor& x);

at::Tensor cpu_forward(int row, const at::Tensor& x, const double* parameters);
at::Tensor cpu_softmax(int row, const at::Tensor& x, int64_t dim, const SoftmaxOptions& options);

// These write into dy, and return it, where nobody else can ever see that: the caller has given up the only reference to it,
// and it is all of a block of memory from torch's allocator or the pool.
at::Tensor cpu_backward(int row, at::Tensor&& dy, const at::Tensor& saved, const double* parameters);
at::Tensor cpu_softmax_backward(int row, at::Tensor&& dy, const at::Tensor& y, int64_t dim, const SoftmaxOptions& options);

}  // namespace fastact
