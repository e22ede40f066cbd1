// Autocast as torch has it for the twins of these ops: on CUDA, where half precision would cost too much of a long sum or of a
// logarithm, they compute in float32. Everything else keeps its dtype.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "rows.h"

namespace fastact {
namespace {

void in_float32(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
  for (size_t k = stack->size() - op.schema().arguments().size(); k < stack->size(); ++k)
    if (c10::IValue& argument = (*stack)[k]; argument.isTensor())
      argument = at::autocast::cached_cast(at::kFloat, argument.toTensor(), at::kCUDA);
  op.callBoxed(stack);
}

TORCH_LIBRARY_IMPL(fastact, AutocastCUDA, m) {
  const auto widen = [&](const char* name) { m.impl(name, torch::CppFunction::makeFromBoxedFunction<&in_float32>()); };
  for (const SoftmaxRow& row : kSoftmaxes) widen(row.name);
  widen("softplus");
}

}  // namespace
}  // namespace fastact
