// The rows of activations.h as data, and the ops that are made of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <utility>

#include "../activations.h"
#include "../kernels.h"

namespace fastact {

#define FASTACT_ROW(name, Functor, ...) \
  Row{#name, #Functor, {__VA_ARGS__}, generic::Functor<double>::costly, generic::Functor<double>::saves_input},
static constexpr Row kRows[] = {FASTACT_ACTIVATIONS(FASTACT_ROW)};
#undef FASTACT_ROW
static constexpr int kRowCount = sizeof(kRows) / sizeof(kRows[0]);
static_assert(kRowCount <= kMaxRows, "raise kMaxRows");

/// Calls f with one double (as a type) per float parameter of the row: f.operator()<double, double>() for two.
template <class F>
auto with_arity(int arity, F&& f) {
  static_assert(kMaxParameters == 2, "one case per number of parameters");
  switch (arity) {
    case 0:
      return f.template operator()<>();
    case 1:
      return f.template operator()<double>();
    default:
      return f.template operator()<double, double>();
  }
}

/// Calls f(parameters[0], parameters[1], ...) with as many as there are types in P.
template <class... P, class F>
decltype(auto) spread(const double* parameters, F&& f) {
  return [&]<size_t... i>(std::index_sequence<i...>) -> decltype(auto) {
    return f(static_cast<P>(parameters[i])...);
  }(std::index_sequence_for<P...>());
}

template <class... P>
using ForwardOp = at::Tensor(const at::Tensor&, P...);
template <class... P>
using BackwardOp = at::Tensor(const at::Tensor&, const at::Tensor&, P...);
template <class... P>
using InplaceOp = void(const at::Tensor&, P...);

using SoftmaxOp = at::Tensor(const at::Tensor&, int64_t);
using SoftmaxBackwardOp = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fastact::" + name).c_str(), "").typed<Signature>();
}

/// The handles of one kind of op for all rows that have as many parameters as P; looked up once.
template <class Signature>
const c10::TypedOperatorHandle<Signature>& row_op(int row, int arity, const char* suffix) {
  using Handle = c10::TypedOperatorHandle<Signature>;
  static const auto handles = [&] {
    std::vector<std::optional<Handle>> found(kRowCount);
    for (int r = 0; r < kRowCount; ++r)
      if (kRows[r].arity() == arity) found[r] = find_op<Signature>(std::string(kRows[r].name) + suffix);
    return found;
  }();
  return *handles[row];
}
template <class... P>
const auto& forward_op(int row) {
  return row_op<ForwardOp<P...>>(row, sizeof...(P), "");
}
template <class... P>
const auto& backward_op(int row) {
  return row_op<BackwardOp<P...>>(row, sizeof...(P), "_backward");
}
template <class... P>
const auto& inplace_op(int row) {
  return row_op<InplaceOp<P...>>(row, sizeof...(P), "_");
}
inline const auto& softmax_op() {
  static const auto handle = find_op<SoftmaxOp>("softmax");
  return handle;
}
inline const auto& softmax_backward_op() {
  static const auto handle = find_op<SoftmaxBackwardOp>("softmax_backward");
  return handle;
}

}  // namespace fastact
