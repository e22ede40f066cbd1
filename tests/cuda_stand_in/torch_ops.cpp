// Torch's CUDA ops for the stand-in of CUDA's runtime (runtime.cpp): each runs torch's op for the CPU, on the same memory.
//
// What torch does for CUDA on the host stays torch's own: allocation, views, copies, item(), streams, graphs, and what it says
// of synchronisations.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <set>
#include <string>

#include "stand_in.h"

namespace {

using torch::jit::Stack;

/// A call of an op with each CUDA tensor replaced by one of the CPU that has the same memory.
class HostCall {
 public:
  HostCall(const c10::OperatorHandle& op, const Stack& arguments, size_t count) : op_(op) {
    for (size_t k = arguments.size() - count; k < arguments.size(); ++k) arguments_.push_back(on_host(arguments[k]));
  }

  void run() {
    const c10::impl::ExcludeDispatchKeyGuard below(
        c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset |
        c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
    results_ = arguments_;  // a graph does it again
    op_.callBoxed(results_);
    // An empty output takes the size of the result.
    for (const auto& [given, host] : tensors_)
      if (given.sizes() != host.sizes()) resized_.push_back({given, host});
  }

  /// The results, on the GPU: those that are arguments as they were given, the others copied.
  void finish(Stack& stack) {
    for (const auto& [given, host] : resized_) {
      given.resize_(host.sizes());
      stand_in::run_now(c10::cuda::getCurrentCUDAStream(), [&, given = given, host = host] { alias_of(given).copy_(host); });
    }
    for (const c10::IValue& value : results_) stack.push_back(on_device(value));
  }

 private:
  static at::Tensor alias_of(const at::Tensor& t) {
    const auto options = t.options().device(at::kCPU).requires_grad(false).pinned_memory(false);
    if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
    at::Tensor alias = at::from_blob(t.data_ptr(), t.sizes(), t.strides(), options);
    alias._set_neg(t.is_neg());
    alias._set_conj(t.is_conj());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
    return alias;
  }

  at::Tensor on_host(const at::Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    device_ = t.device();
    if (t.layout() != at::kStrided) return t.cpu();  // only read
    for (const auto& [given, host] : tensors_)
      if (given.is_same(t)) return host;
    tensors_.emplace_back(t, alias_of(t));
    return tensors_.back().second;
  }

  c10::IValue on_host(const c10::IValue& value) {
    if (value.isTensor()) return on_host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(on_host(t));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional(on_host(*t)) : std::nullopt);
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      device_ = value.toDevice();
      return c10::Device(at::kCPU);
    }
    if (value.isGenerator() && value.toGenerator().device().is_cuda()) {
      at::Generator given = value.toGenerator();
      const uint64_t seed = given.current_seed() * 0x9e3779b97f4a7c15u + given.get_offset();
      given.set_offset(given.get_offset() + 4);
      return at::make_generator<at::CPUGeneratorImpl>(seed);
    }
    return value;
  }

  at::Tensor on_device(const at::Tensor& t) {
    for (const auto& [given, host] : tensors_)
      if (host.is_same(t)) return given;
    if (!t.defined() || !t.is_cpu()) return t;
    if (t.layout() != at::kStrided || t.is_nested()) return t.to(device_);
    const c10::cuda::OptionalCUDAGuard guard(device_);
    const auto options = t.options().device(device_);
    at::Tensor made =
        t.is_non_overlapping_and_dense() ? at::empty_strided(t.sizes(), t.strides(), options) : at::empty(t.sizes(), options);
    const at::Tensor to = alias_of(made);
    stand_in::run_now(c10::cuda::getCurrentCUDAStream(), [&] { to.copy_(t); });
    return made;
  }

  c10::IValue on_device(const c10::IValue& value) {
    if (value.isTensor()) return on_device(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(on_device(t));
    return list;
  }

  c10::OperatorHandle op_;
  Stack arguments_, results_;
  c10::Device device_{at::kCUDA, 0};
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_, resized_;  // as given, and on the host
};

bool makes_tensors(const c10::FunctionSchema& schema) {
  for (const c10::Argument& result : schema.returns())
    if (!result.alias_info()) return true;
  return false;
}

/// Whether torch's kernel waits for the GPU: what it returns, or the size of that, is not known before.
bool waits(const c10::FunctionSchema& schema, const Stack& arguments) {
  static const std::set<std::string> names = {"aten::nonzero",    "aten::masked_select",      "aten::_unique2",
                                              "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"};
  if (names.count(schema.name())) return true;
  for (const c10::Argument& result : schema.returns()) {
    const auto kind = result.type()->kind();
    if (kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType && kind != c10::TypeKind::TupleType) return true;
  }
  if (schema.name().starts_with("aten::index"))
    for (const c10::IValue& argument : arguments)
      if (argument.isOptionalTensorList())
        for (const auto& t : argument.toOptionalTensorVector())
          if (t && t->defined() && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) return true;
  return false;
}

c10::Device device_of(const Stack& stack, size_t count) {
  for (size_t k = stack.size() - count; k < stack.size(); ++k)
    if (stack[k].isTensor() && stack[k].toTensor().defined() && stack[k].toTensor().is_cuda())
      return stack[k].toTensor().device();
  return {at::kCUDA, c10::cuda::current_device()};
}

void on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size();
  const c10::cuda::CUDAGuard guard(device_of(*stack, count));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (waits(schema, torch::jit::last(*stack, count).vec())) c10::cuda::warn_or_error_on_sync();
  const auto call = std::make_shared<HostCall>(op, *stack, count);
  if (stand_in::busy(stream) && !makes_tensors(schema)) {
    // What it writes is known; the size of what it would make is not.
    stand_in::submit(stream, [call] { call->run(); });
    Stack written;
    for (size_t k = 0; k < count; ++k)
      if (const auto* alias = schema.arguments()[k].alias_info(); alias && alias->isWrite())
        written.push_back(torch::jit::peek(*stack, k, count));
    written.resize(schema.returns().size());  // some ops return nothing
    torch::jit::drop(*stack, count);
    stack->insert(stack->end(), written.begin(), written.end());
    return;
  }
  stand_in::run_now(stream, [&] { call->run(); });
  torch::jit::drop(*stack, count);
  call->finish(*stack);
}

/// Torch's own between the host and a GPU, and where it needs no kernel.
void copy(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  at::Tensor to = torch::jit::peek(*stack, 0, 3).toTensor();
  const at::Tensor from = torch::jit::peek(*stack, 1, 3).toTensor();
  const bool same_bytes = to.scalar_type() == from.scalar_type() && to.is_contiguous() && from.is_contiguous() &&
                          to.is_neg() == from.is_neg() && to.is_conj() == from.is_conj();
  const bool needs_kernel = to.is_cuda() && from.is_cuda() && to.numel() > 0 && !(same_bytes && to.sizes() == from.sizes());
  if (needs_kernel) return on_host(op, keys, stack);
  at::native::copy_(to, from, torch::jit::peek(*stack, 2, 3).toBool());
  torch::jit::drop(*stack, 3);
  stack->push_back(to);
}

bool is_view(const c10::FunctionSchema& schema) {
  for (const c10::Argument& result : schema.returns())
    if (result.alias_info() && !result.alias_info()->isWrite()) return true;
  return false;
}

// What torch does on the host.
const std::set<std::string> kKept = {"aten::empty",     "aten::empty_strided",       "aten::set_",          "aten::resize_",
                                     "aten::is_set_to", "aten::_local_scalar_dense", "aten::copy_",         "aten::_pin_memory",
                                     "aten::is_pinned", "aten::record_stream",       "aten::_record_stream"};
// What has one kernel for all devices, which on CUDA takes its libraries.
const std::set<std::string> kAdded = {"aten::convolution", "aten::convolution_overrideable"};

struct Registered {
  torch::Library library{torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__};
  Registered() {
    // That kernels are replaced is what this is for.
    struct Quiet : c10::WarningHandler {
      void process(const c10::Warning&) override {}
    } quiet;
    const c10::WarningUtils::WarningHandlerGuard no_warnings(&quiet);
    for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
      if (!name.name.starts_with("aten::") || kKept.count(name.name)) continue;
      const auto op = c10::Dispatcher::singleton().findOp(name);
      if (!op || !op->hasSchema() || is_view(op->schema())) continue;
      if (!op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) && !kAdded.count(name.name)) continue;
      const std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_host>());
    }
    library.impl("aten::copy_", torch::CppFunction::makeFromBoxedFunction<&copy>());
  }
};
const Registered registered;

}  // namespace
