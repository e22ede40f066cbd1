// The ops on CUDA: streams, devices, launches.
#include "cuda.h"

#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "channel_ops.h"
#include "device_ops.h"
#include "maxout_ops.h"

namespace fastact {
namespace {

/// All devices of this process, without a stream.
const std::vector<cuda::Queue>& devices() {
  static const std::vector<cuda::Queue> all = [] {
    std::vector<cuda::Queue> found(c10::cuda::device_count());
    for (int device = 0; device < int(found.size()); ++device) {
      int major = 0, minor = 0;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&found[device].multiprocessors, cudaDevAttrMultiProcessorCount, device));
      found[device].capability = 10 * major + minor;
    }
    return found;
  }();
  return all;
}

cuda::Queue current_queue() {
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  cuda::Queue queue = devices()[stream.device_index()];
  queue.stream = stream.stream();
  return queue;
}

void check(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

struct CUDA {
  static constexpr c10::DeviceType kType = c10::DeviceType::CUDA;
  struct Guard {
    c10::cuda::CUDAGuard guard;
    explicit Guard(const Tensor& x) : guard(x.device()) {}
  };

  static Tensor empty_as(const Tensor& x) {
    if (x.is_contiguous()) return Tensor(at::detail::empty_cuda(x.sizes(), x.scalar_type(), x.device(), std::nullopt));
    return Tensor(at::detail::empty_strided_cuda(x.sizes(), x.strides(), x.scalar_type(), x.device()));
  }

  static void forward(int row, DType dtype, const Tensor& x, const Tensor& y, const double* parameters, Sights*) {
    check(
        cuda::kernels().forward[row][dtype](x.const_data_ptr(), y.mutable_data_ptr(), x.numel(), parameters, current_queue()));
  }

  static void backward(int row, DType dtype, const Tensor& dy, const Tensor& saved, const Tensor& dx, const double* parameters,
                       Sights*, Sights*) {
    check(cuda::kernels().backward[row][dtype](dy.const_data_ptr(), saved.const_data_ptr(), dx.mutable_data_ptr(), dy.numel(),
                                               parameters, current_queue()));
  }

  /// Freed when it goes out of scope, which torch's allocator delays until the stream has come that far.
  static Tensor workspace(int row, DType dtype, SoftmaxShape shape, bool backward, const cuda::Queue& queue,
                          const Tensor& like) {
    const int64_t bytes = cuda::kernels().softmax_workspace(row, dtype, shape, backward, queue);
    return bytes > 0 ? Tensor(at::detail::empty_cuda({bytes}, at::kByte, like.device(), std::nullopt)) : Tensor();
  }

  static void softmax(int row, DType dtype, const Tensor& x, const Tensor& y, SoftmaxShape shape, SoftmaxOptions options) {
    const cuda::Queue queue = current_queue();
    const Tensor space = workspace(row, dtype, shape, false, queue, x);
    check(cuda::kernels().softmax_forward[row][dtype](x.const_data_ptr(), y.mutable_data_ptr(), shape, options,
                                                      space.defined() ? space.mutable_data_ptr() : nullptr, queue));
  }

  static void softmax_backward(int row, DType dtype, const Tensor& dy, const Tensor& y, const Tensor& dx, SoftmaxShape shape,
                               SoftmaxOptions options) {
    const cuda::Queue queue = current_queue();
    const Tensor space = workspace(row, dtype, shape, true, queue, y);
    check(cuda::kernels().softmax_backward[row][dtype](dy.const_data_ptr(), y.const_data_ptr(), dx.mutable_data_ptr(), shape,
                                                       options, space.defined() ? space.mutable_data_ptr() : nullptr, queue));
  }

  static void channel_forward(int row, DType dtype, const Tensor& x, const Tensor& y, Tensors parameters, ChannelShape shape) {
    const void* p[kMaxParameters] = {};
    for (size_t k = 0; k < parameters.size(); ++k) p[k] = parameters[k].const_data_ptr();
    check(cuda::kernels().channel_forward[row][dtype](x.const_data_ptr(), y.mutable_data_ptr(), p, shape, current_queue()));
  }

  static void channel_backward(int row, DType dtype, const Tensor& dy, const Tensor& x, const Tensor& dx, Tensors parameters,
                               Tensors gradients, ChannelShape shape) {
    const void* p[kMaxParameters] = {};
    void* to[kMaxParameters] = {};
    for (size_t k = 0; k < parameters.size(); ++k) p[k] = parameters[k].const_data_ptr();
    for (size_t k = 0; k < gradients.size(); ++k)
      if (gradients[k].defined()) to[k] = gradients[k].mutable_data_ptr();
    Tensor space;
    if (!gradients.empty()) {
      const int64_t bytes = cuda::kernels().channel_workspace(dtype, shape, int(parameters.size()));
      space = Tensor(at::detail::empty_cuda({bytes}, at::kByte, x.device(), std::nullopt));
    }
    check(cuda::kernels().channel_backward[row][dtype](
        dy.const_data_ptr(), x.const_data_ptr(), dx.defined() ? dx.mutable_data_ptr() : nullptr, p, to,
        space.defined() ? space.mutable_data_ptr() : nullptr, shape, current_queue()));
  }

  static void maxout(DType dtype, const Tensor& x, const Tensor& y, const Tensor& index, MaxoutShape shape) {
    check(cuda::kernels().maxout_forward[dtype](x.const_data_ptr(), y.mutable_data_ptr(), index.mutable_data_ptr<uint8_t>(),
                                                shape, current_queue()));
  }

  static void maxout_backward(DType dtype, const Tensor& dy, const Tensor& index, const Tensor& dx, MaxoutShape shape) {
    check(cuda::kernels().maxout_backward[dtype](dy.const_data_ptr(), index.const_data_ptr<uint8_t>(), dx.mutable_data_ptr(),
                                                 shape, current_queue()));
  }

  static void look(DType dtype, const Tensor& x, const Look& a, Tally* tally, Histogram* histogram, uint8_t* units) {
    const Guard guard(x);
    check(cuda::kernels().look[dtype](x.const_data_ptr(), a, tally, histogram, units, current_queue()));
  }

  static constexpr std::nullptr_t kLookAtPart = nullptr, kGather = nullptr;

  static void look_at_rows(DType dtype, const Tensor& y, const RowLook& a, RowTally* tally) {
    const Guard guard(y);
    check(cuda::kernels().look_at_rows[dtype](y.const_data_ptr(), a, tally, current_queue()));
  }
};

TORCH_LIBRARY_IMPL(fastact, CUDA, m) {
  On<CUDA>::register_all(m);
  ChannelsOn<CUDA>::register_all(m);
  m.impl("maxout", maxout<CUDA>);
  m.impl("maxout_backward", maxout_backward<CUDA>);
}

}  // namespace

bool cuda_device_has_kernels(c10::Device device) {
  const auto index = device.has_index() ? device.index() : c10::cuda::current_device();
  return devices().at(index).capability >= 80;
}

}  // namespace fastact
