// Monitors: which layer a call belongs to, and where its counters are.
#include "watch.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "../look.h"
#include "device_ops.h"

namespace fastact::watch {

std::atomic<int> monitors{0};

namespace {

// A layer takes at most 64 KiB: its ledger, its histograms, two bytes per unit.
constexpr int64_t kMostUnits = (65536 - int64_t(sizeof(Ledger)) - kSides * int64_t(sizeof(Histogram))) / 2;
constexpr int64_t kChunk = 1 << 18;
constexpr int64_t kMostCounted = int64_t(1) << 32;
constexpr size_t kMostWidths = 4;
// What torch.func would have to do with the counters, were they its tensors.
constexpr c10::DispatchKeySet kTransforms({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                           c10::DispatchKey::FuncTorchDynamicLayerBackMode,
                                           c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchVmapMode,
                                           c10::DispatchKey::FuncTorchBatched});

struct Frame {
  std::shared_ptr<Monitor> monitor;
  int64_t scope;
  int64_t next = 0;
};
thread_local std::vector<Frame> frames;
thread_local std::vector<std::weak_ptr<Layer>> last;  // which must not keep a closed monitor's memory
thread_local const Layers* next_backward = nullptr;

const Eyes*& eyes(c10::DeviceType type) {
  static const Eyes* all[int(c10::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES)] = {};
  return all[int(type)];
}

template <template <class> class Functor>
Levels levels_of(const double* p) {
  const Functor<double> f(p);
  const double infinity = std::numeric_limits<double>::infinity();
  const auto y = [&](double x) { return f.forward(x); };
  const auto slope = [&](double x) { return std::abs(f.backward(1.0, Functor<double>::saves_input(p) ? x : y(x))); };
  const double bottom = y(-infinity), top = y(infinity);
  if (!std::isfinite(bottom) || !std::isfinite(top) || bottom == top) return {};
  double steepest = 0;
  for (int e = -64; e <= 64; ++e)
    for (double sign : {-1.0, 1.0})
      if (slope(sign * std::exp2(e)) > slope(steepest)) steepest = sign * std::exp2(e);
  const double enough = kSaturated * slope(steepest);
  const auto end = [&](double sign) {
    double steep = 0, flat = std::exp2(-64);
    while (slope(steepest + sign * flat) >= enough && flat < 0x1p64) flat *= 2;
    for (int step = 0; step < 200; ++step) {
      const double middle = (steep + flat) / 2;
      (slope(steepest + sign * middle) >= enough ? steep : flat) = middle;
    }
    return y(steepest + sign * flat);
  };
  const double before = end(-1), after = end(1);
  return {std::min(before, after), std::max(before, after)};
}
using LevelsOf = Levels (*)(const double*);
#define FASTACT_LEVELS(name, Functor, ...) levels_of<generic::Functor>,
constexpr LevelsOf kLevels[] = {FASTACT_ACTIVATIONS(FASTACT_LEVELS)};
#undef FASTACT_LEVELS

/// Of x, or of a copy of it, dense.
Tensor to_dense(const Tensor& x) { return dense(x) ? x : copy_as(x, x); }

/// What a transform of torch.func wraps has no memory of its own.
bool has_eyes(const Tensor& x) {
  return has_kernels(x.scalar_type()) && x.layout() == at::kStrided && x.has_storage() && eyes(x.device().type());
}

struct Width {
  int64_t dim, units;
};

/// Along which dim y has units, and how many; -1 and 0 where it has none or too many.
Width width_of(const Tensor& y, int64_t unit_dim) {
  const int64_t rank = y.dim();
  const int64_t dim = unit_dim == Scope::kByRank ? (rank > 3 ? 1 : rank - 1) : unit_dim < 0 ? unit_dim + rank : unit_dim;
  const int64_t units = 0 <= dim && dim < rank ? y.size(dim) : 0;
  return 0 < units && units <= kMostUnits ? Width{dim, units} : Width{-1, 0};
}

std::shared_ptr<Layer> make_layer(Monitor& m, int64_t scope, int64_t position, Width width, const Kind& kind, const Tensor& y) {
  const auto [dim, units] = width;
  const int64_t bytes = (int64_t(sizeof(Ledger)) + 2 * units + 15) / 16 * 16;
  const c10::InferenceMode counters_outlive_it(false);
  const c10::impl::ExcludeDispatchKeyGuard and_transforms(kTransforms);
  std::deque<Chunk>& chunks = m.chunks[y.device().str()];
  const auto options = at::TensorOptions(y.device());
  if (chunks.empty() || chunks.back().used + bytes > kChunk) chunks.push_back({at::zeros({kChunk}, options.dtype(at::kByte))});
  Chunk& chunk = chunks.back();
  const Tensor place = chunk.bytes.narrow(0, chunk.used, bytes);
  auto layer = std::shared_ptr<Layer>(new Layer{
      .number = int64_t(m.layers.size()),
      .scope = scope,
      .position = position,
      .kind = kind,
      .device = y.device(),
      .chunk = int64_t(chunks.size()) - 1,
      .offset = chunk.used,
      .units = units,
      .unit_dim = dim,
      .levels = kind.row < 0 ? kind.levels : levels(kind.row, kind.parameters),
      .ledger = place,
      .histograms = at::zeros({kSides, 2, Histogram::kBins}, options.dtype(at::kInt)),
      .flags = place.narrow(0, int64_t(sizeof(Ledger)), 2 * units),
      .sample = m.sample,
      .monitor = m.weak_from_this(),
  });
  chunk.used += bytes;
  m.layers.push_back(layer);
  return layer;
}

std::shared_ptr<Layer> layer_at(Monitor& m, int64_t scope, int64_t position, const Kind& kind, const Tensor& y) {
  const std::lock_guard<std::mutex> lock(m.mutex);
  Scope& s = m.scopes[size_t(scope)];
  if (int64_t(s.calls.size()) <= position) s.calls.resize(size_t(position) + 1);
  Layers& layers = s.calls[size_t(position)];
  const Width width = width_of(y, s.unit_dim);
  std::shared_ptr<Layer> other;  // of another width
  size_t widths = 0;
  for (const auto& layer : layers) {
    if (layer->device != y.device() || strcmp(layer->kind.name, kind.name) != 0) continue;
    if (layer->units == width.units || kind.along_dim) return layer;
    if (widths++ == 0) other = layer;
  }
  if (widths == kMostWidths) return other;
  return layers.emplace_back(make_layer(m, scope, position, width, kind, y));
}

/// Makes room in the bins for n more elements.
void carry(Layer& layer, int64_t n) {
  const c10::InferenceMode counters_outlive_it(false);
  const c10::impl::ExcludeDispatchKeyGuard and_transforms(kTransforms);
  const Tensor counts = layer.histograms.to(at::kLong).bitwise_and(0xffffffff);
  const Tensor carried = counts.div(kCarry, "floor").to(at::kInt);
  layer.carried = layer.carried.defined() ? layer.carried.add(carried) : carried;
  layer.histograms.copy_(counts.remainder(kCarry));
  layer.counted = kCarry + n;
}

struct Counters {
  Ledger* ledger;
  Histogram* histograms;
  uint8_t* flags;

  explicit Counters(const Layer& layer)
      : ledger(reinterpret_cast<Ledger*>(layer.ledger.mutable_data_ptr())),
        histograms(reinterpret_cast<Histogram*>(layer.histograms.mutable_data_ptr())),
        flags(static_cast<uint8_t*>(layer.flags.mutable_data_ptr())) {}
};

/// Which elements of a dense x the next look at that side is at. Under the layer's lock.
Look next_look(Layer& layer, bool training, int side, const Tensor& x) {
  Look a = Look::at(x.numel(), layer.sample, layer.calls[side]++);
  layer.sizes[side] += x.numel();
  a.low = side == kOutput ? layer.levels.low : kNone;
  a.high = side == kOutput ? layer.levels.high : kNone;
  const bool units = side == kOutput && layer.units > 0 && layer.unit_dim < x.dim() && x.size(layer.unit_dim) == layer.units;
  if (training && !std::exchange(layer.trained, true)) {
    const c10::impl::ExcludeDispatchKeyGuard ours(kTransforms);
    layer.histograms.zero_();
    layer.carried.reset();
    layer.counted = 0;
  }
  if (!training && layer.trained) a.thinned = 0;
  const int64_t into_bins = a.thinned > 0 ? std::min(a.n, a.runs * Look::kRun) : 0;
  if ((layer.counted += into_bins) >= kMostCounted) carry(layer, into_bins);
  a.units = units ? layer.units : 0;
  a.inner = units ? (layer.units == 1 ? x.numel() : x.stride(layer.unit_dim)) : 1;
  return a;
}

/// The monitor of a layer that x can be looked at for; else null.
std::shared_ptr<Monitor> watching(const Layer& layer, int side, const Tensor& x) {
  std::shared_ptr<Monitor> monitor = layer.monitor.lock();
  if (!monitor || !monitor->open) return nullptr;
  if (side != kOutput) ++monitor->gradients;
  return x.numel() > 0 && x.device() == layer.device && has_eyes(x) ? monitor : nullptr;
}

void came_last(const Layer& layer, const Tensor& y) {
  if (const auto monitor = layer.monitor.lock()) {
    monitor->last_output = y.const_data_ptr();
    monitor->last_layer = layer.number;
  }
}

}  // namespace

void give_eyes(c10::DeviceType type, const Eyes& of_device) { eyes(type) = &of_device; }

Levels levels(int row, const double* parameters) { return kLevels[row](parameters); }

void Monitor::start() {
  if (!open.exchange(true)) ++monitors;
}

void Monitor::close() {
  if (open.exchange(false)) --monitors;
}

int64_t Monitor::add_scope(int64_t unit_dim) {
  const std::lock_guard<std::mutex> lock(mutex);
  scopes.push_back({unit_dim, {}});
  return int64_t(scopes.size()) - 1;
}

bool Monitor::enter(int64_t scope, bool training_) {
  if (calls == 0) {
    if (running && training_ && !training) return false;
    if (!running) training = training_;
  }
  running = true;
  if (recording) frames.push_back({shared_from_this(), scope});
  return true;
}

int64_t Monitor::leave(int64_t scope) {
  for (size_t k = frames.size(); k-- > 0;)
    if (frames[k].monitor.get() == this && frames[k].scope == scope) {
      const int64_t calls = frames[k].next;
      // Frames of this monitor above it belong to modules that an exception has left.
      for (size_t above = frames.size(); above-- > k;)
        if (frames[above].monitor.get() == this) frames.erase(frames.begin() + int64_t(above));
      return calls;
    }
  return -1;
}

Tensor to_host(const Chunk& chunk) {
  const c10::InferenceMode counters_outlive_it(false);
  const c10::impl::ExcludeDispatchKeyGuard and_transforms(kTransforms);
  const Tensor counters = chunk.bytes.narrow(0, 0, chunk.used);
  const Tensor copy = at::empty(counters.sizes(), at::TensorOptions(at::kByte).pinned_memory(true));
  copy.copy_(counters, /*non_blocking=*/true);
  counters.zero_();
  return copy;
}

std::shared_ptr<Layer> Monitor::output(int64_t scope, const Kind& kind, const Tensor& y) {
  if (!open || !has_eyes(y)) return nullptr;
  const auto layer = layer_at(*this, scope, 0, kind, y);
  look(*layer, kOutput, y);
  came_last(*layer, y);
  look_at_rows(*layer, kind, y);
  return layer;
}

Layers layers_of(const Kind& kind, const Tensor& y) {
  Layers layers;
  last.clear();
  for (size_t k = frames.size(); k-- > 0;) {
    Frame& frame = frames[k];
    bool inner = false;  // whether a frame above belongs to the same monitor
    for (size_t above = k + 1; above < frames.size(); ++above) inner = inner || frames[above].monitor == frame.monitor;
    if (inner || !frame.monitor->open) continue;
    layers.push_back(layer_at(*frame.monitor, frame.scope, frame.next++, kind, y));
    came_last(*layers.back(), y);
    last.push_back(layers.back());
  }
  return layers;
}

Layers noted() {
  Layers layers;
  for (const auto& layer : std::exchange(last, {}))
    if (auto held = layer.lock()) layers.push_back(std::move(held));
  return layers;
}

void look(Layer& layer, int side, const Tensor& given) {
  const auto monitor = watching(layer, side, given);
  if (!monitor) return;
  const Tensor x = to_dense(given);
  const std::lock_guard<std::mutex> lock(layer.mutex);
  const Look a = next_look(layer, monitor->training, side, x);
  const Counters to(layer);
  eyes(x.device().type())->look(dtype_of("monitor", x), x, a, &to.ledger->sides[side], &to.histograms[side], to.flags);
}

void look_at_rows(Layer& layer, const Kind& kind, const Tensor& y) {
  if (!kind.along_dim || y.numel() == 0) return;
  const Tensor x = to_dense(y);
  const SoftmaxShape shape = shape_of(x, at::maybe_wrap_dim(kind.dim, x.dim()));
  const int64_t rows = shape.outer * shape.inner;
  int64_t looked = rows;
  if (layer.sample > 0 && layer.sample < x.numel()) looked = std::max<int64_t>(1, layer.sample / shape.length);
  const std::lock_guard<std::mutex> lock(layer.mutex);
  layer.length = shape.length;
  const RowLook a{shape.length,
                  shape.inner,
                  looked,
                  rows / looked,
                  layer.row_calls++,
                  kind.logarithms,
                  shape.length > 1 ? 1 / std::log(double(shape.length)) : 0};
  eyes(x.device().type())->look_at_rows(dtype_of("monitor", x), x, a, &Counters(layer).ledger->rows);
}

void Sights::prepare(const Layers& layers) {
  const Tensor& x = *x_;
  for (const auto& layer : layers) {
    const bool sample = 0 < layer->sample && layer->sample < x.numel();
    if (!sample || !has_eyes(x) || !eyes(x.device().type())->look_at_copy) {
      others_.push_back(layer);
    } else if (const auto monitor = watching(*layer, side_, x)) {
      const std::lock_guard<std::mutex> lock(layer->mutex);
      Look a = next_look(*layer, monitor->training, side_, x);
      a.gathered = true;
      samples_.push_back({layer, a, std::unique_ptr<char[]>(new char[size_t(a.runs * Look::kRun * x.element_size())])});
    }
  }
}

void Sights::copy(int64_t begin, int64_t end) {
  const int64_t size = x_->element_size();
  const char* const from = static_cast<const char*>(x_->const_data_ptr());
  for (const auto& [layer, a, runs] : samples_) {
    // Run j lies among the elements from j * spacing on, and before the next ones.
    const int64_t last = std::min(a.runs, (end + a.spacing - 1) / a.spacing);
    for (int64_t j = begin / a.spacing; j < last; ++j) {
      const int64_t start = generic::start_of(a, j), i = std::max(start, begin), stop = std::min(start + Look::kRun, end);
      if (i < stop) memcpy(runs.get() + (j * Look::kRun + i - start) * size, from + i * size, size_t((stop - i) * size));
    }
  }
}

void Sights::look_at_copies() {
  for (const auto& [layer, a, runs] : samples_) {
    const std::lock_guard<std::mutex> lock(layer->mutex);
    const Counters to(*layer);
    eyes(x_->device().type())
        ->look_at_copy(dtype_of("monitor", *x_), runs.get(), a, &to.ledger->sides[side_], &to.histograms[side_], to.flags);
  }
}

Backward::Backward(const Layers& layers) { next_backward = layers.empty() || !active() ? nullptr : &layers; }
Backward::~Backward() { next_backward = nullptr; }

const Layers& backward_of() {
  static const Layers none;
  const Layers* const layers = active() ? std::exchange(next_backward, nullptr) : nullptr;
  return layers ? *layers : none;
}

}  // namespace fastact::watch
