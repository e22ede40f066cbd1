// Autograd, in the shape of torch's generated code: a node for every forward op and one for every backward op, forward mode
// beside reverse mode. Both kinds serve every row, of activations.h and of softmax.h; what tells these apart is in Call.
#include "autograd.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include "cpu.h"
#include "node_ptr.h"
#include "rows.h"
#include "tensor_lane.h"
#include "watch.h"

namespace fastact {
namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// d backward(dy, saved) / d saved, elementwise; undefined where it is zero everywhere.
template <template <class> class Functor>
Tensor derivative(const Tensor& dy, const Tensor& saved, const double* parameters) {
  // 16-bit types compute in float, as the kernels do.
  const auto type = at::toOpMathType(saved.scalar_type());
  const Functor<TensorLane> f(parameters);
  const TensorLane dx = f.backward({Term{dy.to(type)}, Term{}}, {Term{saved.to(type)}, Term{{}, 1}});
  if (dx.tangent.tensor.defined()) return dx.tangent.tensor.to(saved.scalar_type());
  return dx.tangent.is(0) ? Tensor() : at::full_like(saved, dx.tangent.constant);
}

using Derivative = Tensor (*)(const Tensor&, const Tensor&, const double*);
#define FASTACT_DERIVATIVE(name, Functor, ...) derivative<generic::Functor>,
constexpr Derivative kDerivatives[] = {FASTACT_ACTIVATIONS(FASTACT_DERIVATIVE)};
#undef FASTACT_DERIVATIVE

/// The backward of a row of softmax.h on tensors that carry tangents: what its kernels do not compute follows from its functor.
/// 16-bit types compute in float here too.
template <template <class> class Functor>
struct RowFormula {
  const Functor<TensorLane> f;
  const int64_t dim;
  const at::ScalarType result;
  const Tensor dy, y;
  const Term dot;

  RowFormula(const Tensor& dy_, const Tensor& y_, int64_t dim_, const SoftmaxOptions& options)
      : f(options), dim(dim_), result(y_.scalar_type()), dy(wide(dy_)), y(wide(y_)), dot(sum(f.product(of(dy), of(y)).value)) {}

  static Tensor wide(const Tensor& t) { return t.to(at::toOpMathType(t.scalar_type())); }
  static TensorLane of(const Tensor& value, Term tangent = {}) { return {Term{value}, std::move(tangent)}; }
  /// Of a constant only 0 occurs.
  Term sum(const Term& t) const { return t.tensor.defined() ? Term{t.tensor.sum(dim, true)} : t; }
  Tensor narrow(const Term& t) const {
    return t.tensor.defined() ? t.tensor.to(result)
           : t.is(0)          ? Tensor()
                              : at::full_like(y, t.constant, y.options().dtype(result));
  }

  /// Tangent of dx for tangents of dy and y.
  Tensor tangent(const Term& dy_tangent, const Term& y_tangent) const {
    const TensorLane a = of(dy, dy_tangent), b = of(y, y_tangent);
    return narrow(f.backward(a, b, {dot, sum(f.product(a, b).tangent)}).tangent);
  }
  /// Gradient of <ddx, dx> with respect to dy or y, whichever has the tangent 1.
  Tensor gradient(const Tensor& ddx_, const Term& dy_tangent, const Term& y_tangent) const {
    const Term ddx{wide(ddx_)};
    const TensorLane a = of(dy, dy_tangent), b = of(y, y_tangent);
    const Term through_dot = sum(ddx * f.backward(of(dy), of(y), {dot, Term{{}, 1}}).tangent);
    return narrow(ddx * f.backward(a, b, {dot, Term{}}).tangent + f.product(a, b).tangent * through_dot);
  }
};

struct RowDerivatives {
  bool symmetric;
  Tensor (*dy_gradient)(const Tensor& ddx, const Tensor& y, int64_t dim, const SoftmaxOptions&);
  Tensor (*y_gradient)(const Tensor& ddx, const Tensor& dy, const Tensor& y, int64_t dim, const SoftmaxOptions&);
  Tensor (*y_tangent)(const Tensor& t, const Tensor& dy, const Tensor& y, int64_t dim, const SoftmaxOptions&);
};

template <template <class> class Functor>
constexpr RowDerivatives row_derivatives() {
  using Formula = RowFormula<Functor>;
  using Options = SoftmaxOptions;
  // dx is linear in dy, so that any dy will do for the first.
  return {Functor<double>::symmetric,
          [](const Tensor& ddx, const Tensor& y, int64_t dim, const Options& o) {
            return Formula(ddx, y, dim, o).gradient(ddx, Term{{}, 1}, Term{});
          },
          [](const Tensor& ddx, const Tensor& dy, const Tensor& y, int64_t dim, const Options& o) {
            return Formula(dy, y, dim, o).gradient(ddx, Term{}, Term{{}, 1});
          },
          [](const Tensor& t, const Tensor& dy, const Tensor& y, int64_t dim, const Options& o) {
            return Formula(dy, y, dim, o).tangent(Term{}, Term{Formula::wide(t)});
          }};
}
#define FASTACT_ROW_DERIVATIVES(name, Functor) row_derivatives<generic::Functor>(),
constexpr RowDerivatives kRowDerivatives[] = {FASTACT_SOFTMAXES(FASTACT_ROW_DERIVATIVES)};
#undef FASTACT_ROW_DERIVATIVES

/// One activation with its parameters: what the nodes need to know of it. `dx` below is backward(dy, saved).
struct Call {
  int row;  // of activations.h; along a dim, of softmax.h
  double parameters[kMaxParameters] = {};
  bool along_dim = false;
  int64_t dim = 0;
  SoftmaxOptions options = {};

  std::string name() const { return along_dim ? kSoftmaxes[row].functor : kRows[row].functor; }
  bool saves_input() const { return !along_dim && kRows[row].saves_input(parameters); }

  Tensor backward(const Tensor& dy, const Tensor& saved) const {
    if (along_dim) return call_softmax_backward_op(row, dy, saved, dim, options);
    return with_arity(kRows[row].arity(), [&]<class... P>() {
      return spread<P...>(parameters, [&](P... p) { return backward_op<P...>(row).call(dy, saved, p...); });
    });
  }

  /// Without the dispatcher: for plain() tensors.
  Tensor cpu_backward(Tensor&& dy, const Tensor& saved) const {
    if (along_dim) return cpu_softmax_backward(row, std::move(dy), saved, dim, options);
    return fastact::cpu_backward(row, std::move(dy), saved, parameters);
  }

  /// Tangent of the output for a tangent of the input; and gradient of <t, dx> with respect to dy, which is the same. Where the
  /// Jacobian is symmetric, the backward.
  Tensor tangent(const Tensor& t, const Tensor& saved) const {
    if (along_dim && !kRowDerivatives[row].symmetric) return kRowDerivatives[row].dy_gradient(t, saved, dim, options);
    return backward(t, saved);
  }

  /// Gradient of <ddx, dx> with respect to the saved tensor; undefined where it is zero.
  Tensor saved_gradient(const Tensor& ddx, const Tensor& dy, const Tensor& saved) const {
    if (along_dim) return kRowDerivatives[row].y_gradient(ddx, dy, saved, dim, options);
    const Tensor d = kDerivatives[row](dy, saved, parameters);
    return d.defined() ? ddx * d : d;
  }

  /// Tangent of dx for a tangent of the saved tensor; undefined where it is zero.
  Tensor saved_tangent(const Tensor& t, const Tensor& dy, const Tensor& saved) const {
    if (along_dim) return kRowDerivatives[row].y_tangent(t, dy, saved, dim, options);
    return saved_gradient(t, dy, saved);
  }
};

template <class... P>
Call call_of(int row, P... p) {
  return {row, {p...}};
}
template <class... P>
Call call_along(int row, int64_t dim, P... p) {
  return {row, {}, true, dim, {p...}};
}

struct BackwardNode : torch::autograd::TraceableFunction {
  Call activation;
  SavedVariable dy, saved;

  explicit BackwardNode(const Call& c) : activation(c) {}
  std::string name() const override { return activation.name() + "BackwardBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    dy.reset_data();
    saved.reset_data();
  }
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& ddx = grads[0];
    variable_list result(2);
    if (!ddx.defined()) return result;
    const Tensor s = saved.unpack();
    if (task_should_compute_output(0)) result[0] = activation.tangent(ddx, s);
    if (task_should_compute_output(1)) result[1] = activation.saved_gradient(ddx, dy.unpack(), s);
    return result;
  }
};

/// Whether backward(dy, saved) is a matter of the CPU kernel alone.
bool unseen(const Tensor& dy, const Tensor& saved) {
  return !at::GradMode::is_enabled() && plain(dy) && plain(saved) && !torch::autograd::isFwGradDefined(dy) &&
         !torch::autograd::isFwGradDefined(saved);
}

struct ForwardNode : torch::autograd::TraceableFunction {
  Call activation;
  bool output_saved = true;
  SavedVariable saved;
  watch::Layers watched;  // where monitors count the gradients

  explicit ForwardNode(const Call& c) : activation(c) {}
  std::string name() const override { return activation.name() + "Backward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    saved.reset_data();
  }
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined() || !task_should_compute_output(0)) return {Tensor()};
    const Tensor s = output_saved ? saved.unpack(self()) : saved.unpack();
    const watch::Backward seen(watched);
    if (unseen(grads[0], s)) return {activation.cpu_backward(std::move(grads[0]), s)};
    return {activation.backward(grads[0], s)};
  }

 private:
  NodePtr self() {
    if constexpr (kSharedNodes)
      return owner(this);
    else
      return getptr();
  }
  // A template, so that only the torch versions that have shared_from_this look for it.
  template <class N>
  static NodePtr owner(N* node) {
    return node->shared_from_this();
  }
};

/// A node whose next edge leads to x (and y), or null where no gradient is wanted.
template <class N, class... Tensors>
auto node_for(const Call& call, const Tensors&... inputs) {
  decltype(make_node<N>(call)) node;
  if (torch::autograd::compute_requires_grad(inputs...)) {
    node = make_node<N>(call);
    node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  }
  return node;
}

Tensor tangent_of(const Tensor& x) { return x._fw_grad(0); }

/// redispatch() computes y below autograd.
template <class Redispatch>
Tensor forward(const Call& call, const Tensor& x, const Redispatch& redispatch) {
  const bool dual = torch::autograd::isFwGradDefined(x);
  if (!dual && !torch::autograd::compute_requires_grad(x)) return redispatch();

  const auto node = node_for<ForwardNode>(call, x);
  const Tensor y = [&] {
    const watch::Noting watched(node ? &node->watched : nullptr);
    at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch();
  }();
  if (node) torch::autograd::set_history(y, node);
  if (dual) y._set_fw_grad(call.tangent(tangent_of(x), call.saves_input() ? x._fw_primal(0) : y), 0, false);
  if (node) {  // after the tangent is set, which a saved output keeps
    node->output_saved = !call.saves_input();
    node->saved = SavedVariable(node->output_saved ? y : x, node->output_saved);
  }
  return y;
}

template <class Redispatch>
Tensor backward(const Call& call, const Tensor& dy, const Tensor& saved, const Redispatch& redispatch) {
  const bool dual = torch::autograd::isFwGradDefined(dy) || torch::autograd::isFwGradDefined(saved);
  if (!dual && !torch::autograd::compute_requires_grad(dy, saved)) return redispatch();

  const auto node = node_for<BackwardNode>(call, dy, saved);
  if (node) {
    node->dy = SavedVariable(dy, false);
    node->saved = SavedVariable(saved, false);
  }
  const Tensor dx = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return redispatch();
  }();
  if (node) torch::autograd::set_history(dx, node);
  if (dual) {
    const Tensor dy_primal = dy._fw_primal(0), saved_primal = saved._fw_primal(0);
    Tensor tangent;
    const auto add = [&](Tensor part) {
      if (part.defined()) tangent = tangent.defined() ? tangent + part : part;
    };
    if (tangent_of(dy).defined()) add(call.backward(tangent_of(dy), saved_primal));
    if (tangent_of(saved).defined()) add(call.saved_tangent(tangent_of(saved), dy_primal, saved_primal));
    if (tangent.defined()) dx._set_fw_grad(tangent, 0, false);
  }
  return dx;
}

template <class... P>
struct ForwardAutograd {
  int row;
  Tensor operator()(c10::DispatchKeySet keys, const Tensor& x, P... p) const {
    return forward(call_of(row, p...), x,
                   [&] { return forward_op<P...>(row).redispatch(keys & c10::after_autograd_keyset, x, p...); });
  }
};

template <class... P>
struct BackwardAutograd {
  int row;
  Tensor operator()(c10::DispatchKeySet keys, const Tensor& dy, const Tensor& saved, P... p) const {
    return backward(call_of(row, p...), dy, saved,
                    [&] { return backward_op<P...>(row).redispatch(keys & c10::after_autograd_keyset, dy, saved, p...); });
  }
};

template <class... P>
struct InplaceAutograd {
  int row;
  void operator()(c10::DispatchKeySet keys, const Tensor& x, P... p) const {
    const Call call = call_of(row, p...);
    const bool requires_grad = torch::autograd::compute_requires_grad(x);
    torch::autograd::check_inplace(x, requires_grad);
    const Tensor tangent = tangent_of(x);
    const auto node = node_for<ForwardNode>(call, x);
    // What the derivative is taken from, where the result does not tell it: a copy, whose own derivative leads to x.
    const Tensor input = (node || tangent.defined()) && call.saves_input() ? x.clone() : Tensor();
    {
      const watch::Noting watched(node ? &node->watched : nullptr);
      at::AutoDispatchBelowAutograd guard;
      inplace_op<P...>(row).redispatch(keys & c10::after_autograd_keyset, x, p...);
    }
    if (node) torch::autograd::rebase_history(x, node);
    // The tangent is modified in place too: others may hold it.
    if (tangent.defined())
      x._set_fw_grad(tangent.copy_(call.backward(tangent, (input.defined() ? input : x)._fw_primal(0))), 0, true);
    if (node) {
      node->output_saved = !input.defined();
      node->saved = input.defined() ? SavedVariable(input, false) : SavedVariable(x, true, x.is_view());
    }
  }
};

template <class... P>
struct InplaceVersion {
  int row;
  void operator()(c10::DispatchKeySet keys, const Tensor& x, P... p) const {
    // An inference tensor has no version: outside inference mode it is refused here, before anything is written.
    if (x.is_inference()) torch::autograd::increment_version(x);
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      inplace_op<P...>(row).redispatch(keys & c10::after_ADInplaceOrView_keyset, x, p...);
    }
    if (!x.is_inference()) torch::autograd::increment_version(x);
  }
};

template <class... P>
struct SoftmaxAutograd {
  int row;
  Tensor operator()(c10::DispatchKeySet keys, const Tensor& x, int64_t dim, P... p) const {
    return forward(call_along(row, dim, p...), x,
                   [&] { return softmax_op<P...>(row).redispatch(keys & c10::after_autograd_keyset, x, dim, p...); });
  }
};

template <class... P>
struct SoftmaxBackwardAutograd {
  int row;
  Tensor operator()(c10::DispatchKeySet keys, const Tensor& dy, const Tensor& y, int64_t dim, P... p) const {
    return backward(call_along(row, dim, p...), dy, y, [&] {
      return softmax_backward_op<P...>(row).redispatch(keys & c10::after_autograd_keyset, dy, y, dim, p...);
    });
  }
};

template <class F>
void each_row(const F& f) {
  for (int row = 0; row < kRowCount; ++row)
    with_arity(kRows[row].arity(), [&]<class... P>() { f.template operator()<P...>(row, std::string(kRows[row].name)); });
}

TORCH_LIBRARY_IMPL(fastact, Autograd, m) {
  each_row([&]<class... P>(int row, const std::string& name) {
    m.impl(name.c_str(), ForwardAutograd<P...>{row});
    m.impl((name + "_").c_str(), InplaceAutograd<P...>{row});
    m.impl((name + "_backward").c_str(), BackwardAutograd<P...>{row});
  });
  register_softmaxes<SoftmaxAutograd, SoftmaxBackwardAutograd>(m);
}

TORCH_LIBRARY_IMPL(fastact, ADInplaceOrView, m) {
  each_row([&]<class... P>(int row, const std::string& name) { m.impl((name + "_").c_str(), InplaceVersion<P...>{row}); });
}

}  // namespace

bool untracked(const Tensor& x) {
  return !x.unsafeGetTensorImpl()->autograd_meta() ||
         !(torch::autograd::compute_requires_grad(x) || torch::autograd::isFwGradDefined(x));
}

}  // namespace fastact
