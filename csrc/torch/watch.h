// What open monitors see of the activations: ops report what they have computed, and the layers that it belongs to are looked
// at. Python says which module is at work (module.cpp, fastact/sight/monitor.py).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <atomic>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
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
  // At the parts that a thread has just computed, and what is then made of it; null where there are none.
  LookKernel (*look_at_part)(DType);
  GatherKernel (*gather)();
};
template <class Device>
constexpr Eyes kEyes{Device::look, Device::look_at_rows, Device::kLookAtPart, Device::kGather};

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

/// What is at work under a monitor; its layers have it too, and may outlive it.
struct State {
  std::atomic<bool> open = false;
  std::atomic<bool> running = false;   // whether a module was entered since this was last set to false
  std::atomic<bool> recording = true;  // what is entered otherwise is not looked at
  std::atomic<bool> training = true;   // the mode of what comes
  std::atomic<bool> owing = false;     // gradients that come are those of training, whatever that mode is
  std::atomic<int> calls{0};           // of the watched model, that have begun and not ended
  std::atomic<int64_t> gradients{0};   // looked at
  // Where the last output is, and which of the layers made it.
  std::atomic<const void*> last_output{nullptr};
  std::atomic<int64_t> last_layer{-1};
};

/// Bins have 32 bits.
constexpr int64_t kCarry = 1 << 16;

/// In the memory of a device.
struct Counters {
  Ledger* ledger = nullptr;
  Histogram* histograms = nullptr;  // kSides of them
  uint8_t* flags = nullptr;         // of the units
};

/// What is held for a moment, and seldom by two. Taking and leaving a mutex both wait until all that this thread has written
/// is in its cache; of this one, taking it does.
class Latch {
 public:
  void lock() {
    while (held_.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  }
  void unlock() { held_.clear(std::memory_order_release); }

 private:
  std::atomic_flag held_ = {};
};

/// The counters of one activation on one device.
struct Layer {
  // What every look asks for, close together.
  std::shared_ptr<State> state;
  Counters counters;
  Levels levels;
  int64_t units, unit_dim;  // as Look has them; the dim of the first output
  int64_t sample;
  std::atomic<int64_t> calls[kSides] = {}, shown[kSides] = {};  // of the latter, those that the histograms are of
  Latch latch = {};                                             // for what follows from what was counted
  int64_t sizes[kSides] = {};                                   // elements, looked at or not
  int64_t counted = 0;                                          // at least what any bin has, since the last carry
  std::atomic<bool> trained = false;  // the histograms are those of training; while there was none, of evaluation
  c10::Device device;
  int64_t number;  // among all of the monitor

  int64_t row_calls = 0, length = 0;  // of a softmax: the length of the last rows
  int64_t scope, position;            // which module called it, and as which of its calls of activations
  Kind kind;
  int64_t chunk, offset;      // where its ledger is, followed by its unit flags
  Tensor memory, histograms;  // that of the chunk, and of the histograms
  Tensor carried = {};        // of the histograms, in units of kCarry; undefined until a bin might overflow
};
using Layers = c10::SmallVector<std::shared_ptr<Layer>, 1>;
struct Monitor;

/// What lies below one module: the layers of its first call of an activation, of its second, and so on. There is more than one
/// where a call is now of one activation and now of another, or on several devices.
struct Scope {
  Monitor& monitor;
  int64_t number;    // among those of the monitor
  int64_t unit_dim;  // kByRank: the last one of up to three dims, else the second
  static constexpr int64_t kByRank = INT64_MIN;

  Scope(Monitor& m, int64_t n, int64_t dim) : monitor(m), number(n), unit_dim(dim) {}
  /// The layers of a call; null where there is none. No lock is needed.
  const Layers* layers_at(int64_t position) const;
  /// One more; under the monitor's lock.
  void add(int64_t position, std::shared_ptr<Layer> layer);

 private:
  using Calls = std::vector<std::atomic<const Layers*>>;
  // What is read without a lock never changes: something else takes its place, and it stays.
  std::atomic<const Calls*> calls_ = nullptr;
  std::deque<Calls> all_calls_;
  std::deque<Layers> all_layers_;
};

struct Monitor {
  int64_t sample;  // how many elements of a tensor, as Look has it
  const std::shared_ptr<State> state = std::make_shared<State>();
  std::deque<Scope> scopes;
  std::vector<std::shared_ptr<Layer>> layers;       // in the order of their first calls
  std::map<std::string, std::deque<Chunk>> chunks;  // by device
  std::mutex mutex;

  explicit Monitor(int64_t sample_) : sample(sample_) {}
  ~Monitor() { close(); }
  void start();
  void close();
  /// A new scope. `unit_dim`: that of its calls.
  Scope& add_scope(int64_t unit_dim);
  Scope& scope(int64_t number);
};

/// From now on, in this thread, calls of activations belong to that scope; until it is left. Unless that is not called in the
/// mode of the step, and nobody but the module's own flag, `training`, could say so: false, then. `kept`: its monitor, unless
/// the caller keeps it until it leaves.
bool enter(Scope&, bool training, std::shared_ptr<Monitor> kept = nullptr);
/// How many calls of ours there were; -1 where it was not entered.
int64_t leave(Scope&);
/// For an output that no op of ours has computed.
std::shared_ptr<Layer> output(Scope&, const Kind& kind, const Tensor& y);

/// The layers that y, a dense tensor that an op of ours computes, is the next output of: in `room`, unless they are noted.
const Layers& layers_of(const Kind& kind, const Tensor& y, Layers& room);

/// While it lives, the layers of the next output of this thread go to these, which are empty.
class Noting {
 public:
  /// None where `layers` is null, or nobody watches.
  explicit Noting(Layers* layers);
  ~Noting();

 private:
  Layers** place_ = nullptr;
  Layers* before_ = nullptr;
};

/// Looks at one side of a layer; x may have any layout.
void look(Layer& layer, int side, const Tensor& x);

/// Looks at what the rows of y are like, the output of a softmax.
void look_at_rows(Layer& layer, const Kind& kind, const Tensor& y);

/// A look at a dense tensor by all layers that it belongs to. Every thread looks at the part of a sample that it has just
/// computed, or is about to read: afterwards it would have to be fetched, run by run, from that thread's cache.
class Sights {
 public:
  Sights() = default;
  Sights(const Sights&) = delete;
  /// Of x, which a kernel of ours is at; both outlive it.
  void prepare(const Layers& layers, int side, DType dtype, const Tensor& x);
  /// Brings closer what part() reads, which another thread has just written.
  void fetch() const {
    const char* const lines = reinterpret_cast<const char*>(&first_);
    __builtin_prefetch(lines), __builtin_prefetch(lines + 64);
  }
  /// Elements [begin, end) are there, and this thread is at them; cut at multiples of Look::kRun.
  void part(int64_t begin, int64_t end) {
    for (const Sample* s = first(); s; s = s->next.get()) s->kernel(s->x, s->look, begin, end, 0, s->glimpses, s->bins);
  }
  /// All are there: the look of those layers that have no sample.
  void whole() {
    for (Layer* layer : others_) look(*layer, side_, *x_);
  }
  /// All have been told of: what was found in the samples is added up. `held`: the lock of a layer, or none, before and after.
  using Held = std::unique_lock<Latch>;
  void together(Held& held) {
    if (first()) add_up(held);
  }
  void together() {
    Held held;
    together(held);
  }

 private:
  // What the threads read begins with two lines of a cache, next to each other.
  struct alignas(128) Sample {
    LookKernel kernel = nullptr;
    const void* x;
    Glimpse* glimpses;
    Bins* bins;
    std::unique_ptr<Sample> next;
    Look look;
    Layer* layer;
    std::unique_ptr<Glimpse[]> more;
    std::unique_ptr<Bins[]> more_bins;
  };
  static constexpr int64_t kRuns = 32;
  const Sample* first() const { return first_.kernel ? &first_ : nullptr; }
  void add_up(Held& held);

  Sample first_;  // if there is one, it has a kernel
  const Eyes* eyes_ = nullptr;
  c10::SmallVector<Layer*, 1> others_;
  int side_ = 0;
  const Tensor* x_ = nullptr;
  // For the first sample, if it has no more runs.
  Glimpse glimpses_[kRuns];
  Bins bins_[kRuns];
};

/// While it lives, the next backward op of this thread belongs to these layers.
class Backward {
 public:
  explicit Backward(const Layers& layers);
  ~Backward();

 private:
  const Layers** place_ = nullptr;
};
/// Those layers, once; none where nobody watches.
const Layers& backward_of();

}  // namespace fastact::watch
