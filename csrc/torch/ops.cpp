// The ops below autograd: schemas from the rows, checks, layout, allocation, threads. CPU kernels and their Meta twins.
#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/empty_like.h>
#include <pthread.h>
#include <torch/library.h>

#include "rows.h"

#ifndef _OPENMP
#error "at::parallel_for is silently serial unless this file is compiled with -fopenmp"
#endif

namespace fastact {
namespace {

using at::Tensor;

// ---- Threads ---------------------------------------------------------------------------------------------------------

// A child made by fork has none of its parent's OpenMP threads, and waiting for them would never end: it computes alone.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Elements below which a second thread costs more than it brings (as many as ATen's own grain).
constexpr int64_t kGrain = 32768;
// Elementwise work is cut at multiples of this, so that every thread starts on a cache line if the tensor does.
constexpr int64_t kBlock = 1024;

template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= grain || forked)
    f(int64_t(0), n);
  else
    at::parallel_for(0, n, grain, f);
}

template <class F>
void parallel_elements(int64_t n, const F& f) {
  if (n <= kGrain) return f(int64_t(0), n);
  parallel((n + kBlock - 1) / kBlock, kGrain / kBlock,
           [&](int64_t begin, int64_t end) { f(begin * kBlock, std::min(n, end * kBlock)); });
}

// ---- Checks and layout -----------------------------------------------------------------------------------------------

DType dtype_of(const char* op, const Tensor& x) {
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

void check_backward(const char* op, const Tensor& dy, const Tensor& saved) {
  TORCH_CHECK(dy.sym_sizes() == saved.sym_sizes(), "fastact::", op, "_backward: dy has shape ", dy.sym_sizes(),
              " but the saved tensor has shape ", saved.sym_sizes());
  TORCH_CHECK(dy.scalar_type() == saved.scalar_type(), "fastact::", op, "_backward: dy has dtype ", dy.scalar_type(),
              " but the saved tensor has dtype ", saved.scalar_type());
  TORCH_CHECK(dy.device() == saved.device(), "fastact::", op, "_backward: dy is on ", dy.device(),
              " but the saved tensor is on ", saved.device());
}

bool dense(const Tensor& x) { return x.is_non_overlapping_and_dense(); }

/// Whether the elements of a and b lie in the same order. The stride of a dimension of size 1 means nothing.
bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), as = a.strides(), bs = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (as[d] != bs[d] && sizes[d] != 1) return false;
  return true;
}

/// Uninitialised, with the layout of a dense x.
Tensor empty_as(const Tensor& x) {
  if (x.is_contiguous()) return Tensor(at::detail::empty_cpu(x.sizes(), x.scalar_type()));
  return Tensor(at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type()));
}

/// The elements of x in the layout of `like`, which is dense or decides, as torch does, what a dense twin of it looks like.
Tensor copy_as(const Tensor& x, const Tensor& like) { return at::empty_like(like).copy_(x); }

/// Inputs of a unary op, brought to one dense layout: reads `in`, writes `out`; they are the same where a copy had to be made.
struct Unary {
  Tensor in, out;
  explicit Unary(const Tensor& x) {
    if (dense(x)) {
      in = x;
      out = empty_as(x);
    } else {
      in = out = copy_as(x, x);
    }
  }
};

/// The tensor whose layout the gradient gets: dy's where it is dense, as in torch, else the saved tensor's.
const Tensor& leading(const Tensor& dy, const Tensor& saved) { return dense(dy) ? dy : saved; }

struct Binary {
  Tensor dy, saved, out;
  Binary(const Tensor& dy_, const Tensor& saved_) : dy(dy_), saved(saved_) {
    if (dense(dy) && same_layout(dy, saved)) {
      out = empty_as(dy);
    } else {
      const Tensor& like = leading(dy_, saved_);
      if (!dense(saved) || !same_layout(saved, like)) saved = out = copy_as(saved_, like);
      if (!dense(dy) || !same_layout(dy, saved)) dy = out = copy_as(dy_, saved);
    }
  }
};

// ---- Elementwise -------------------------------------------------------------------------------------------------------

void run(Forward kernel, const Tensor& x, const Tensor& y, const double* parameters) {
  const int64_t size = x.element_size();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  parallel_elements(
      x.numel(), [&](int64_t begin, int64_t end) { kernel(from + begin * size, to + begin * size, end - begin, parameters); });
}

template <class... P>
struct ForwardCPU {
  int row;
  Tensor operator()(const Tensor& x, P... p) const {
    const double parameters[] = {p..., 0};
    const Forward kernel = cpu::kernels().forward[row][dtype_of(kRows[row].name, x)];
    const Unary t(x);
    run(kernel, t.in, t.out, parameters);
    return t.out;
  }
};

template <class... P>
struct InplaceCPU {
  int row;
  void operator()(const Tensor& x, P... p) const {
    const double parameters[] = {p..., 0};
    const Forward kernel = cpu::kernels().forward[row][dtype_of(kRows[row].name, x)];
    at::assert_no_internal_overlap(x);
    if (dense(x)) {
      run(kernel, x, x, parameters);
    } else {
      const Tensor t = copy_as(x, x);
      run(kernel, t, t, parameters);
      x.copy_(t);
    }
  }
};

template <class... P>
struct BackwardCPU {
  int row;
  Tensor operator()(const Tensor& dy, const Tensor& saved, P... p) const {
    const double parameters[] = {p..., 0};
    check_backward(kRows[row].name, dy, saved);
    const Backward kernel = cpu::kernels().backward[row][dtype_of(kRows[row].name, dy)];
    const Binary t(dy, saved);
    const int64_t size = dy.element_size();
    const char* from = static_cast<const char*>(t.dy.const_data_ptr());
    const char* kept = static_cast<const char*>(t.saved.const_data_ptr());
    char* to = static_cast<char*>(t.out.mutable_data_ptr());
    parallel_elements(dy.numel(), [&](int64_t begin, int64_t end) {
      kernel(from + begin * size, kept + begin * size, to + begin * size, end - begin, parameters);
    });
    return t.out;
  }
};

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

// ---- Softmax -------------------------------------------------------------------------------------------------------------

/// The shape that softmax sees: a dense tensor, whatever the order of its dimensions, is (outer, length, inner) in memory.
SoftmaxShape shape_of(const Tensor& x, int64_t dim) {
  if (x.dim() == 0 || x.size(dim) == 1) return {x.numel(), 1, 1};
  const int64_t length = x.size(dim), inner = x.stride(dim);
  return {x.numel() / (length * inner), length, inner};
}

template <class F>
void parallel_units(const SoftmaxShape& s, const F& f) {
  const int64_t elements = s.length * std::min(s.inner, kSoftmaxColumns);
  parallel(softmax_units(s), std::max<int64_t>(1, kGrain / elements), f);
}

Tensor softmax_cpu(const Tensor& x, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, x.dim());
  const SoftmaxForward kernel = cpu::kernels().softmax_forward[dtype_of("softmax", x)];
  const Unary t(x);
  if (x.numel() == 0) return t.out;
  const SoftmaxShape shape = shape_of(t.in, dim);
  const void* from = t.in.const_data_ptr();
  void* to = t.out.mutable_data_ptr();
  parallel_units(shape, [&](int64_t begin, int64_t end) { kernel(from, to, shape, begin, end); });
  return t.out;
}

Tensor softmax_backward_cpu(const Tensor& dy, const Tensor& y, int64_t dim) {
  dim = at::maybe_wrap_dim(dim, y.dim());
  check_backward("softmax", dy, y);
  const SoftmaxBackward kernel = cpu::kernels().softmax_backward[dtype_of("softmax", dy)];
  const Binary t(dy, y);
  if (y.numel() == 0) return t.out;
  const SoftmaxShape shape = shape_of(t.out, dim);
  const void* from = t.dy.const_data_ptr();
  const void* kept = t.saved.const_data_ptr();
  void* to = t.out.mutable_data_ptr();
  parallel_units(shape, [&](int64_t begin, int64_t end) { kernel(from, kept, to, shape, begin, end); });
  return t.out;
}

Tensor softmax_meta(const Tensor& x, int64_t dim) {
  at::maybe_wrap_dim(dim, x.dim());
  dtype_of("softmax", x);
  return at::empty_like(x);
}

Tensor softmax_backward_meta(const Tensor& dy, const Tensor& y, int64_t dim) {
  at::maybe_wrap_dim(dim, y.dim());
  check_backward("softmax", dy, y);
  dtype_of("softmax", dy);
  return at::empty_like(leading(dy, y));
}

// ---- Registration ----------------------------------------------------------------------------------------------------

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
  define("softmax(Tensor x, int dim) -> Tensor");
  define("softmax_backward(Tensor dy, Tensor y, int dim) -> Tensor");
}

template <template <class...> class ForwardKernel, template <class...> class InplaceKernel,
          template <class...> class BackwardKernel>
void register_rows(torch::Library& m) {
  for (int row = 0; row < kRowCount; ++row)
    with_arity(kRows[row].arity(), [&]<class... P>() {
      const std::string name = kRows[row].name;
      m.impl(name.c_str(), ForwardKernel<P...>{row});
      m.impl((name + "_").c_str(), InplaceKernel<P...>{row});
      m.impl((name + "_backward").c_str(), BackwardKernel<P...>{row});
    });
}

TORCH_LIBRARY_IMPL(fastact, CPU, m) {
  register_rows<ForwardCPU, InplaceCPU, BackwardCPU>(m);
  m.impl("softmax", TORCH_FN(softmax_cpu));
  m.impl("softmax_backward", TORCH_FN(softmax_backward_cpu));
}

TORCH_LIBRARY_IMPL(fastact, Meta, m) {
  register_rows<ForwardMeta, InplaceMeta, BackwardMeta>(m);
  m.impl("softmax", TORCH_FN(softmax_meta));
  m.impl("softmax_backward", TORCH_FN(softmax_backward_meta));
}

}  // namespace
}  // namespace fastact
