// The loops of activations with parameters per channel, and the sums of their gradients: for every functor and storage type.
#pragma once

#include "../channels.h"
#include "elementwise.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

// ---- Lanes -----------------------------------------------------------------------------------------------------------------

/// One number in all lanes.
template <class S>
FASTACT_FN LaneOf<S> broadcast(const S* p) {
  auto word = Packed<S>{}[0];
  __builtin_memcpy(&word, p, sizeof word);
  return Format<S>::unpack(Packed<S>{} + word);
}

/// The first n lanes of v, 0 in the others: what those add to a sum is not for certain 0 where a parameter is not finite.
template <class L>
FASTACT_FN L first_lanes(L v, int n) {
  if (n == L::lanes) return v;
  typename L::Bits keep;
  for (int l = 0; l < L::lanes; ++l) keep[l] = l < n ? -1 : 0;
  return L((typename L::Raw)((typename L::Bits)v.raw & keep));
}

template <class L>
FASTACT_FN double sum_of_lanes(L v) {
  double sum = 0;
  for (int l = 0; l < L::lanes; ++l) sum += v.raw[l];
  return sum;
}

template <class L>
FASTACT_FN L lanes_at(const typename L::Element* p) {
  L v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class L>
FASTACT_FN void set_lanes(typename L::Element* p, L v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// ---- Along lines
// -------------------------------------------------------------------------------------------------------------

/// Calls f(first element, elements, channel, unit) for units of work that are chunks of lines.
template <class F>
FASTACT_FN void each_line(const ChannelShape& s, const ChannelWork& w, int64_t begin, int64_t end, const F& f) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t line = unit / w.after, start = (unit - line * w.after) * ChannelWork::kChunk;
    const int64_t rest = s.inner - start;
    f(line * s.inner + start, rest < ChannelWork::kChunk ? rest : ChannelWork::kChunk, line % s.channels, unit);
  }
}

/// The functor with the parameters of a channel.
template <template <class> class Functor, class S>
FASTACT_FN auto of_channel(const void* const* parameters, int64_t channel) {
  using V = typename Computed<S>::Lane;
  constexpr int K = Functor<V>::parameters;
  V p[K];
  for (int k = 0; k < K; ++k) p[k] = broadcast(static_cast<const S*>(parameters[k]) + channel);
  return Functor<V>(p);
}

// ---- Down columns
// ------------------------------------------------------------------------------------------------------------

/// A tile of the matrix: a unit of work.
struct Tile {
  int64_t row, rows, column, width;  // width: of the matrix
  int columns;

  FASTACT_FN Tile(const ChannelShape& s, const ChannelWork& w, int64_t unit) : width(s.channels * s.inner * w.repeat) {
    const int64_t across = (width + ChannelWork::kColumns - 1) / ChannelWork::kColumns;
    row = unit / across * ChannelWork::kRows;
    column = unit % across * ChannelWork::kColumns;
    const int64_t all = (s.outer + w.repeat - 1) / w.repeat;
    rows = all - row < ChannelWork::kRows ? all - row : ChannelWork::kRows;
    columns = int(width - column < ChannelWork::kColumns ? width - column : ChannelWork::kColumns);
  }

  /// Calls f(first element, elements) for each row; the last of the tensor may be shorter than the others.
  template <class F>
  FASTACT_FN void each_row(int64_t n, const F& f) const {
    for (int64_t r = row; r < row + rows; ++r) {
      const int64_t first = r * width + column, rest = n - first;
      if (rest > 0) f(first, int(rest < columns ? rest : columns));
    }
  }
};

/// A number for each column of a tile, with space for a vector that begins at the last.
template <class S>
struct Columns {
  using L = LaneOf<S>;
  using Element = typename L::Element;
  alignas(64) Element v[ChannelWork::kColumns + L::lanes];

  /// The parameters of the columns' channels.
  FASTACT_FN void take(const S* parameters, const ChannelShape& s, const Tile& t) {
    int64_t channel = t.column / s.inner % s.channels, inner = t.column % s.inner;
    for (int j = 0; j < t.columns; channel = channel == s.channels ? 0 : channel, inner = 0) {
      // Neighbouring channels one by one, or one channel several times.
      const int64_t run = s.inner == 1 ? s.channels - channel : s.inner - inner;
      const int count = int(run < t.columns - j ? run : t.columns - j);
      for (int k = 0; k < count; k += L::lanes) {
        const int rest = count - k < L::lanes ? count - k : L::lanes;
        const S* p = parameters + channel;
        set_lanes(v + j + k, s.inner == 1 ? load_some(p + k, rest, L(0)) : broadcast(p));
      }
      j += count;
      channel += s.inner == 1 ? count : 1;
    }
  }
};

template <template <class> class Functor, class S>
struct ColumnParameters {
  using V = typename Computed<S>::Lane;
  static constexpr int K = Functor<V>::parameters;
  Columns<S> columns[K];

  FASTACT_FN ColumnParameters(const void* const* parameters, const ChannelShape& s, const Tile& t) {
    for (int k = 0; k < K; ++k) columns[k].take(static_cast<const S*>(parameters[k]), s, t);
  }
  FASTACT_FN Functor<V> at(int column) const {
    V p[K];
    for (int k = 0; k < K; ++k) p[k] = lanes_at<LaneOf<S>>(columns[k].v + column);
    return Functor<V>(p);
  }
};

/// Calls f(i, lanes) for vectors of n neighbours.
template <class S, class F>
FASTACT_FN void each_step(int n, const F& f) {
  constexpr int N = LaneOf<S>::lanes;
  int i = 0;
  for (; i + N <= n; i += N) f(i, N);
  if (i < n) f(i, n - i);
}

// ---- Kernels
// -----------------------------------------------------------------------------------------------------------------

template <template <class> class Functor, class S>
void channel_forward(const void* x_, void* y_, const void* const* parameters, ChannelShape s, int64_t begin, int64_t end) {
  using L = LaneOf<S>;
  using V = typename Computed<S>::Lane;
  const S* x = static_cast<const S*>(x_);
  S* y = static_cast<S*>(y_);
  const ChannelWork w = channel_work(s);
  if (w.lines) {
    each_line(s, w, begin, end, [&](int64_t first, int64_t n, int64_t channel, int64_t) __attribute__((always_inline)) {
      const auto f = of_channel<Functor, S>(parameters, channel);
      map(x + first, y + first, n, [&](V v) __attribute__((always_inline)) -> L { return f.forward(v); });
    });
    return;
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const Tile tile(s, w, unit);
    const ColumnParameters<Functor, S> p(parameters, s, tile);
    tile.each_row(s.outer * s.channels * s.inner, [&](int64_t first, int n) __attribute__((always_inline)) {
      each_step<S>(n, [&](int i, int lanes) __attribute__((always_inline)) {
        const int64_t at = first + i;
        will_write(y + at);
        const V v = load_some(x + at, lanes, L(0));
        store_some(y + at, lanes, L(p.at(i).forward(v)));
      });
    });
  }
}

template <template <class> class Functor, class S, bool kWrite, bool kSum>
void channel_gradients(const S* dy, const S* x, S* dx, const void* const* parameters, double* sums, const ChannelShape& s,
                       int64_t begin, int64_t end) {
  using L = LaneOf<S>;
  using V = typename Computed<S>::Lane;
  constexpr int K = Functor<V>::parameters;
  const ChannelWork w = channel_work(s);
  const int64_t count = w.before * s.channels * w.after;
  if (w.lines) {
    each_line(s, w, begin, end, [&](int64_t first, int64_t n, int64_t channel, int64_t unit) __attribute__((always_inline)) {
      const auto f = of_channel<Functor, S>(parameters, channel);
      L total[K];
      for (int k = 0; k < K; ++k) total[k] = L(0);
      map_gradient<kWrite>(dy + first, x + first, dx + first, n,
                           [&](V v, V kept, int lanes) __attribute__((always_inline)) -> L {
                             V terms[K];
                             const L result = f.backward(v, kept, terms);
                             for (int k = 0; kSum && k < K; ++k) total[k] = total[k] + first_lanes(L(terms[k]), lanes);
                             return result;
                           });
      for (int k = 0; kSum && k < K; ++k) sums[k * count + unit] = sum_of_lanes(total[k]);
    });
    return;
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const Tile tile(s, w, unit);
    const ColumnParameters<Functor, S> p(parameters, s, tile);
    Columns<S> totals[K];
    for (int k = 0; kSum && k < K; ++k) __builtin_memset(&totals[k], 0, sizeof totals[k]);
    tile.each_row(s.outer * s.channels * s.inner, [&](int64_t first, int n) __attribute__((always_inline)) {
      each_step<S>(n, [&](int i, int lanes) __attribute__((always_inline)) {
        const int64_t at = first + i;
        V terms[K];
        const V v = load_some(dy + at, lanes, L(0)), kept = load_some(x + at, lanes, L(0));
        const L result = p.at(i).backward(v, kept, terms);
        if constexpr (kWrite) {
          will_write(dx + at);
          store_some(dx + at, lanes, result);
        }
        for (int k = 0; kSum && k < K; ++k) {
          auto* total = totals[k].v + i;
          set_lanes(total, lanes_at<L>(total) + first_lanes(L(terms[k]), lanes));
        }
      });
    });
    double* to = sums + tile.row / ChannelWork::kRows * tile.width + tile.column;
    for (int k = 0; kSum && k < K; ++k)
      for (int j = 0; j < tile.columns; ++j) to[k * count + j] = totals[k].v[j];
  }
}

template <template <class> class Functor, class S>
void channel_backward(const void* dy_, const void* x_, void* dx_, const void* const* parameters, double* sums, ChannelShape s,
                      int64_t begin, int64_t end) {
  const S* dy = static_cast<const S*>(dy_);
  const S* x = static_cast<const S*>(x_);
  S* dx = static_cast<S*>(dx_);
  if (!sums)
    channel_gradients<Functor, S, true, false>(dy, x, dx, parameters, sums, s, begin, end);
  else if (dx)
    channel_gradients<Functor, S, true, true>(dy, x, dx, parameters, sums, s, begin, end);
  else
    channel_gradients<Functor, S, false, true>(dy, x, dx, parameters, sums, s, begin, end);
}

template <class S>
void channel_totals(const double* sums, double* totals, void* gradient, ChannelShape s) {
  using L = LaneOf<S>;
  const ChannelWork w = channel_work(s);
  for (int64_t c = 0; c < s.channels; ++c) totals[c] = 0;
  for (int64_t i = 0; i < w.before; ++i)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t j = 0; j < w.after; ++j) totals[c] += *sums++;
  for (int64_t c = 0; c < s.channels; ++c) store_some(static_cast<S*>(gradient) + c, 1, L(totals[c]));
}

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
