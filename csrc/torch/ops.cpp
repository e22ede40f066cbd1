// The schemas of all ops, made from the rows; the Meta kernels, which know shapes only; and what functionalization makes of ops
// in place.
#include <ATen/FunctionalTensorWrapper.h>

#include "device_ops.h"

namespace fastact {
namespace {

TORCH_LIBRARY(fastact, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  for (const Row& row : kRows) {
    std::string parameters;
    for (int k = 0; k < row.arity(); ++k) parameters += std::string(", float ") + row.parameters[k];
    const std::string name = row.name;
    define(name + "(Tensor x" + parameters + ") -> Tensor");
    define(name + "_(Tensor(a!) x" + parameters + ") -> ()");
    define(name + "_backward(Tensor dy, Tensor saved" + parameters + ") -> Tensor");
  }
  for (const SoftmaxRow& row : kSoftmaxes) {
    const std::string name = row.name, temperature = row.tempered ? ", float temperature=1.0" : "";
    define(name + "(Tensor x, int dim" + temperature + (row.tempered ? ", bool masked_zero=False" : "") + ") -> Tensor");
    define(name + "_backward(Tensor dy, Tensor y, int dim" + temperature + ") -> Tensor");
  }
}

template <class... P>
struct ForwardMeta {
  int row;
  Tensor operator()(const Tensor& x, P...) const {
    dtype_of(kRows[row].name, x);
    return at::empty_like(x);
  }
};

template <class... P>
struct InplaceMeta {
  int row;
  void operator()(const Tensor& x, P...) const { dtype_of(kRows[row].name, x); }
};

template <class... P>
struct BackwardMeta {
  int row;
  Tensor operator()(const Tensor& dy, const Tensor& saved, P...) const {
    check_backward(kRows[row].name, dy, saved);
    dtype_of(kRows[row].name, dy);
    return at::empty_like(leading(dy, saved));
  }
};

template <class... P>
struct SoftmaxMeta {
  int row;
  Tensor operator()(const Tensor& x, int64_t dim, P... p) const {
    at::maybe_wrap_dim(dim, x.dim());
    dtype_of(kSoftmaxes[row].name, x);
    check_options(kSoftmaxes[row].name, {p...});
    return at::empty_like(x);
  }
};

template <class... P>
struct SoftmaxBackwardMeta {
  int row;
  Tensor operator()(const Tensor& dy, const Tensor& y, int64_t dim, P... p) const {
    at::maybe_wrap_dim(dim, y.dim());
    check_backward(kSoftmaxes[row].name, dy, y);
    dtype_of(kSoftmaxes[row].name, dy);
    check_options(kSoftmaxes[row].name, {p...});
    return at::empty_like(leading(dy, y));
  }
};

TORCH_LIBRARY_IMPL(fastact, Meta, m) {
  register_rows<ForwardMeta, InplaceMeta, BackwardMeta>(m);
  register_softmaxes<SoftmaxMeta, SoftmaxBackwardMeta>(m);
}

/// As torch's generated code has it: the result of the op that is not in place becomes the value of x.
template <class... P>
struct InplaceFunctional {
  int row;
  void operator()(const Tensor& x, P... p) const {
    namespace functional = at::functionalization::impl;
    if (!functional::isFunctionalTensor(x)) {  // not of what is functionalized
      const at::AutoDispatchSkipFunctionalize guard;
      return inplace_op<P...>(row).call(x, p...);
    }
    functional::sync(x);
    const Tensor y = [&] {
      const at::AutoDispatchSkipFunctionalize guard;
      return forward_op<P...>(row).call(functional::from_functional_tensor(x), p...);
    }();
    functional::replace_(x, y);
    functional::commit_update(x);
    functional::sync(x);
  }
};

TORCH_LIBRARY_IMPL(fastact, Functionalize, m) {
  for (int row = 0; row < kRowCount; ++row)
    with_arity(kRows[row].arity(),
               [&]<class... P>() { m.impl((std::string(kRows[row].name) + "_").c_str(), InplaceFunctional<P...>{row}); });
}

}  // namespace
}  // namespace fastact
