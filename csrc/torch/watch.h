// What open monitors see of the activations: ops report what they have computed, and the layers that it belongs to are looked
// at. Python says which module is at work (module.cpp, fastact/sight/monitor.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../kernels.h"

namespace fastact::watch {

using at::Tensor;

/// How many monitors are open. Where there is none, that is all an op asks.
extern std::atomic<int> monitors;
inline bool active() { return monitors.load(std::memory_order_relaxed) > 0; }

/// How a device looks at dense tensors; asynchronous on CUDA.
struct Eyes {
  void (*look)(DType, const Tensor& x, const Look&, Tally*, Histogram*, uint8_t* units);
  void (*look_at_rows)(DType, const Tensor& y, const RowLook&, RowTally*);
  // At gathered runs; null where whole tensors are looked at.
  void (*look_at_copy)(DType, const void* runs, const Look&, Tally*, Histogram*, uint8_t* units);
};
template <class Device>
constexpr Eyes kEyes{Device::look, Device::look_at_rows, Device::kLookAtCopy};

/// Of tensors on that kind of device; registered by the file of its kernels.
void give_eyes(c10::DeviceType, const Eyes&);

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

/// From which outputs on a squashing function is saturated: where its derivative is below kSaturated of its largest. NaN, both,
/// for a function that is not bounded on both sides.
struct Levels {
  double low = kNone, high = kNone;
};

/// An activation with its parameters. `row`: of activations.h; -1 for those of softmax.h, and for what has no row.
struct Kind {
  const char* name;
  int row = -1;
  double parameters[kMaxParameters] = {};
  bool along_dim = false, logarithms = false;
  int64_t dim = 0;
  Levels levels = {};  // where there is no row that tells them
};

constexpr double kSaturated = 1 - 0.97 * 0.97;  // |tanh x| > 0.97
Levels levels(int row, const double* parameters);

/// Device memory for the ledgers and the unit flags of many layers, so that one copy takes all of them to the host.
struct Chunk {
  Tensor bytes;
  int64_t used = 0;
};

/// A copy of the counters of a chunk on a GPU, which is there once the current stream has come so far, and sets them to 0.
Tensor to_host(const Chunk& chunk);

struct Monitor;

/// Bins have 32 bits.
constexpr int64_t kCarry = 1 << 16;

/// The counters of one activation on one device.
struct Layer {
  int64_t number;           // among all of the monitor
  int64_t scope, position;  // which module called it, and as which of its calls of activations
  Kind kind;
  c10::Device device;
  int64_t chunk, offset;    // where its ledger is, followed by its unit flags
  int64_t units, unit_dim;  // as Look has them; the dim of the first output
  int64_t length = 0;       // of a softmax: of the last rows
  Levels levels;
  Tensor ledger, histograms, flags;  // views of the chunk, and kSides histograms
  Tensor carried;                    // of the histograms, in units of kCarry; undefined until a bin might overflow
  int64_t counted = 0;               // since then: at least what any bin has
  int64_t calls[kSides] = {}, row_calls = 0;
  int64_t sizes[kSides] = {};  // elements, looked at or not
  bool trained = false;        // the histograms are those of training; while there was none, of evaluation
  int64_t sample;
  std::weak_ptr<Monitor> monitor;
  std::mutex mutex;
};
using Layers = std::vector<std::shared_ptr<Layer>>;

/// What lies below one module: the layers of its first call of an activation, of its second, and so on. There is more than one
/// where a call is now of one activation and now of another, or on several devices.
struct Scope {
  int64_t unit_dim;  // kByRank: the last one of up to three dims, else the second
  std::vector<Layers> calls;
  static constexpr int64_t kByRank = INT64_MIN;
};

struct Monitor : std::enable_shared_from_this<Monitor> {
  int64_t sample;  // at most so many elements of a tensor; 0: all
  std::atomic<bool> open = false;
  std::atomic<bool> running = false;   // whether a module was entered since this was last set to false
  std::atomic<bool> recording = true;  // what is entered otherwise is not looked at
  std::atomic<bool> training = true;   // the mode of what comes
  std::atomic<int> calls{0};           // of the watched model, that have begun and not ended
  std::deque<Scope> scopes;
  Layers layers;                                    // in the order of their first calls
  std::map<std::string, std::deque<Chunk>> chunks;  // by device
  std::mutex mutex;

  std::atomic<int64_t> gradients{0};  // looked at
  // Where the last output is, and which of the layers made it.
  std::atomic<const void*> last_output{nullptr};
  std::atomic<int64_t> last_layer{-1};

  explicit Monitor(int64_t sample_) : sample(sample_) {}
  ~Monitor() { close(); }
  void start();
  void close();
  /// A new scope. `unit_dim`: that of its calls.
  int64_t add_scope(int64_t unit_dim);
  /// From now on, in this thread, calls of activations belong to that scope; until it is left. Unless that is not called in
  /// the mode of the step, and nobody but the module's own flag, `training`, could say so: false, then.
  bool enter(int64_t scope, bool training);
  /// How many calls of ours there were; -1 where it was not entered.
  int64_t leave(int64_t scope);
  /// For an output that no op of ours has computed.
  std::shared_ptr<Layer> output(int64_t scope, const Kind& kind, const Tensor& y);
};

/// The layers that y, a dense tensor that an op of ours computes, is the next output of.
Layers layers_of(const Kind& kind, const Tensor& y);
/// Those that the last layers_of() of this thread has found, once.
Layers noted();

/// Looks at one side of a layer; x may have any layout.
void look(Layer& layer, int side, const Tensor& x);

/// Looks at what the rows of y are like, the output of a softmax.
void look_at_rows(Layer& layer, const Kind& kind, const Tensor& y);

/// A look at a dense tensor by all layers that it belongs to. Of a sample every thread copies the part that it has just
/// computed, or is about to read: afterwards it would have to be fetched, run by run, from that thread's cache.
class Sights {
 public:
  Sights() = default;
  /// x outlives it.
  Sights(const Layers& layers, int side, const Tensor& x) : side_(side), x_(&x) {
    if (!layers.empty()) prepare(layers);
  }
  /// Elements [begin, end) are there, and this thread is at them.
  void part(int64_t begin, int64_t end) {
    if (!samples_.empty()) copy(begin, end);
  }
  /// All are there: the look of those layers that have no sample.
  void whole() {
    for (const auto& layer : others_) look(*layer, side_, *x_);
  }
  /// All have been told of: the look at the samples.
  void together() {
    if (!samples_.empty()) look_at_copies();
  }

 private:
  struct Sample {
    std::shared_ptr<Layer> layer;
    Look look;
    std::unique_ptr<char[]> runs;
  };
  void prepare(const Layers& layers);
  void copy(int64_t begin, int64_t end);
  void look_at_copies();

  int side_ = 0;
  const Tensor* x_ = nullptr;
  std::vector<Sample> samples_;
  Layers others_;
};

/// While it lives, the next backward op of this thread belongs to these layers.
struct Backward {
  explicit Backward(const Layers& layers);
  ~Backward();
};
/// Those layers, once; none where nobody watches.
const Layers& backward_of();

}  // namespace fastact::watch
