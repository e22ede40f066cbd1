// Activations with parameters per channel above their kernels: schemas, Meta, and autograd in the shape of torch's generated
// code. Derivatives of higher order, forward mode and vmap are torch ops: the functor's formula, evaluated on tensors.
#include <ATen/OpMathType.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "channel_ops.h"
#include "node_ptr.h"
#include "tensor_lane.h"

namespace fastact {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---- Schemas; Meta
// -----------------------------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fastact, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  for (const ChannelRow& row : kChannelRows) {
    const std::string name = row.name, count = std::to_string(1 + row.arity());
    std::string parameters, wanted = "True", results = "Tensor";
    for (int k = 0; k < row.arity(); ++k) {
      parameters += std::string(", Tensor ") + row.parameters[k];
      wanted += ", True";
      results += ", Tensor";
    }
    m.def((name + "(Tensor x" + parameters + ") -> Tensor").c_str(), tags);
    m.def((name + "_backward(Tensor dy, Tensor x" + parameters + ", bool[" + count + "] wanted=[" + wanted + "]) -> (" +
           results + ")")
              .c_str(),
          tags);
  }
}

template <class... P>
struct ForwardMeta {
  int row;
  Tensor operator()(const Tensor& x, P... p) const {
    dtype_of(kChannelRows[row].name, x);
    check_channels(row, x, {p...});
    return at::empty_like(x);
  }
};

template <class... P>
struct BackwardMeta {
  int row;
  Gradients<P...> operator()(const Tensor& dy, const Tensor& x, P... p, Wanted<P...> wanted) const {
    check_backward(kChannelRows[row].name, dy, x);
    dtype_of(kChannelRows[row].name, dy);
    check_channels(row, x, {p...});
    const Tensor inputs[] = {leading(dy, x), p...};
    Tensor gradients[1 + sizeof...(P)];
    for (size_t k = 0; k < wanted.size(); ++k)
      if (wanted[k]) gradients[k] = at::empty_like(inputs[k]);
    return as_tuple<P...>(gradients);
  }
};

TORCH_LIBRARY_IMPL(fastact, Meta, m) { register_channel_rows<ForwardMeta, BackwardMeta>(m); }

// ---- The formulas on tensors
// -------------------------------------------------------------------------------------------------

/// A parameter, or its tangent, with a shape that broadcasts over x.
Tensor broadcastable(const Tensor& p, const Tensor& x) {
  if (p.sym_numel() == 1) return p.reshape({});
  std::vector<c10::SymInt> shape(size_t(x.dim()), 1);
  if (x.dim() > 1) shape[1] = p.sym_numel();
  return p.reshape_symint(shape);
}

/// The sum of an elementwise term over all that shares an element of the parameter.
Tensor sum_as(const Tensor& term, const Tensor& parameter) {
  if (parameter.sym_numel() == 1) return term.sum().reshape_symint(parameter.sym_sizes());
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < term.dim(); ++d)
    if (d != 1) dims.push_back(d);
  return (dims.empty() ? term : term.sum(dims)).reshape_symint(parameter.sym_sizes());
}

Tensor tangent_of(const Tensor& x) { return x.defined() ? x._fw_grad(0) : x; }

/// y, or where tangents of x and the parameters are given, that of y.
template <template <class> class Functor>
Tensor formula(const Tensor& x, Tensors parameters, Tensors tangents) {
  constexpr int K = Functor<double>::parameters;
  const auto type = at::toOpMathType(x.scalar_type());
  const auto lane = [&](const Tensor& t, const Tensor& tangent, const auto& shaped) {
    return TensorLane(Term{shaped(t).to(type)}, tangent.defined() ? Term{shaped(tangent).to(type)} : Term{});
  };
  const auto itself = [](const Tensor& t) { return t; };
  const auto broadcast = [&](const Tensor& t) { return broadcastable(t, x); };
  std::vector<TensorLane> p;
  for (int k = 0; k < K; ++k) p.push_back(lane(parameters[k], tangents.empty() ? Tensor() : tangents[1 + k], broadcast));
  const TensorLane y = Functor<TensorLane>(p.data()).forward(lane(x, tangents.empty() ? Tensor() : tangents[0], itself));
  const Tensor& result = tangents.empty() ? y.value.tensor : y.tangent.tensor;
  return result.to(x.scalar_type());
}

/// The gradients of x and the parameters, as torch ops that are differentiable themselves.
template <template <class> class Functor>
void gradient_formula(const Tensor& dy, const Tensor& x, Tensors parameters, const bool* wanted, Tensor* gradients) {
  constexpr int K = Functor<double>::parameters;
  const auto type = at::toOpMathType(x.scalar_type());
  std::vector<TensorLane> p;
  for (int k = 0; k < K; ++k) p.push_back({Term{broadcastable(parameters[k], x).to(type)}, Term{}});
  std::vector<TensorLane> terms(K, TensorLane(0));
  const TensorLane dx =
      Functor<TensorLane>(p.data()).backward({Term{dy.to(type)}, Term{}}, {Term{x.to(type)}, Term{}}, terms.data());
  if (wanted[0]) gradients[0] = dx.value.tensor.to(x.scalar_type());
  for (int k = 0; k < K; ++k)
    if (wanted[1 + k]) gradients[1 + k] = sum_as(terms[size_t(k)].value.tensor, parameters[k]).to(parameters[k].scalar_type());
}

struct Formulas {
  Tensor (*forward)(const Tensor&, Tensors, Tensors);
  void (*backward)(const Tensor&, const Tensor&, Tensors, const bool*, Tensor*);
};
#define FASTACT_FORMULAS(name, Functor, ...) Formulas{formula<generic::Functor>, gradient_formula<generic::Functor>},
constexpr Formulas kFormulas[] = {FASTACT_CHANNEL_ACTIVATIONS(FASTACT_FORMULAS)};
#undef FASTACT_FORMULAS

template <class... P>
struct ForwardFormula {
  int row;
  Tensor operator()(const Tensor& x, P... p) const {
    check_channels(row, x, {p...});
    return kFormulas[row].forward(x, {p...}, {});
  }
};

template <class... P>
struct BackwardFormula {
  int row;
  Gradients<P...> operator()(const Tensor& dy, const Tensor& x, P... p, Wanted<P...> wanted) const {
    check_backward(kChannelRows[row].name, dy, x);
    check_channels(row, x, {p...});
    Tensor gradients[1 + sizeof...(P)];
    kFormulas[row].backward(dy, x, {p...}, wanted.data(), gradients);
    return as_tuple<P...>(gradients);
  }
};

// Tensors in vmap: the shapes seen here are those without the batch, and each torch op has a rule of its own.
TORCH_LIBRARY_IMPL(fastact, FuncTorchBatched, m) { register_channel_rows<ForwardFormula, BackwardFormula>(m); }

// ---- Autograd
// ----------------------------------------------------------------------------------------------------------------

/// The handles of one kind of op for all rows that have as many parameters as P; looked up once.
template <class Signature>
const auto& channel_op(int row, int arity, const char* suffix) {
  static const auto handles =
      find_ops<Signature>(kChannelRows, suffix, [&](const ChannelRow& r) { return r.arity() == arity; });
  return *handles[row];
}
template <class... P>
const auto& forward_op(int row) {
  return channel_op<ChannelOp<P...>>(row, sizeof...(P), "");
}
template <class... P>
const auto& backward_op(int row) {
  return channel_op<ChannelBackwardOp<P...>>(row, sizeof...(P), "_backward");
}

template <class... P>
struct ChannelNode : torch::autograd::TraceableFunction {
  int row;
  SavedVariable x, parameters[sizeof...(P)];

  explicit ChannelNode(int row_) : row(row_) {}
  std::string name() const override { return std::string(kChannelRows[row].functor) + "Backward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    for (SavedVariable& p : parameters) p.reset_data();
  }
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    constexpr size_t n = 1 + sizeof...(P);
    Wanted<P...> wanted;
    for (size_t k = 0; k < n; ++k) wanted[k] = task_should_compute_output(k);
    if (!grads[0].defined()) return variable_list(n);
    return [&]<size_t... i>(std::index_sequence<i...>) {
      Gradients<P...> all = backward_op<P...>(row).call(grads[0], x.unpack(), parameters[i].unpack()..., wanted);
      return std::apply([](auto&... each) { return variable_list{each...}; }, all);
    }(std::index_sequence_for<P...>());
  }
};

template <class... T>
bool dual(const T&... tensors) {
  return (torch::autograd::isFwGradDefined(tensors) || ...);
}

template <class... P>
struct ForwardAutograd {
  int row;
  Tensor operator()(c10::DispatchKeySet keys, const Tensor& x, P... p) const {
    const auto redispatch = [&] { return forward_op<P...>(row).redispatch(keys & c10::after_autograd_keyset, x, p...); };
    const bool tangents = dual(x, p...), gradients = torch::autograd::compute_requires_grad(x, p...);
    if (!tangents && !gradients) return redispatch();

    decltype(make_node<ChannelNode<P...>>(row)) node;
    if (gradients) {
      node = make_node<ChannelNode<P...>>(row);
      node->set_next_edges(torch::autograd::collect_next_edges(x, p...));
      node->x = SavedVariable(x, false);
      [&]<size_t... i>(std::index_sequence<i...>) {
        ((node->parameters[i] = SavedVariable(p, false)), ...);
      }(std::index_sequence_for<P...>());
    }
    const Tensor y = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return redispatch();
    }();
    if (node) torch::autograd::set_history(y, node);
    if (tangents)
      y._set_fw_grad(kFormulas[row].forward(x._fw_primal(0), {p._fw_primal(0)...}, {tangent_of(x), tangent_of(p)...}), 0,
                     false);
    return y;
  }
};

/// Where the gradients must be differentiable, they are made of torch ops that are.
template <class... P>
struct BackwardAutograd {
  int row;
  Gradients<P...> operator()(c10::DispatchKeySet keys, const Tensor& dy, const Tensor& x, P... p, Wanted<P...> wanted) const {
    if (dual(dy, x, p...) || torch::autograd::compute_requires_grad(dy, x, p...))
      return BackwardFormula<P...>{row}(dy, x, p..., wanted);
    return backward_op<P...>(row).redispatch(keys & c10::after_autograd_keyset, dy, x, p..., wanted);
  }
};

TORCH_LIBRARY_IMPL(fastact, Autograd, m) { register_channel_rows<ForwardAutograd, BackwardAutograd>(m); }

}  // namespace
}  // namespace fastact
