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

// A layer takes at most 64 KiB: its ledger, its histograms, two bytes per unit and what lies behind them.
constexpr int64_t kMostUnits = (65536 - int64_t(sizeof(Ledger)) - kSides * int64_t(sizeof(Histogram)) - Look::kRun) / 2;
constexpr int64_t kChunk = 1 << 18;
constexpr int64_t kMostCounted = int64_t(1) << 32;
constexpr size_t kMostWidths = 4;
// Samples that go into the histogram: the first ones, and so many of 2^32, spread evenly over the calls.
constexpr int64_t kShownFirst = 8;
constexpr uint32_t kShown = uint32_t(1) << 28;
// What torch.func would have to do with the counters, were they its tensors.
constexpr c10::DispatchKeySet kTransforms({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                           c10::DispatchKey::FuncTorchDynamicLayerBackMode,
                                           c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchVmapMode,
                                           c10::DispatchKey::FuncTorchBatched});

struct Frame {
  Scope* scope;
  std::shared_ptr<Monitor> kept;
  int64_t next = 0;
};
/// Of a thread. In a library that is loaded later, every access to what is thread_local is a call, and one more where it has to
/// be constructed.
struct Here {
  std::vector<Frame> frames;
  Layers* noting = nullptr;
  const Layers* backward = nullptr;
};
constinit thread_local Here* made = nullptr;
[[gnu::noinline]] Here& make_here() {
  thread_local Here only;
  return *(made = &only);
}
Here& here() {
  Here* const only = made;
  return only ? *only : make_here();
}

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

/// Without waiting for what was written before: a kernel's results, to begin with.
template <class T>
void set(std::atomic<T>& to, std::type_identity_t<T> value) {
  to.store(value, std::memory_order_relaxed);
}

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

std::shared_ptr<Layer> make_layer(const Scope& scope, int64_t position, Width width, const Kind& kind, const Tensor& y) {
  Monitor& m = scope.monitor;
  const auto [dim, units] = width;
  const int64_t bytes = (int64_t(sizeof(Ledger)) + 2 * units + Look::kRun + 63) / 64 * 64;
  const c10::InferenceMode counters_outlive_it(false);
  const c10::impl::ExcludeDispatchKeyGuard and_transforms(kTransforms);
  std::deque<Chunk>& chunks = m.chunks[y.device().str()];
  const auto options = at::TensorOptions(y.device());
  if (chunks.empty() || chunks.back().used + bytes > kChunk) chunks.push_back({at::zeros({kChunk}, options.dtype(at::kByte))});
  Chunk& chunk = chunks.back();
  const Tensor histograms = at::zeros({kSides, 2, Histogram::kBins}, options.dtype(at::kInt));
  auto* const place = static_cast<uint8_t*>(chunk.bytes.mutable_data_ptr()) + chunk.used;
  const Counters counters{reinterpret_cast<Ledger*>(place), static_cast<Histogram*>(histograms.mutable_data_ptr()),
                          place + sizeof(Ledger)};
  const auto layer = std::shared_ptr<Layer>(new Layer{
      .state = m.state,
      .counters = counters,
      .levels = kind.row < 0 ? kind.levels : levels(kind.row, kind.parameters),
      .units = units,
      .unit_dim = dim,
      .sample = m.sample,
      .device = y.device(),
      .number = int64_t(m.layers.size()),
      .scope = scope.number,
      .position = position,
      .kind = kind,
      .chunk = int64_t(chunks.size()) - 1,
      .offset = chunk.used,
      .memory = chunk.bytes,
      .histograms = histograms,
  });
  chunk.used += bytes;
  m.layers.push_back(layer);
  return layer;
}

bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }

const std::shared_ptr<Layer>* find(const Layers& layers, int64_t units, const Kind& kind, c10::Device device) {
  const std::shared_ptr<Layer>* other = nullptr;  // of another width
  size_t widths = 0;
  for (const auto& layer : layers) {
    if (layer->device != device || !same(layer->kind.name, kind.name)) continue;
    if (layer->units == units || kind.along_dim) return &layer;
    if (widths++ == 0) other = &layer;
  }
  return widths == kMostWidths ? other : nullptr;
}

std::shared_ptr<Layer> layer_at(Scope& scope, int64_t position, const Kind& kind, const Tensor& y) {
  const Width width = width_of(y, scope.unit_dim);
  const c10::Device device = y.device();
  const auto known = [&] {
    const Layers* const layers = scope.layers_at(position);
    return layers ? find(*layers, width.units, kind, device) : nullptr;
  };
  if (const auto* layer = known()) return *layer;
  const std::lock_guard<std::mutex> lock(scope.monitor.mutex);
  if (const auto* layer = known()) return *layer;  // which another thread has just made
  const auto layer = make_layer(scope, position, width, kind, y);
  scope.add(position, layer);
  return layer;
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

bool in_training(const Layer& layer, int side) { return layer.state->training || (side != kOutput && layer.state->owing); }

/// Sets `a` to which elements of a dense x the next look at that side is at. Two threads may get the same ones. In its place:
/// what was just written in small parts is slow to copy in larger ones.
void next_look(Layer& layer, int side, const Tensor& x, Look& a) {
  const int64_t call = layer.calls[side];
  set(layer.calls[side], call + 1);
  a = Look::at(x.numel(), layer.sample, call, side != kOutput);
  a.low = side == kOutput ? layer.levels.low : kNone;
  a.high = side == kOutput ? layer.levels.high : kNone;
  const bool units = side == kOutput && layer.units > 0 && layer.unit_dim < x.dim() && x.size(layer.unit_dim) == layer.units;
  const bool training = in_training(layer, side), trained = layer.trained;
  if (training || !trained) {
    const int64_t number = training && !trained ? 0 : layer.shown[side].load();
    set(layer.shown[side], number + 1);
    a.shown = a.spacing == Look::kDense || number < kShownFirst || generic::fraction_of(number, 0) < kShown;
  } else {
    a.shown = false;
  }
  a.units = units ? layer.units : 0;
  a.inner = units ? (layer.units == 1 ? x.numel() : x.stride(layer.unit_dim)) : 1;
}

/// Where what is found goes to; under the layer's lock.
Counters counters_for(Layer& layer, int side, const Look& a) {
  layer.sizes[side] += a.n;
  if (in_training(layer, side) && !layer.trained) {
    layer.trained = true;
    const c10::impl::ExcludeDispatchKeyGuard ours(kTransforms);
    layer.histograms.zero_();
    layer.carried.reset();
    layer.counted = 0;
    for (int other = 0; other < kSides; ++other) set(layer.shown[other], other == side);
  }
  const int64_t into_bins = a.shown ? std::min(a.n, a.runs * Look::kRun) : 0;
  if ((layer.counted += into_bins) >= kMostCounted) carry(layer, into_bins);
  return layer.counters;
}

/// Whether n elements there can be looked at for a layer whose monitor is open.
bool watching(const Layer& layer, int side, int64_t n, c10::Device device) {
  State& state = *layer.state;
  if (!state.open) return false;
  if (side != kOutput) set(state.gradients, state.gradients + 1);  // more or less
  return n > 0 && device == layer.device;
}

void came_last(const Layer& layer, const Tensor& y) {
  set(layer.state->last_output, y.const_data_ptr());
  set(layer.state->last_layer, layer.number);
}

}  // namespace

void give_eyes(c10::DeviceType type, const Eyes& of_device) { eyes(type) = &of_device; }

Levels levels(int row, const double* parameters) { return kLevels[row](parameters); }

const Layers* Scope::layers_at(int64_t position) const {
  const Calls* const calls = calls_.load(std::memory_order_acquire);
  return calls && position < int64_t(calls->size()) ? (*calls)[size_t(position)].load(std::memory_order_acquire) : nullptr;
}

void Scope::add(int64_t position, std::shared_ptr<Layer> layer) {
  const auto at = size_t(position), size = all_calls_.empty() ? 0 : all_calls_.back().size();
  if (size <= at) {
    Calls larger(std::max(at + 1, 2 * size));
    for (size_t k = 0; k < size; ++k) larger[k] = all_calls_.back()[k].load();
    calls_.store(&all_calls_.emplace_back(std::move(larger)), std::memory_order_release);
  }
  auto& call = all_calls_.back()[at];
  Layers layers;
  if (call) layers = *call;
  layers.push_back(std::move(layer));
  call.store(&all_layers_.emplace_back(std::move(layers)), std::memory_order_release);
}

void Monitor::start() {
  if (!state->open.exchange(true)) ++monitors;
}

void Monitor::close() {
  if (state->open.exchange(false)) --monitors;
}

Scope& Monitor::add_scope(int64_t unit_dim) {
  const std::lock_guard<std::mutex> lock(mutex);
  return scopes.emplace_back(*this, int64_t(scopes.size()), unit_dim);
}

Scope& Monitor::scope(int64_t number) {
  const std::lock_guard<std::mutex> lock(mutex);
  return scopes.at(size_t(number));
}

bool enter(Scope& scope, bool training, std::shared_ptr<Monitor> kept) {
  State& s = *scope.monitor.state;
  if (s.calls == 0) {
    if (s.running && training && !s.training) return false;
    if (!s.running) set(s.training, training);
  }
  set(s.running, true);
  if (s.recording) here().frames.push_back({&scope, std::move(kept)});
  return true;
}

int64_t leave(Scope& scope) {
  auto& frames = here().frames;
  for (size_t k = frames.size(); k-- > 0;)
    if (frames[k].scope == &scope) {
      const int64_t calls = frames[k].next;
      // Frames of this monitor above it belong to modules that an exception has left.
      for (size_t above = frames.size(); above-- > k;)
        if (&frames[above].scope->monitor == &scope.monitor) frames.erase(frames.begin() + int64_t(above));
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

std::shared_ptr<Layer> output(Scope& scope, const Kind& kind, const Tensor& y) {
  if (!scope.monitor.state->open || !has_eyes(y)) return nullptr;
  const auto layer = layer_at(scope, 0, kind, y);
  look(*layer, kOutput, y);
  came_last(*layer, y);
  look_at_rows(*layer, kind, y);
  return layer;
}

const Layers& layers_of(const Kind& kind, const Tensor& y, Layers& room) {
  Here& h = here();
  auto& frames = h.frames;
  Layers& layers = h.noting ? *std::exchange(h.noting, nullptr) : room;
  for (size_t k = frames.size(); k-- > 0;) {
    Frame& frame = frames[k];
    bool inner = false;  // whether a frame above belongs to the same monitor
    const Monitor& monitor = frame.scope->monitor;
    for (size_t above = k + 1; above < frames.size(); ++above) inner = inner || &frames[above].scope->monitor == &monitor;
    if (inner || !monitor.state->open) continue;
    layers.push_back(layer_at(*frame.scope, frame.next++, kind, y));
    came_last(*layers.back(), y);
  }
  return layers;
}

Noting::Noting(Layers* layers) {
  if (!layers || !active()) return;
  place_ = &here().noting;
  before_ = std::exchange(*place_, layers);
}
Noting::~Noting() {
  if (place_) *place_ = before_;
}

void look(Layer& layer, int side, const Tensor& given) {
  if (!watching(layer, side, given.numel(), given.device()) || !has_eyes(given)) return;
  const Tensor x = to_dense(given);
  Look a;
  next_look(layer, side, x, a);
  const std::lock_guard<Latch> lock(layer.latch);
  const Counters to = counters_for(layer, side, a);
  eyes(x.device().type())->look(dtype_of("monitor", x), x, a, &to.ledger->sides[side], &to.histograms[side], to.flags);
}

void look_at_rows(Layer& layer, const Kind& kind, const Tensor& y) {
  if (!kind.along_dim || y.numel() == 0) return;
  const Tensor x = to_dense(y);
  const SoftmaxShape shape = shape_of(x, at::maybe_wrap_dim(kind.dim, x.dim()));
  const int64_t rows = shape.outer * shape.inner;
  int64_t looked = rows;
  const int64_t sample = Look::sample_of(layer.sample, x.numel());
  if (sample < x.numel()) looked = std::max<int64_t>(1, sample / shape.length);
  const std::lock_guard<Latch> lock(layer.latch);
  layer.length = shape.length;
  const RowLook a{shape.length,
                  shape.inner,
                  looked,
                  rows / looked,
                  layer.row_calls++,
                  kind.logarithms,
                  shape.length > 1 ? 1 / std::log(double(shape.length)) : 0};
  eyes(x.device().type())->look_at_rows(dtype_of("monitor", x), x, a, &layer.counters.ledger->rows);
}

void Sights::prepare(const Layers& layers, int side, DType dtype, const Tensor& x) {
  side_ = side, x_ = &x;
  const c10::Device device = x.device();
  eyes_ = eyes(device.type());
  Sample* last = nullptr;
  for (const auto& layer : layers) {
    if (!eyes_->look_at_part || (layer->sample == Look::kAll && x.numel() > kRuns * Look::kRun)) {
      others_.push_back(layer.get());
    } else if (watching(*layer, side, x.numel(), device)) {
      Sample& s = last ? *(last->next = std::make_unique<Sample>()) : first_;
      s.kernel = eyes_->look_at_part(dtype);
      s.x = x.const_data_ptr();
      next_look(*layer, side, x, s.look);
      s.layer = layer.get();
      s.glimpses = glimpses_, s.bins = bins_;
      if (last || s.look.runs > kRuns) {
        s.more.reset(new Glimpse[size_t(s.look.runs)]);
        s.more_bins.reset(new Bins[s.look.shown ? size_t(s.look.runs) : 0]);
        s.glimpses = s.more.get(), s.bins = s.more_bins.get();
      }
      last = &s;
    }
  }
}

void Sights::add_up(Held& held) {
  const GatherKernel gather = eyes_->gather();
  for (const Sample* s = first(); s; s = s->next.get()) {
    if (held.mutex() != &s->layer->latch) {
      held = {};  // never two of them
      held = Held(s->layer->latch);
    }
    const Counters to = counters_for(*s->layer, side_, s->look);
    gather(s->look, 0, s->look.runs, s->glimpses, s->bins, &to.ledger->sides[side_], &to.histograms[side_], to.flags);
  }
}

Backward::Backward(const Layers& layers) {
  if (!active()) return;
  place_ = &here().backward;
  *place_ = layers.empty() ? nullptr : &layers;
}
Backward::~Backward() {
  if (place_) *place_ = nullptr;
}

const Layers& backward_of() {
  static const Layers none;
  const Layers* const layers = active() ? std::exchange(here().backward, nullptr) : nullptr;
  return layers ? *layers : none;
}

}  // namespace fastact::watch
