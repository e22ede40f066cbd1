// The ops of activations with parameters per channel below autograd, for any device, as device_ops.h has those of the others.
// A Device says besides:
//
//   void channel_forward(int row, DType, const Tensor& x, const Tensor& y, Tensors parameters, ChannelShape);
//   void channel_backward(int row, DType, const Tensor& dy, const Tensor& x, const Tensor& dx, Tensors parameters,
//                         Tensors gradients, ChannelShape);
//
// The tensors are dense, laid out alike, and have elements; dx may be dy or x, or undefined: not wanted. The parameters are
// contiguous, with an element per channel of the shape. The gradients are undefined where they are not wanted; there may be
// none.
#pragma once

#include <ATen/ops/zeros_like.h>

#include <array>

#include "../channels.h"
#include "device_ops.h"

namespace fastact {

#define FASTACT_CHANNEL_ROW(name, Functor, ...) ChannelRow{#name, #Functor, {__VA_ARGS__}, generic::Functor<double>::costly},
static constexpr ChannelRow kChannelRows[] = {FASTACT_CHANNEL_ACTIVATIONS(FASTACT_CHANNEL_ROW)};
#undef FASTACT_CHANNEL_ROW
static constexpr int kChannelRowCount = sizeof(kChannelRows) / sizeof(kChannelRows[0]);
static_assert(kChannelRowCount <= kMaxChannelRows, "raise kMaxChannelRows");

#define FASTACT_CHANNEL_ARITY(name, Functor, ...)                                                                  \
  static_assert(ChannelRow{#name, #Functor, {__VA_ARGS__}, false}.arity() == generic::Functor<double>::parameters, \
                "the row of " #name " names another number of parameters than its functor has");
FASTACT_CHANNEL_ACTIVATIONS(FASTACT_CHANNEL_ARITY)
#undef FASTACT_CHANNEL_ARITY

using Tensors = c10::ArrayRef<Tensor>;

// ---- Signatures: P is `const Tensor&` for each parameter -------------------------------------------------------------------

/// Which gradients of a backward are wanted: of x, then of the parameters. Those that are not are undefined in its result.
template <class... P>
using Wanted = std::array<bool, 1 + sizeof...(P)>;
template <class... P>
using Gradients = std::tuple<Tensor, std::decay_t<P>...>;

template <class... P>
using ChannelOp = Tensor(const Tensor&, P...);
template <class... P>
using ChannelBackwardOp = Gradients<P...>(const Tensor&, const Tensor&, P..., Wanted<P...>);

template <class F>
auto with_channel_arity(int arity, F&& f) {
  return arity == 1 ? f.template operator()<const Tensor&>() : f.template operator()<const Tensor&, const Tensor&>();
}

/// The tuple of a backward op, out of as many tensors.
template <class... P>
Gradients<P...> as_tuple(const Tensor* gradients) {
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return Gradients<P...>(gradients[i]...);
  }(std::make_index_sequence<1 + sizeof...(P)>());
}

// ---- Checks and layout -----------------------------------------------------------------------------------------------------

/// A parameter has one element, or one for each channel; the channels of x are its dim 1, of fewer dims a single one.
inline void check_channels(int row, const Tensor& x, Tensors parameters) {
  const ChannelRow& r = kChannelRows[row];
  for (size_t k = 0; k < parameters.size(); ++k) {
    const Tensor& p = parameters[k];
    const char* const name = r.parameters[k];
    TORCH_CHECK(p.dim() <= 1, "fastact::", r.name, ": ", name, " must have at most one dim, but has shape ", p.sym_sizes());
    TORCH_CHECK(p.scalar_type() == x.scalar_type(), "fastact::", r.name, ": ", name, " has dtype ", p.scalar_type(),
                " but x has dtype ", x.scalar_type());
    TORCH_CHECK(p.device() == x.device(), "fastact::", r.name, ": ", name, " is on ", p.device(), " but x is on ", x.device());
    const c10::SymInt count = p.sym_numel(), channels = x.dim() > 1 ? x.sym_size(1) : c10::SymInt(1);
    TORCH_CHECK(count == 1 || (x.dim() > 0 && count == channels), "fastact::", r.name, ": ", name, " has ", count,
                " elements but x, of shape ", x.sym_sizes(), ", has ", channels, " channels");
  }
}

/// The shape that the kernels see: a dense tensor, whatever the order of its dimensions, is (outer, channels, inner) in memory.
inline ChannelShape channel_shape(const Tensor& x, Tensors parameters) {
  bool shared = true;
  for (const Tensor& p : parameters) shared = shared && p.numel() == 1;
  if (shared) return {1, 1, x.numel()};
  const int64_t channels = x.size(1), inner = x.stride(1);
  return {x.numel() / (channels * inner), channels, inner};
}

/// The parameters as arrays of an element per channel.
inline std::vector<Tensor> per_channel(Tensors parameters, const ChannelShape& s) {
  std::vector<Tensor> all(parameters.begin(), parameters.end());
  for (Tensor& p : all) p = (p.numel() == s.channels ? p : p.reshape(-1).expand(s.channels)).contiguous();
  return all;
}

// ---- The ops
// -----------------------------------------------------------------------------------------------------------------

template <class Device>
Tensor channel_forward(int row, const Tensor& x, Tensors parameters) {
  const DType dtype = dtype_of(kChannelRows[row].name, x);
  check_channels(row, x, parameters);
  const typename Device::Guard guard(x);
  return unary<Device>(x, [&](const Tensor& in, const Tensor& out) {
    if (in.numel() == 0) return;
    const ChannelShape s = channel_shape(in, parameters);
    Device::channel_forward(row, dtype, in, out, per_channel(parameters, s), s);
  });
}

/// `gradients`: of x, then of the parameters.
template <class Device>
void channel_backward(int row, const Tensor& dy_, const Tensor& x_, Tensors parameters, const bool* wanted, Tensor* gradients) {
  check_backward(kChannelRows[row].name, dy_, x_);
  const DType dtype = dtype_of(kChannelRows[row].name, dy_);
  check_channels(row, x_, parameters);
  const typename Device::Guard guard(dy_);
  const size_t count = parameters.size();

  const Tensor& like = leading(dy_, x_);
  Tensor dy = dy_, x = x_, dx;
  if (!dense(x) || !same_layout(x, like)) x = dx = copy_as(x_, like);
  if (!dense(dy) || !same_layout(dy, x)) dy = dx = copy_as(dy_, x);
  if (!wanted[0])
    dx = Tensor();
  else if (!dx.defined())
    dx = Device::empty_as(dy);
  gradients[0] = dx;

  bool any = false;
  for (size_t k = 0; k < count; ++k) any = any || wanted[1 + k];
  if (x.numel() == 0) {
    for (size_t k = 0; k < count; ++k)
      if (wanted[1 + k]) gradients[1 + k] = at::zeros_like(parameters[k]);
    return;
  }
  if (!any && !wanted[0]) return;

  const ChannelShape s = channel_shape(x, parameters);
  const std::vector<Tensor> arrays = per_channel(parameters, s);
  std::vector<Tensor> sums(any ? count : 0);
  for (size_t k = 0; k < sums.size(); ++k)
    if (wanted[1 + k]) sums[k] = at::empty_like(arrays[k]);
  Device::channel_backward(row, dtype, dy, x, dx, arrays, sums, s);
  for (size_t k = 0; k < sums.size(); ++k)
    if (wanted[1 + k])
      gradients[1 + k] = (parameters[k].numel() == s.channels ? sums[k] : sums[k].sum()).reshape(parameters[k].sizes());
}

template <class Device, class... P>
struct ChannelForwardKernel {
  int row;
  Tensor operator()(const Tensor& x, P... p) const { return channel_forward<Device>(row, x, {p...}); }
};

template <class Device, class... P>
struct ChannelBackwardKernel {
  int row;
  Gradients<P...> operator()(const Tensor& dy, const Tensor& x, P... p, Wanted<P...> wanted) const {
    Tensor gradients[1 + sizeof...(P)];
    channel_backward<Device>(row, dy, x, {p...}, wanted.data(), gradients);
    return as_tuple<P...>(gradients);
  }
};

// ---- Registration
// ------------------------------------------------------------------------------------------------------------

/// The kernels of all rows for one dispatch key: two functors made of a row's number, each for any parameters P.
template <template <class...> class Forward, template <class...> class Backward>
void register_channel_rows(torch::Library& m) {
  for (int row = 0; row < kChannelRowCount; ++row)
    with_channel_arity(kChannelRows[row].arity(), [&]<class... P>() {
      const std::string name = kChannelRows[row].name;
      m.impl(name.c_str(), Forward<P...>{row});
      m.impl((name + "_backward").c_str(), Backward<P...>{row});
    });
}

template <class Device>
struct ChannelsOn {
  template <class... P>
  using Forward = ChannelForwardKernel<Device, P...>;
  template <class... P>
  using Backward = ChannelBackwardKernel<Device, P...>;

  static void register_all(torch::Library& m) { register_channel_rows<Forward, Backward>(m); }
};

}  // namespace fastact
