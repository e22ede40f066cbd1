#pragma once

#include <ATen/core/Tensor.h>

namespace fastact {

/// Whether autograd has nothing to do for a call with x, in reverse mode or in forward mode.
bool untracked(const at::Tensor& x);

}  // namespace fastact
