// The ops on the CPU: how work is shared among threads, and the kernels.
#include "cpu.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>

#include <mutex>

#include "channel_ops.h"
#include "device_ops.h"
#include "maxout_ops.h"
#include "pool.h"

#ifndef _OPENMP
#error "at::parallel_for is silently serial unless this file is compiled with -fopenmp"
#endif

namespace fastact {
namespace {

// ---- Threads ---------------------------------------------------------------------------------------------------------

// A child made by fork has none of its parent's OpenMP threads, and waiting for them would never end: it computes alone.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Elements per thread below which another thread costs more than it brings, for results that are as good as copied and for
// those that take an exponential each. Measured with two threads of an AVX-512 Xeon, where the second costs 1.1 us: relu and
// every backward, 16 elements a nanosecond in L1, are as fast with one thread at 24,000 to 33,000 elements; sigmoid, tanh and
// elu, four a nanosecond, at 8,000 to 12,000.
constexpr int64_t kGrain = 32768, kCostlyGrain = 8192;
// Elementwise work is cut at multiples of this, so that every thread starts on a cache line if the tensor does, and that what a
// monitor looks at together is one thread's.
constexpr int64_t kBlock = 1024;
static_assert(kBlock % Look::kRun == 0);

template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= grain || forked)
    f(int64_t(0), n);
  else
    at::parallel_for(0, n, grain, f);
}

template <class F>
void parallel_elements(int64_t n, int64_t grain, const F& f) {
  if (n <= grain) return f(int64_t(0), n);
  parallel((n + kBlock - 1) / kBlock, grain / kBlock,
           [&](int64_t begin, int64_t end) { f(begin * kBlock, std::min(n, end * kBlock)); });
}

template <class F>
void parallel_units(const SoftmaxShape& s, int64_t grain, const F& f) {
  const int64_t elements = s.length * (s.inner > 1 ? kSoftmaxColumns : 1);
  parallel(softmax_units(s), std::max<int64_t>(1, grain / elements), f);
}

template <class F>
void parallel_channels(const ChannelShape& s, int64_t grain, const F& f) {
  const int64_t units = channel_work(s).units, elements = s.outer * s.channels * s.inner / units;
  parallel(units, std::max<int64_t>(1, grain / std::max<int64_t>(1, elements)), f);
}

template <class F>
void parallel_maxout(const MaxoutShape& s, const F& f) {
  const int64_t units = maxout_units(s), elements = s.outer * s.groups * s.pieces * s.inner / units;
  parallel(units, std::max<int64_t>(1, kGrain / elements), f);
}

// ---- Kernels ---------------------------------------------------------------------------------------------------------------

struct CPU {
  static constexpr c10::DeviceType kType = c10::DeviceType::CPU;
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static Tensor empty_as(const Tensor& x) {
    constexpr c10::DispatchKeySet keys(c10::DispatchKey::CPU);
    c10::Allocator* const allocator = pool::allocator(x.numel() * x.element_size());
    if (x.is_contiguous()) return Tensor(at::detail::empty_generic(x.sizes(), allocator, keys, x.scalar_type(), std::nullopt));
    return Tensor(at::detail::empty_strided_generic(x.sizes(), x.strides(), allocator, keys, x.scalar_type()));
  }

  static void forward(int row, DType dtype, const Tensor& x, const Tensor& y, const double* parameters, Sights* seen) {
    const Forward kernel = cpu::kernels().forward[row][dtype];
    const int64_t size = x.element_size();
    const char* from = static_cast<const char*>(x.const_data_ptr());
    char* to = static_cast<char*>(y.mutable_data_ptr());
    parallel_elements(x.numel(), kRows[row].costly ? kCostlyGrain : kGrain, [&](int64_t begin, int64_t end) {
      if (seen) seen->fetch();
      kernel(from + begin * size, to + begin * size, end - begin, parameters);
      if (seen) seen->part(begin, end);
    });
  }

  static void backward(int row, DType dtype, const Tensor& dy, const Tensor& saved, const Tensor& dx, const double* parameters,
                       Sights* dy_seen, Sights* dx_seen) {
    const Backward kernel = cpu::kernels().backward[row][dtype];
    const int64_t size = dy.element_size();
    const char* from = static_cast<const char*>(dy.const_data_ptr());
    const char* kept = static_cast<const char*>(saved.const_data_ptr());
    char* to = static_cast<char*>(dx.mutable_data_ptr());
    parallel_elements(dy.numel(), kGrain, [&](int64_t begin, int64_t end) {
      if (dx_seen) dx_seen->fetch();
      if (dy_seen) dy_seen->part(begin, end);
      kernel(from + begin * size, kept + begin * size, to + begin * size, end - begin, parameters);
      if (dx_seen) dx_seen->part(begin, end);
    });
  }

  static void softmax(int row, DType dtype, const Tensor& x, const Tensor& y, SoftmaxShape shape, SoftmaxOptions options) {
    const SoftmaxForward kernel = cpu::kernels().softmax_forward[row][dtype];
    const void* from = x.const_data_ptr();
    void* to = y.mutable_data_ptr();
    parallel_units(shape, kCostlyGrain, [&](int64_t begin, int64_t end) { kernel(from, to, shape, options, begin, end); });
  }

  static void softmax_backward(int row, DType dtype, const Tensor& dy, const Tensor& y, const Tensor& dx, SoftmaxShape shape,
                               SoftmaxOptions options) {
    const SoftmaxBackward kernel = cpu::kernels().softmax_backward[row][dtype];
    const void* from = dy.const_data_ptr();
    const void* kept = y.const_data_ptr();
    void* to = dx.mutable_data_ptr();
    parallel_units(shape, shape.inner > 1 ? kCostlyGrain : kGrain,
                   [&](int64_t begin, int64_t end) { kernel(from, kept, to, shape, options, begin, end); });
  }

  static void channel_forward(int row, DType dtype, const Tensor& x, const Tensor& y, Tensors parameters, ChannelShape shape) {
    const ChannelForward kernel = cpu::kernels().channel_forward[row][dtype];
    const void* from = x.const_data_ptr();
    void* to = y.mutable_data_ptr();
    const Arrays p(parameters);
    parallel_channels(shape, kChannelRows[row].costly ? kCostlyGrain : kGrain,
                      [&](int64_t begin, int64_t end) { kernel(from, to, p.data, shape, begin, end); });
  }

  static void channel_backward(int row, DType dtype, const Tensor& dy, const Tensor& x, const Tensor& dx, Tensors parameters,
                               Tensors gradients, ChannelShape shape) {
    const ChannelBackward kernel = cpu::kernels().channel_backward[row][dtype];
    const ChannelWork work = channel_work(shape);
    const int64_t count = work.before * shape.channels * work.after;
    const void* from = dy.const_data_ptr();
    const void* kept = x.const_data_ptr();
    void* to = dx.defined() ? dx.mutable_data_ptr() : nullptr;
    const Arrays p(parameters);
    // Not set to zero, as that of a vector would be.
    const std::unique_ptr<double[]> sums(gradients.empty() ? nullptr
                                                           : new double[int64_t(gradients.size()) * count + shape.channels]);
    parallel_channels(shape, kChannelRows[row].costly ? kCostlyGrain : kGrain,
                      [&](int64_t begin, int64_t end) { kernel(from, kept, to, p.data, sums.get(), shape, begin, end); });
    double* const totals = sums.get() + int64_t(gradients.size()) * count;
    for (size_t k = 0; k < gradients.size(); ++k)
      if (gradients[k].defined())
        cpu::kernels().channel_totals[dtype](sums.get() + int64_t(k) * count, totals, gradients[k].mutable_data_ptr(), shape);
  }

  static void maxout(DType dtype, const Tensor& x, const Tensor& y, const Tensor& index, MaxoutShape shape) {
    const MaxoutForward kernel = cpu::kernels().maxout_forward[dtype];
    const void* from = x.const_data_ptr();
    void* to = y.mutable_data_ptr();
    uint8_t* which = index.mutable_data_ptr<uint8_t>();
    parallel_maxout(shape, [&](int64_t begin, int64_t end) { kernel(from, to, which, shape, begin, end); });
  }

  static void maxout_backward(DType dtype, const Tensor& dy, const Tensor& index, const Tensor& dx, MaxoutShape shape) {
    const MaxoutBackward kernel = cpu::kernels().maxout_backward[dtype];
    const void* from = dy.const_data_ptr();
    const uint8_t* which = index.const_data_ptr<uint8_t>();
    void* to = dx.mutable_data_ptr();
    parallel_maxout(shape, [&](int64_t begin, int64_t end) { kernel(from, which, to, shape, begin, end); });
  }

  /// In pieces that follow from the tensor alone, so that the sums do not depend on the number of threads.
  static void look(DType dtype, const Tensor& x, const Look& a, Tally* tally, Histogram* histogram, uint8_t* units) {
    constexpr int64_t kPiece = 1024;
    const LookKernel kernel = cpu::kernels().look[dtype];
    const GatherKernel gather = cpu::kernels().gather;
    const void* from = x.const_data_ptr();
    if (a.spacing != Look::kDense || a.runs <= kPiece) {
      const std::unique_ptr<Glimpse[]> glimpses(new Glimpse[a.runs]);
      const std::unique_ptr<Bins[]> bins(a.shown ? new Bins[a.runs] : nullptr);
      kernel(from, a, 0, a.n, 0, glimpses.get(), bins.get());
      return gather(a, 0, a.runs, glimpses.get(), bins.get(), tally, histogram, units);
    }
    const int64_t pieces = (a.runs + kPiece - 1) / kPiece;
    std::vector<Tally> tallies(pieces);
    std::mutex mutex;
    parallel(pieces, 1, [&](int64_t begin, int64_t end) {
      constexpr int64_t kRuns = 32;
      Glimpse glimpses[kRuns];
      Bins bins[kRuns];
      const auto counts = std::make_unique<Histogram>();
      std::vector<uint8_t> flags(2 * a.units + Look::kRun);
      for (int64_t j = begin * kPiece; j < std::min(a.runs, end * kPiece); j += kRuns) {
        const int64_t next = std::min(a.runs, j + kRuns);
        kernel(from, a, j * Look::kRun, next * Look::kRun, j, glimpses, bins);
        gather(a, j, next, glimpses, bins, &tallies[j / kPiece], counts.get(), flags.data());
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (int sign : {0, 1})
        for (int bin = 0; bin < Histogram::kBins; ++bin) histogram->counts[sign][bin] += counts->counts[sign][bin];
      for (int64_t k = 0; k < 2 * a.units; ++k) units[k] |= flags[k];
    });
    for (const Tally& t : tallies) {
      tally->count += t.count, tally->zeros += t.zeros, tally->low += t.low, tally->high += t.high;
      tally->nan += t.nan, tally->infinite += t.infinite;
      tally->largest = std::max(tally->largest, t.largest), tally->smallest = std::max(tally->smallest, t.smallest);
      tally->total += t.total, tally->squares += t.squares;
    }
  }

  static LookKernel look_at_part(DType dtype) { return cpu::kernels().look[dtype]; }
  static constexpr auto kLookAtPart = look_at_part;
  static GatherKernel gather() { return cpu::kernels().gather; }
  static constexpr auto kGather = gather;

  static void look_at_rows(DType dtype, const Tensor& y, const RowLook& a, RowTally* tally) {
    cpu::kernels().look_at_rows[dtype](y.const_data_ptr(), a, tally);
  }

 private:
  struct Arrays {
    const void* data[kMaxParameters];
    explicit Arrays(Tensors parameters) {
      for (size_t k = 0; k < parameters.size(); ++k) data[k] = parameters[k].const_data_ptr();
    }
  };
};

TORCH_LIBRARY_IMPL(fastact, CPU, m) {
  On<CPU>::register_all(m);
  ChannelsOn<CPU>::register_all(m);
  m.impl("maxout", maxout<CPU>);
  m.impl("maxout_backward", maxout_backward<CPU>);
}

// ---- Without the dispatcher ------------------------------------------------------------------------------------------------

/// Whether this is the only reference to dy, and dy the only one to its memory. Memory with another deleter may have an owner
/// outside torch, such as a NumPy array.
Gradient after_use(const Tensor& dy) {
  if (dy.use_count() != 1 || !dy.has_storage()) return Gradient::kept;
  const c10::Storage& storage = dy.storage();
  const c10::DeleterFnPtr deleter = storage.data_ptr().get_deleter();
  const bool ours = deleter == c10::GetCPUAllocator()->raw_deleter() || pool::gave(deleter);
  return ours && storage.use_count() == 1 && storage.nbytes() == dy.nbytes() ? Gradient::overwritten : Gradient::kept;
}

}  // namespace

bool plain(const Tensor& x) {
  using enum c10::DispatchKey;
  // The keys that the dispatcher would go by. One may be excluded that x has not: in a backward, torch before 2.13 excludes
  // Named.
  constexpr c10::DispatchKeySet keys({CPU, ADInplaceOrView, AutogradCPU, AutocastCPU});
  constexpr c10::DispatchKeySet expected = (keys | c10::default_included_set) - c10::default_excluded_set;
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  return ((x.key_set() | local.included_) - local.excluded_) == expected && !at::hasCallbacks();
}

Tensor cpu_forward(int row, const Tensor& x, const double* parameters) { return forward<CPU>(row, x, parameters); }
Tensor cpu_softmax(int row, const Tensor& x, int64_t dim, const SoftmaxOptions& options) {
  return softmax<CPU>(row, x, dim, options);
}

Tensor cpu_backward(int row, Tensor&& dy, const Tensor& saved, const double* parameters) {
  return backward<CPU>(row, dy, saved, parameters, after_use(dy));
}
Tensor cpu_softmax_backward(int row, Tensor&& dy, const Tensor& y, int64_t dim, const SoftmaxOptions& options) {
  return softmax_backward<CPU>(row, dy, y, dim, options, after_use(dy));
}

}  // namespace fastact
