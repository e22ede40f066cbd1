// The ops of maxout below autograd, for any device. A Device says besides:
//
//   void maxout(DType, const Tensor& x, const Tensor& y, const Tensor& index, MaxoutShape);
//   void maxout_backward(DType, const Tensor& dy, const Tensor& index, const Tensor& dx, MaxoutShape);
//
// The tensors are dense, with elements, in the same order of dimensions.
#pragma once

#include <ATen/ops/empty_strided.h>

#include "device_ops.h"

namespace fastact {

using MaxoutOp = std::tuple<Tensor, Tensor>(const Tensor&, int64_t, int64_t);
using MaxoutBackwardOp = Tensor(const Tensor&, const Tensor&, int64_t, int64_t);

inline int64_t check_maxout(const Tensor& x, int64_t pieces, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, x.dim(), /*wrap_scalar=*/false);
  TORCH_CHECK_VALUE(pieces >= 1 && pieces <= kMostPieces, "fastact::maxout: pieces must be from 1 to ", kMostPieces,
                    ", but is ", pieces);
  TORCH_CHECK_VALUE(x.sym_size(dim) % pieces == 0, "fastact::maxout: pieces is ", pieces, ", which does not divide size ",
                    x.sym_size(dim), " of dim ", dim);
  return dim;
}
inline int64_t check_maxout_backward(const Tensor& dy, const Tensor& index, int64_t pieces, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, dy.dim(), /*wrap_scalar=*/false);
  TORCH_CHECK_VALUE(pieces >= 1 && pieces <= kMostPieces, "fastact::maxout_backward: pieces must be from 1 to ", kMostPieces,
                    ", but is ", pieces);
  TORCH_CHECK(dy.sym_sizes() == index.sym_sizes(), "fastact::maxout_backward: dy has shape ", dy.sym_sizes(),
              " but index has shape ", index.sym_sizes());
  TORCH_CHECK(index.scalar_type() == at::kByte, "fastact::maxout_backward: index must be uint8, but is ", index.scalar_type());
  TORCH_CHECK(dy.device() == index.device(), "fastact::maxout_backward: dy is on ", dy.device(), " but index is on ",
              index.device());
  return dim;
}

/// A tensor of the dtype asked for, laid out as `like`, whose size of `dim` is multiplied (or divided) by `pieces`.
inline Tensor resized_as(const Tensor& like, int64_t pieces, int64_t dim, bool multiplied, at::ScalarType dtype) {
  c10::SymDimVector sizes(like.sym_sizes().begin(), like.sym_sizes().end());
  c10::SymDimVector strides(like.sym_strides().begin(), like.sym_strides().end());
  const c10::SymInt inner = strides[size_t(dim)];
  const auto change = [&](c10::SymInt& n) { n = multiplied ? n * pieces : n / pieces; };
  // What lies further apart; the stride of a dimension of size 1 does not matter.
  for (size_t d = 0; d < strides.size(); ++d)
    if (d != size_t(dim) && strides[d] >= inner) change(strides[d]);
  change(sizes[size_t(dim)]);
  return at::empty_strided_symint(sizes, strides, like.options().dtype(dtype));
}

/// The tensor so that its strides can be relied on: that of a dimension of size 1 may be anything. Where `dim` is one,
/// contiguous.
inline Tensor laid_out(const Tensor& t, int64_t dim) {
  if (dense(t) && t.sym_size(dim) > 1) return t;
  const Tensor c = t.contiguous();
  c10::SymDimVector strides(size_t(t.dim()), 1);
  for (int64_t d = t.dim() - 2; d >= 0; --d)
    strides[size_t(d)] = strides[size_t(d) + 1] * (t.sym_size(d + 1) > 1 ? t.sym_size(d + 1) : c10::SymInt(1));
  return c.as_strided_symint(c.sym_sizes(), strides);
}

template <class Device>
std::tuple<Tensor, Tensor> maxout(const Tensor& x_, int64_t pieces, int64_t dim) {
  const DType dtype = dtype_of("maxout", x_);
  dim = check_maxout(x_, pieces, dim);
  const typename Device::Guard guard(x_);
  const Tensor x = laid_out(x_, dim);
  const Tensor y = resized_as(x, pieces, dim, false, x.scalar_type()), index = resized_as(x, pieces, dim, false, at::kByte);
  if (x.numel() > 0) {
    const int64_t groups = x.size(dim) / pieces, inner = x.stride(dim);
    Device::maxout(dtype, x, y, index, {x.numel() / (x.size(dim) * inner), groups, pieces, inner});
  }
  return {y, index};
}

template <class Device>
Tensor maxout_backward(const Tensor& dy_, const Tensor& index_, int64_t pieces, int64_t dim) {
  const DType dtype = dtype_of("maxout", dy_);
  dim = check_maxout_backward(dy_, index_, pieces, dim);
  const typename Device::Guard guard(dy_);
  const Tensor index = laid_out(index_, dim);
  Tensor dy = dy_;
  if (!dense(dy) || !same_layout(dy, index)) dy = at::empty_strided(index.sizes(), index.strides(), dy_.options()).copy_(dy_);
  const Tensor dx = resized_as(index, pieces, dim, true, dy.scalar_type());
  if (dx.numel() > 0) {
    const int64_t groups = index.size(dim), inner = index.stride(dim);
    Device::maxout_backward(dtype, dy, index, dx, {index.numel() / (groups * inner), groups, pieces, inner});
  }
  return dx;
}

}  // namespace fastact
