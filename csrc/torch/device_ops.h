// The ops below autograd, for any device: checks, layout, allocation, registration. A Device says the rest:
//
//   struct Device {
//     constexpr c10::DeviceType kType;
//     struct Guard;                               made of the input, held while an op runs
//     Tensor empty_as(const Tensor& x);           uninitialised, with the layout of a dense x
//     void forward(int row, DType, const Tensor& x, const Tensor& y, const double* parameters, Sights* y_seen);
//     void backward(int row, DType, const Tensor& dy, const Tensor& saved, const Tensor& dx, const double* parameters,
//                   Sights* dy_seen, Sights* dx_seen);
//     void softmax(int row, DType, const Tensor& x, const Tensor& y, SoftmaxShape, SoftmaxOptions);
//     void softmax_backward(int row, DType, const Tensor& dy, const Tensor& y, const Tensor& dx, SoftmaxShape, SoftmaxOptions);
//     void look(DType, const Tensor& x, const Look&, Tally*, Histogram*, uint8_t* units);
//     void look_at_rows(DType, const Tensor& y, const RowLook&, RowTally*);
//     constexpr auto kLookAtPart, kGather;        as watch::Eyes has them; where they are not null, forward and backward tell
//                                                 Sights, if there are any, of every part: dy before it is overwritten, the
//                                                 others when they are there
//   };
//
// All are static. The tensors they get are dense and laid out alike; y and dx may be x, dy or the saved tensor. Those of
// softmax have elements.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "rows.h"
#include "watch.h"

namespace fastact {

using at::Tensor;

// ---- Checks and layout -----------------------------------------------------------------------------------------------

inline DType dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return kFloat64;
    case at::kFloat:
      return kFloat32;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "fastact::", op, " not implemented for '", x.scalar_type(), "'");
  }
}

inline void check_backward(const char* op, const Tensor& dy, const Tensor& saved) {
  TORCH_CHECK(dy.sym_sizes() == saved.sym_sizes(), "fastact::", op, "_backward: dy has shape ", dy.sym_sizes(),
              " but the saved tensor has shape ", saved.sym_sizes());
  TORCH_CHECK(dy.scalar_type() == saved.scalar_type(), "fastact::", op, "_backward: dy has dtype ", dy.scalar_type(),
              " but the saved tensor has dtype ", saved.scalar_type());
  TORCH_CHECK(dy.device() == saved.device(), "fastact::", op, "_backward: dy is on ", dy.device(),
              " but the saved tensor is on ", saved.device());
}

inline bool dense(const Tensor& x) { return x.is_non_overlapping_and_dense(); }

/// Whether the elements of a and b lie in the same order. The stride of a dimension of size 1 means nothing.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), as = a.strides(), bs = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (as[d] != bs[d] && sizes[d] != 1) return false;
  return true;
}

/// The elements of x in the layout of `like`, which is dense or decides, as torch does, what a dense twin of it looks like.
inline Tensor copy_as(const Tensor& x, const Tensor& like) { return at::empty_like(like).copy_(x); }

/// f(in, out) of x, brought to a dense layout: `in` and `out` are the same where a copy had to be made. Returns `out`.
template <class Device, class F>
Tensor unary(const Tensor& x, const F& f) {
  if (dense(x)) {
    Tensor out = Device::empty_as(x);
    f(x, out);
    return out;
  }
  Tensor copy = copy_as(x, x);
  f(copy, copy);
  return copy;
}

/// The tensor whose layout the gradient gets: dy's where it is dense, as in torch, else the saved tensor's.
inline const Tensor& leading(const Tensor& dy, const Tensor& saved) { return dense(dy) ? dy : saved; }

/// What becomes of the gradient tensor dy in a backward: it is left as it is, or the result may take its place.
enum class Gradient { kept, overwritten };

template <class Device>
struct Binary {
  Tensor dy, saved, out;
  Binary(const Tensor& dy_, const Tensor& saved_, Gradient gradient) : dy(dy_), saved(saved_) {
    if (dense(dy) && same_layout(dy, saved)) {
      out = gradient == Gradient::overwritten ? dy : Device::empty_as(dy);
    } else {
      const Tensor& like = leading(dy_, saved_);
      if (!dense(saved) || !same_layout(saved, like)) saved = out = copy_as(saved_, like);
      if (!dense(dy) || !same_layout(dy, saved)) dy = out = copy_as(dy_, saved);
    }
  }
};

// ---- The ops ---------------------------------------------------------------------------------------------------------------

using watch::Sights;

/// Shows y to monitors. Apart, for the room that it takes on the stack.
template <class Device>
[[gnu::noinline]] void watched_forward(int row, DType dtype, const Tensor& x, const Tensor& y, const double* parameters) {
  watch::Kind kind{kRows[row].name, row};
  std::copy_n(parameters, kRows[row].arity(), kind.parameters);
  watch::Layers room;
  const watch::Layers& layers = watch::layers_of(kind, y, room);
  Sights seen;
  seen.prepare(layers, kOutput, dtype, y);
  Device::forward(row, dtype, x, y, parameters, &seen);
  seen.whole();
  seen.together();
}

template <class Device>
void forward(int row, DType dtype, const Tensor& x, const Tensor& y, const double* parameters) {
  if (watch::active()) return watched_forward<Device>(row, dtype, x, y, parameters);
  Device::forward(row, dtype, x, y, parameters, nullptr);
}

template <class Device>
Tensor forward(int row, const Tensor& x, const double* parameters) {
  const DType dtype = dtype_of(kRows[row].name, x);
  const typename Device::Guard guard(x);
  return unary<Device>(x, [&](const Tensor& in, const Tensor& out) { forward<Device>(row, dtype, in, out, parameters); });
}

template <class Device, class... P>
struct ForwardKernel {
  int row;
  Tensor operator()(const Tensor& x, P... p) const {
    const double parameters[] = {p..., 0};
    return forward<Device>(row, x, parameters);
  }
};

template <class Device, class... P>
struct InplaceKernel {
  int row;
  void operator()(const Tensor& x, P... p) const {
    const double parameters[] = {p..., 0};
    const DType dtype = dtype_of(kRows[row].name, x);
    at::assert_no_internal_overlap(x);
    const typename Device::Guard guard(x);
    if (dense(x)) {
      forward<Device>(row, dtype, x, x, parameters);
    } else {
      const Tensor t = copy_as(x, x);
      forward<Device>(row, dtype, t, t, parameters);
      x.copy_(t);
    }
  }
};

/// Shows both gradients to monitors.
template <class Device>
[[gnu::noinline]] void watched_backward(int row, DType dtype, const Binary<Device>& t, const double* parameters,
                                        const watch::Layers& layers) {
  Sights dy_seen, dx_seen;
  dy_seen.prepare(layers, kGradientIn, dtype, t.dy);
  dx_seen.prepare(layers, kGradientOut, dtype, t.out);
  dy_seen.whole();
  Device::backward(row, dtype, t.dy, t.saved, t.out, parameters, &dy_seen, &dx_seen);
  dx_seen.whole();
  Sights::Held held;
  dy_seen.together(held);
  dx_seen.together(held);
}

template <class Device>
Tensor backward(int row, const Tensor& dy, const Tensor& saved, const double* parameters, Gradient gradient = Gradient::kept) {
  check_backward(kRows[row].name, dy, saved);
  const DType dtype = dtype_of(kRows[row].name, dy);
  const typename Device::Guard guard(dy);
  const Binary<Device> t(dy, saved, gradient);
  const watch::Layers& layers = watch::backward_of();
  if (layers.empty())
    Device::backward(row, dtype, t.dy, t.saved, t.out, parameters, nullptr, nullptr);
  else
    watched_backward<Device>(row, dtype, t, parameters, layers);
  return t.out;
}

template <class Device, class... P>
struct BackwardKernel {
  int row;
  Tensor operator()(const Tensor& dy, const Tensor& saved, P... p) const {
    const double parameters[] = {p..., 0};
    return backward<Device>(row, dy, saved, parameters);
  }
};

/// The shape that softmax sees: a dense tensor, whatever the order of its dimensions, is (outer, length, inner) in memory.
inline SoftmaxShape shape_of(const Tensor& x, int64_t dim) {
  if (x.dim() == 0 || x.size(dim) == 1) return {1, 1, x.numel()};
  const int64_t length = x.size(dim), inner = x.stride(dim);
  return {x.numel() / (length * inner), length, inner};
}

inline void check_options(const char* op, const SoftmaxOptions& o) {
  TORCH_CHECK_VALUE(is_temperature(o.temperature), "fastact::", op, ": temperature must be a number from 2^-",
                    kTemperatureExponent, " to 2^", kTemperatureExponent, ", not ", o.temperature);
}

template <class Device>
Tensor softmax(int row, const Tensor& x, int64_t dim, const SoftmaxOptions& options) {
  const char* name = kSoftmaxes[row].name;
  dim = at::maybe_wrap_dim(dim, x.dim());
  const DType dtype = dtype_of(name, x);
  check_options(name, options);
  const typename Device::Guard guard(x);
  return unary<Device>(x, [&](const Tensor& in, const Tensor& out) {
    if (in.numel() > 0) Device::softmax(row, dtype, in, out, shape_of(in, dim), options);
    if (!watch::active()) return;
    const watch::Kind kind{.name = name, .along_dim = true, .logarithms = kSoftmaxes[row].logarithms, .dim = dim};
    watch::Layers room;
    for (const auto& layer : watch::layers_of(kind, out, room)) {
      watch::look(*layer, kOutput, out);
      watch::look_at_rows(*layer, kind, out);
    }
  });
}

template <class Device>
Tensor softmax_backward(int row, const Tensor& dy, const Tensor& y, int64_t dim, const SoftmaxOptions& options,
                        Gradient gradient = Gradient::kept) {
  const char* name = kSoftmaxes[row].name;
  dim = at::maybe_wrap_dim(dim, y.dim());
  check_backward(name, dy, y);
  const DType dtype = dtype_of(name, dy);
  check_options(name, options);
  const typename Device::Guard guard(dy);
  const Binary<Device> t(dy, y, gradient);
  const watch::Layers& layers = watch::backward_of();
  for (const auto& layer : layers) watch::look(*layer, kGradientIn, t.dy);
  if (y.numel() > 0) Device::softmax_backward(row, dtype, t.dy, t.saved, t.out, shape_of(t.out, dim), options);
  for (const auto& layer : layers) watch::look(*layer, kGradientOut, t.out);
  return t.out;
}

template <class Device, class... P>
struct SoftmaxKernel {
  int row;
  Tensor operator()(const Tensor& x, int64_t dim, P... p) const { return softmax<Device>(row, x, dim, {p...}); }
};

template <class Device, class... P>
struct SoftmaxBackwardKernel {
  int row;
  Tensor operator()(const Tensor& dy, const Tensor& y, int64_t dim, P... p) const {
    return softmax_backward<Device>(row, dy, y, dim, {p...});
  }
};

// ---- Registration ----------------------------------------------------------------------------------------------------------

/// The kernels of all rows for one dispatch key: three functors made of a row's number, each for any parameters P.
template <template <class...> class Forward, template <class...> class Inplace, template <class...> class Backward>
void register_rows(torch::Library& m) {
  for (int row = 0; row < kRowCount; ++row)
    with_arity(kRows[row].arity(), [&]<class... P>() {
      const std::string name = kRows[row].name;
      m.impl(name.c_str(), Forward<P...>{row});
      m.impl((name + "_").c_str(), Inplace<P...>{row});
      m.impl((name + "_backward").c_str(), Backward<P...>{row});
    });
}

template <class Device>
struct On {
  template <class... P>
  using Forward = ForwardKernel<Device, P...>;
  template <class... P>
  using Inplace = InplaceKernel<Device, P...>;
  template <class... P>
  using Backward = BackwardKernel<Device, P...>;
  template <class... P>
  using SoftmaxForward = SoftmaxKernel<Device, P...>;
  template <class... P>
  using SoftmaxBackward = SoftmaxBackwardKernel<Device, P...>;

  static void register_all(torch::Library& m) {
    watch::give_eyes(Device::kType, watch::kEyes<Device>);
    register_rows<Forward, Inplace, Backward>(m);
    register_softmaxes<SoftmaxForward, SoftmaxBackward>(m);
  }
};

}  // namespace fastact
