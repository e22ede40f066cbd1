// The rows of activations.h and of softmax.h as data, and the ops that are made of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <utility>

#include "../activations.h"
#include "../kernels.h"
#include "../softmax.h"

namespace fastact {

#define FASTACT_ROW(name, Functor, ...) \
  Row{#name, #Functor, {__VA_ARGS__}, generic::Functor<double>::costly, generic::Functor<double>::saves_input},
static constexpr Row kRows[] = {FASTACT_ACTIVATIONS(FASTACT_ROW)};
#undef FASTACT_ROW
static constexpr int kRowCount = sizeof(kRows) / sizeof(kRows[0]);
static_assert(kRowCount <= kMaxRows, "raise kMaxRows");

/// A row of softmax.h.
struct SoftmaxRow {
  const char* name;     // op and Python function: "log_softmax"
  const char* functor;  // functor, module and autograd Function: "LogSoftmax"
  bool tempered;        // whether its ops take the members of SoftmaxOptions
  bool logarithms;      // whether its results are those of probabilities
};
#define FASTACT_SOFTMAX_ROW(name, Functor) \
  SoftmaxRow{#name, #Functor, generic::Functor<double>::tempered, !generic::Functor<double>::keeps_terms},
static constexpr SoftmaxRow kSoftmaxes[] = {FASTACT_SOFTMAXES(FASTACT_SOFTMAX_ROW)};
#undef FASTACT_SOFTMAX_ROW
static constexpr int kSoftmaxCount = sizeof(kSoftmaxes) / sizeof(kSoftmaxes[0]);
static_assert(kSoftmaxCount <= kMaxSoftmaxes, "raise kMaxSoftmaxes");

inline bool is_temperature(double number) {
  const double highest = std::ldexp(1.0, kTemperatureExponent);
  return 1 / highest <= number && number <= highest;
}

/// Of that name; -1 for none.
inline int row_named(const std::string& name) {
  for (int row = 0; row < kRowCount; ++row)
    if (name == kRows[row].name) return row;
  return -1;
}
inline int softmax_named(const std::string& name) {
  for (int row = 0; row < kSoftmaxCount; ++row)
    if (name == kSoftmaxes[row].name) return row;
  return -1;
}

/// Whether tensors of that dtype have kernels, on devices that have any.
inline bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

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

// Of softmax.h: P are the types of the options that the op takes after dim.
template <class... P>
using SoftmaxOp = at::Tensor(const at::Tensor&, int64_t, P...);
template <class... P>
using SoftmaxBackwardOp = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, P...);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("fastact::" + name).c_str(), "").typed<Signature>();
}

/// The handles of one kind of op for those rows that fit.
template <class Signature, class Rows, class Fits>
auto find_ops(const Rows& rows, const char* suffix, const Fits& fits) {
  std::vector<std::optional<c10::TypedOperatorHandle<Signature>>> found;
  for (const auto& row : rows) {
    found.emplace_back();
    if (fits(row)) found.back() = find_op<Signature>(std::string(row.name) + suffix);
  }
  return found;
}

/// Of all rows that have as many parameters as P; looked up once.
template <class Signature>
const c10::TypedOperatorHandle<Signature>& row_op(int row, int arity, const char* suffix) {
  static const auto handles = find_ops<Signature>(kRows, suffix, [&](const Row& r) { return r.arity() == arity; });
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

/// Of all rows of softmax.h with the options P.
template <class Signature>
const c10::TypedOperatorHandle<Signature>& softmax_row_op(int row, bool tempered, const char* suffix) {
  static const auto handles =
      find_ops<Signature>(kSoftmaxes, suffix, [&](const SoftmaxRow& r) { return r.tempered == tempered; });
  return *handles[row];
}
template <class... P>
const auto& softmax_op(int row) {
  return softmax_row_op<SoftmaxOp<P...>>(row, sizeof...(P) > 0, "");
}
template <class... P>
const auto& softmax_backward_op(int row) {
  return softmax_row_op<SoftmaxBackwardOp<P...>>(row, sizeof...(P) > 0, "_backward");
}

template <class... P>
struct Types {};
/// Calls f(Types<...>(), Types<...>()) with the types of the options that the row's forward op takes, and its backward op.
template <class F>
decltype(auto) with_options(int row, F&& f) {
  return kSoftmaxes[row].tempered ? f(Types<double, bool>(), Types<double>()) : f(Types<>(), Types<>());
}

/// The kernels of all rows of softmax.h for one dispatch key: functors made of a row's number, each for any options.
template <template <class...> class Forward, template <class...> class Backward>
void register_softmaxes(torch::Library& m) {
  for (int row = 0; row < kSoftmaxCount; ++row)
    with_options(row, [&]<class... P, class... B>(Types<P...>, Types<B...>) {
      const std::string name = kSoftmaxes[row].name;
      m.impl(name.c_str(), Forward<P...>{row});
      m.impl((name + "_backward").c_str(), Backward<B...>{row});
    });
}

inline at::Tensor call_softmax_op(int row, const at::Tensor& x, int64_t dim, const SoftmaxOptions& o) {
  return kSoftmaxes[row].tempered ? softmax_op<double, bool>(row).call(x, dim, o.temperature, o.masked_zero)
                                  : softmax_op<>(row).call(x, dim);
}
inline at::Tensor call_softmax_backward_op(int row, const at::Tensor& dy, const at::Tensor& y, int64_t dim,
                                           const SoftmaxOptions& o) {
  return kSoftmaxes[row].tempered ? softmax_backward_op<double>(row).call(dy, y, dim, o.temperature)
                                  : softmax_backward_op<>(row).call(dy, y, dim);
}

}  // namespace fastact
