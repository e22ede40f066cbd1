// Maxout above its kernels: schemas, Meta, autograd. Saved for the backward: a byte per result. The backward is linear in dy,
// and where it must be differentiated it is made of torch ops that are.
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "maxout_ops.h"
#include "node_ptr.h"

namespace fastact {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

TORCH_LIBRARY_FRAGMENT(fastact, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("maxout(Tensor x, int pieces, int dim) -> (Tensor, Tensor)", tags);
  m.def("maxout_backward(Tensor dy, Tensor index, int pieces, int dim) -> Tensor", tags);
}

const auto& maxout_op() {
  static const auto handle = find_op<MaxoutOp>("maxout");
  return handle;
}
const auto& maxout_backward_op() {
  static const auto handle = find_op<MaxoutBackwardOp>("maxout_backward");
  return handle;
}

// ---- Meta
// --------------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> maxout_meta(const Tensor& x_, int64_t pieces, int64_t dim) {
  dtype_of("maxout", x_);
  dim = check_maxout(x_, pieces, dim);
  const Tensor x = laid_out(x_, dim);
  return {resized_as(x, pieces, dim, false, x.scalar_type()), resized_as(x, pieces, dim, false, at::kByte)};
}

Tensor maxout_backward_meta(const Tensor& dy, const Tensor& index, int64_t pieces, int64_t dim) {
  dtype_of("maxout", dy);
  dim = check_maxout_backward(dy, index, pieces, dim);
  return resized_as(laid_out(index, dim), pieces, dim, true, dy.scalar_type());
}

TORCH_LIBRARY_IMPL(fastact, Meta, m) {
  m.impl("maxout", TORCH_FN(maxout_meta));
  m.impl("maxout_backward", TORCH_FN(maxout_backward_meta));
}

// ---- As torch ops
// ------------------------------------------------------------------------------------------------------------

Tensor in_groups(const Tensor& x, int64_t pieces, int64_t dim) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes[size_t(dim)] = sizes[size_t(dim)] / pieces;
  sizes.insert(sizes.begin() + dim + 1, c10::SymInt(pieces));
  return x.reshape_symint(sizes);
}
Tensor places(const Tensor& index, int64_t dim) { return index.unsqueeze(dim + 1).to(at::kLong); }

/// The elements of x that the index names.
Tensor picked(const Tensor& x, const Tensor& index, int64_t pieces, int64_t dim) {
  return in_groups(x, pieces, dim).gather(dim + 1, places(index, dim)).squeeze(dim + 1);
}

std::tuple<Tensor, Tensor> maxout_formula(const Tensor& x, int64_t pieces, int64_t dim) {
  dim = check_maxout(x, pieces, dim);
  const auto [y, index] = in_groups(x, pieces, dim).max(dim + 1);
  return {y, index.to(at::kByte)};
}

Tensor maxout_backward_formula(const Tensor& dy, const Tensor& index, int64_t pieces, int64_t dim) {
  dim = check_maxout_backward(dy, index, pieces, dim);
  std::vector<Tensor> slices;
  for (int64_t p = 0; p < pieces; ++p) slices.push_back(at::where(index.eq(p), dy, at::zeros({}, dy.options())));
  c10::SymDimVector sizes(dy.sym_sizes().begin(), dy.sym_sizes().end());
  sizes[size_t(dim)] = sizes[size_t(dim)] * pieces;
  return at::stack(slices, dim + 1).reshape_symint(sizes);
}

TORCH_LIBRARY_IMPL(fastact, FuncTorchBatched, m) {
  m.impl("maxout", TORCH_FN(maxout_formula));
  m.impl("maxout_backward", TORCH_FN(maxout_backward_formula));
}

// ---- Autograd
// ----------------------------------------------------------------------------------------------------------------

struct MaxoutNode : torch::autograd::TraceableFunction {
  int64_t pieces, dim;
  SavedVariable index;

  MaxoutNode(int64_t pieces_, int64_t dim_) : pieces(pieces_), dim(dim_) {}
  std::string name() const override { return "MaxoutBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    index.reset_data();
  }
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined() || !task_should_compute_output(0)) return {Tensor()};
    return {maxout_backward_op().call(grads[0], index.unpack(), pieces, dim)};
  }
};

std::tuple<Tensor, Tensor> maxout_autograd(c10::DispatchKeySet keys, const Tensor& x, int64_t pieces, int64_t dim) {
  const bool tangent = torch::autograd::isFwGradDefined(x), gradient = torch::autograd::compute_requires_grad(x);
  const auto below = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return maxout_op().redispatch(keys & c10::after_autograd_keyset, x, pieces, dim);
  };
  auto [y, index] = below();
  if (gradient) {
    const auto node = make_node<MaxoutNode>(pieces, dim);
    node->set_next_edges(torch::autograd::collect_next_edges(x));
    node->index = SavedVariable(index, false);
    torch::autograd::set_history(y, node);
  }
  if (tangent) y._set_fw_grad(picked(x._fw_grad(0), index, pieces, at::maybe_wrap_dim(dim, x.dim())), 0, false);
  return {y, index};
}

Tensor maxout_backward_autograd(c10::DispatchKeySet keys, const Tensor& dy, const Tensor& index, int64_t pieces, int64_t dim) {
  if (torch::autograd::isFwGradDefined(dy) || torch::autograd::compute_requires_grad(dy))
    return maxout_backward_formula(dy, index, pieces, dim);
  return maxout_backward_op().redispatch(keys & c10::after_autograd_keyset, dy, index, pieces, dim);
}

TORCH_LIBRARY_IMPL(fastact, Autograd, m) {
  m.impl("maxout", TORCH_FN(maxout_autograd));
  m.impl("maxout_backward", TORCH_FN(maxout_backward_autograd));
}

}  // namespace
}  // namespace fastact
