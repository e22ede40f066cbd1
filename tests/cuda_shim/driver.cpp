// Runs the CUDA kernels under the shim and checks what they compute. `driver DTYPE` checks all kernels; `driver table` prints
// how many of the 65,536 numbers of each 16-bit type come out one step off, for errors that the hardware may have.
#include <array>
#include <string>

#include "../../csrc/activations.h"
#include "../../csrc/channels.h"
#include "../../csrc/kernels.h"
#include "../../csrc/softmax.h"
#include "cuda_shim.h"

using namespace fastact;

namespace {

// ---- Numbers -------------------------------------------------------------------------------------------------------------

struct Float64 {
  static constexpr DType dtype = kFloat64;
  using Bits = uint64_t;
  static constexpr int precision = 53, least_exponent = -1022;
};
struct Float32 {
  static constexpr DType dtype = kFloat32;
  using Bits = uint32_t;
  static constexpr int precision = 24, least_exponent = -126;
};
struct BFloat16 {
  static constexpr DType dtype = kBFloat16;
  using Bits = uint16_t;
  static constexpr int precision = 8, least_exponent = -126;
};
struct Float16 {
  static constexpr DType dtype = kFloat16;
  using Bits = uint16_t;
  static constexpr int precision = 11, least_exponent = -14;
};

template <class To, class From>
To pattern(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

double value(Float64, uint64_t bits) { return pattern<double>(bits); }
double value(Float32, uint32_t bits) { return pattern<float>(bits); }
double value(BFloat16, uint16_t bits) { return pattern<float>(uint32_t(bits) << 16); }
double value(Float16, uint16_t bits) { return double(pattern<_Float16>(bits)); }

/// All its digits.
std::string text(double x) {
  char digits[32];
  snprintf(digits, sizeof digits, "%.17g", x);
  return digits;
}

/// The distance of neighbours of that type at x.
template <class T>
double spacing(double x) {
  int exponent = 0;
  frexp(x, &exponent);
  return ldexp(1, std::max(exponent, T::least_exponent + 1) - T::precision);
}

/// The nearest of that type, in double (which holds them all).
template <class T>
double rounded(double x) {
  if constexpr (T::precision == 53) return x;
  if (!std::isfinite(x) || x == 0) return x;
  const double r = nearbyint(x / spacing<T>(x)) * spacing<T>(x);
  const double infinity = T::precision == 11 ? 65536 : ldexp(1, 128);
  return fabs(r) >= infinity ? copysign(HUGE_VAL, r) : r;
}
template <class T>
typename T::Bits bits_of(double x) {
  if constexpr (T::precision == 53) return pattern<uint64_t>(x);
  const float f = float(rounded<T>(x));
  if constexpr (T::precision == 24) return pattern<uint32_t>(f);
  if constexpr (T::precision == 8) return uint16_t((pattern<uint32_t>(f) >> 16) | (std::isnan(f) ? 0x40 : 0));
  return pattern<uint16_t>(_Float16(f));
}

template <class T>
bool same(typename T::Bits a, typename T::Bits b) {
  return a == b || (std::isnan(value(T(), a)) && std::isnan(value(T(), b)));
}
/// Steps from one number to another of that type.
template <class T>
int64_t steps(typename T::Bits a, typename T::Bits b) {
  using Bits = typename T::Bits;
  const Bits sign = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
  const auto ordinal = [&](Bits x) { return x & sign ? -int64_t(x ^ sign) : int64_t(x); };
  return same<T>(a, b) ? 0 : std::abs(ordinal(a) - ordinal(b));
}

// ---- Buffers -------------------------------------------------------------------------------------------------------------

struct Byte {
  using Bits = uint8_t;
};

/// A heap block of just n numbers, `offset` of them after an address aligned to 16, so that the sanitizer sees every overrun.
template <class T>
struct Buffer {
  using Bits = typename T::Bits;
  std::unique_ptr<unsigned char, void (*)(void*)> block;
  Bits* p;
  size_t n;

  explicit Buffer(size_t n_, int offset = 0)
      : block(static_cast<unsigned char*>(malloc((n_ + size_t(offset)) * sizeof(Bits))), free),
        p(reinterpret_cast<Bits*>(block.get()) + offset),
        n(n_) {
    memset(block.get(), 0xff, (n + size_t(offset)) * sizeof(Bits));
  }
  Buffer(const Buffer& other, int offset) : Buffer(other.n, offset) { memcpy(p, other.p, n * sizeof(Bits)); }
  bool operator==(const Buffer& other) const {
    for (size_t i = 0; i < n; ++i)
      if (!same<T>(p[i], other.p[i])) return false;
    return true;
  }
};

std::mt19937_64 generator(20261121);

template <class T>
void fill_normal(Buffer<T>& b, double scale, double offset = 0) {
  std::normal_distribution<double> normal(offset, scale);
  for (size_t i = 0; i < b.n; ++i) b.p[i] = bits_of<T>(normal(generator));
}
/// Numbers as people have them, between any bit patterns: subnormals, infinities, NaN.
template <class T>
void fill_wild(Buffer<T>& b) {
  std::normal_distribution<double> normal(0, 5);
  for (size_t i = 0; i < b.n; ++i) b.p[i] = generator() % 2 ? bits_of<T>(normal(generator)) : typename T::Bits(generator());
}

std::string where;
[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "%s: %s\n", where.c_str(), what.c_str());
  exit(1);
}
void expect(bool condition, const char* what) {
  if (!condition) fail(what);
}

struct Device {
  cuda::Queue queue;
  int most_blocks_of_cluster;
};
// One whose clusters are smaller than the longest rows could use has a way of its own.
const Device kDevices[] = {{{nullptr, 132, 90}, 16}, {{nullptr, 4, 80}, 1}, {{nullptr, 132, 90}, 2}};
// So few multiprocessors that a block gets more than one tile of a tensor that is still quick to run.
const cuda::Queue kSmallest = {nullptr, 1, 80};

const cuda::Queue& use(const Device& device) {
  shim::most_blocks_of_cluster = device.most_blocks_of_cluster;
  return device.queue;
}

// ---- Rows ----------------------------------------------------------------------------------------------------------------

struct RowOf {
  const char* name;
  int parameters;
  bool costly;
  double (*exact)(double x, const double* parameters);
};
template <template <class> class Functor>
double exact(double x, const double* parameters) {
  return Functor<double>(parameters).forward(x);
}
#define ROW_OF(name, Functor, ...)                                                                            \
  RowOf{#name, int(std::initializer_list<const char*>{__VA_ARGS__}.size()), generic::Functor<double>::costly, \
        exact<generic::Functor>},
const RowOf kRows[] = {FASTACT_ACTIVATIONS(ROW_OF)};

/// Defaults, both signs, zero, and what is no power of two.
std::vector<std::array<double, 2>> parameter_sets(int count) {
  if (count == 0) return {{0, 0}};
  if (count == 1) return {{0.01, 0}, {1, 0}, {0, 0}, {1.5, 0}, {-0.3, 0}};
  return {{1, 1}, {4, 1}, {-1, 1}, {2.5, -0.7}, {0, 1}};
}

/// Bit for bit the CPU's. Where the hardware approximates, and only a twin stands here, within a step and nearly always.
template <class T>
void compare(const Buffer<T>& got, const Buffer<T>& expected, long* off) {
  for (size_t i = 0; i < got.n; ++i) {
    const int64_t far = steps<T>(got.p[i], expected.p[i]);
    if (far == 0) continue;
    if (T::dtype != kBFloat16 || far > 1)
      fail("element " + std::to_string(i) + " is " + text(value(T(), got.p[i])) + ", the CPU's " +
           text(value(T(), expected.p[i])));
    ++*off;
  }
}

template <class T>
void check_rows() {
  long cases = 0, off = 0, elements = 0;
  // More than two tiles for each of its blocks.
  const size_t kManyTiles = 64 * 2 * 512 * (16 / sizeof(typename T::Bits)) + 5;
  const size_t sizes[] = {0,  1,  2,   3,   7,   8,   9,   15,   16,   17,    31,    33,        63,
                          64, 65, 100, 255, 257, 511, 513, 2047, 4099, 16385, 70001, kManyTiles};
  for (int row = 0; row < int(std::size(kRows)); ++row)
    for (const auto& parameters : parameter_sets(kRows[row].parameters))
      for (size_t n : sizes) {
        if (n > 5000 && parameters != parameter_sets(kRows[row].parameters)[0]) continue;
        for (int offset = 0; offset < (n == kManyTiles ? 1 : n > 300 ? 3 : 9); ++offset) {
          // Inputs and output begin elsewhere: both at the same distance from an aligned address, or one of them just there.
          const int x_offset = offset % 3 == 2 ? 0 : offset, dy_offset = 3 * x_offset % 8;
          const int y_offset = offset % 3 == 1 ? 0 : offset;
          where = std::string(kRows[row].name) + ", " + std::to_string(n) + " elements from " + std::to_string(offset);
          const cuda::Queue queue = n == kManyTiles ? kSmallest : kDevices[cases++ % 2].queue;
          elements += 2 * long(n);
          Buffer<T> x(n, x_offset), dy(n, dy_offset), y(n, y_offset), expected(n);
          fill_wild(x);
          fill_wild(dy);
          cpu::kernels().forward[row][T::dtype](x.p, expected.p, int64_t(n), parameters.data());
          expect(cuda::kernels().forward[row][T::dtype](x.p, y.p, int64_t(n), parameters.data(), queue) == 0, "launch");
          compare(y, expected, &off);
          Buffer<T> inplace(x, x_offset);
          expect(cuda::kernels().forward[row][T::dtype](inplace.p, inplace.p, int64_t(n), parameters.data(), queue) == 0,
                 "launch");
          expect(inplace == y, "in place differs");

          Buffer<T> dx(n, y_offset);
          cpu::kernels().backward[row][T::dtype](dy.p, x.p, expected.p, int64_t(n), parameters.data());
          expect(cuda::kernels().backward[row][T::dtype](dy.p, x.p, dx.p, int64_t(n), parameters.data(), queue) == 0, "launch");
          compare(dx, expected, &off);
          for (const bool over_dy : {true, false}) {
            Buffer<T> over(over_dy ? dy : x, over_dy ? dy_offset : x_offset);
            const auto* gradient = over_dy ? over.p : dy.p;
            const auto* saved = over_dy ? x.p : over.p;
            expect(cuda::kernels().backward[row][T::dtype](gradient, saved, over.p, int64_t(n), parameters.data(), queue) == 0,
                   "launch");
            expect(over == dx, "backward in place differs");
          }
        }
      }
  printf("rows: %ld cases, %ld elements, %ld a step from the CPU's\n", cases, elements, off);
  expect(off * 10000 < elements, "too many are a step off");
}

// ---- Softmax -------------------------------------------------------------------------------------------------------------

enum Values { kNormal, kWide, kEqual, kFar, kMasked, kHuge, kAllMasked, kOneNaN, kOneInfinity, kValues };

template <class T>
void fill(Buffer<T>& x, Values values, const SoftmaxShape& s) {
  fill_normal(x, values == kWide ? 40 : 3, values == kFar && sizeof(typename T::Bits) > 2 ? 1e7 : 0);
  const auto set = [&](size_t i, double to) { x.p[i] = bits_of<T>(to); };
  for (size_t i = 0; i < x.n; ++i) {
    if (values == kEqual) set(i, 0.7);
    if (values == kHuge) set(i, T::precision == 11 ? 6e4 : 1e14);
    if (values == kAllMasked || (values == kMasked && generator() % 3 == 0)) set(i, -HUGE_VAL);
  }
  // In the middle of the first row, in memory order.
  const size_t middle = size_t(s.length / 2 * s.inner);
  if (values == kOneNaN) set(middle, NAN);
  if (values == kOneInfinity) set(middle, HUGE_VAL);
  if (values == kMasked) set(0, 1.5);
}

template <class T>
using Workspace = std::unique_ptr<unsigned char, void (*)(void*)>;

/// A row of softmax.h with its options.
struct Along {
  const char* name;
  int row;
  SoftmaxOptions options;
  bool plain() const { return options.temperature == 1 && !options.masked_zero; }
  bool logarithm() const { return name == std::string("log_softmax"); }
};
/// The defaults, and of those that take options others, which no multiplication by 1 and no row of finite numbers would show.
std::vector<Along> all_along() {
  std::vector<Along> all;
  int row = 0;
#define ALONG(name, Functor)                                              \
  all.push_back({#name, row, {}});                                        \
  if (generic::Functor<double>::tempered) {                               \
    all.push_back({#name " at a temperature of 0.3", row, {0.3, true}});  \
    all.push_back({#name " at a temperature of 2.5", row, {2.5, false}}); \
    all.push_back({#name " with masked rows of 0", row, {1, true}});      \
  }                                                                       \
  ++row;
  FASTACT_SOFTMAXES(ALONG)
#undef ALONG
  return all;
}

template <class T>
Buffer<T> softmax(const Along& a, const Buffer<T>& x, const SoftmaxShape& s, cuda::Queue queue) {
  Buffer<T> y(x.n);
  const int64_t bytes = cuda::kernels().softmax_workspace(a.row, T::dtype, s, false, queue);
  Workspace<T> space(static_cast<unsigned char*>(malloc(size_t(bytes))), free);
  expect(cuda::kernels().softmax_forward[a.row][T::dtype](x.p, y.p, s, a.options, space.get(), queue) == 0, "launch");
  return y;
}
template <class T>
Buffer<T> softmax_backward(const Along& a, const Buffer<T>& dy, const Buffer<T>& y, const SoftmaxShape& s, cuda::Queue queue) {
  Buffer<T> dx(y.n);
  const int64_t bytes = cuda::kernels().softmax_workspace(a.row, T::dtype, s, true, queue);
  Workspace<T> space(static_cast<unsigned char*>(malloc(size_t(bytes))), free);
  expect(cuda::kernels().softmax_backward[a.row][T::dtype](dy.p, y.p, dx.p, s, a.options, space.get(), queue) == 0, "launch");
  return dx;
}

/// Against sums in long double. The unit is that of the type computed in; to it comes one rounding to T. An exponential is off
/// by what rounds x - m, by as much twice for the product with the rounded 1 / temperature, a few units more, and where the
/// hardware approximates, once more what rounds (x - m) log2(e). A logarithm is off by what its sum is, relatively.
template <class T>
void check_softmax_values(const Along& a, const Buffer<T>& x, const Buffer<T>& y, const Buffer<T>& dy, const Buffer<T>& dx,
                          const SoftmaxShape& s) {
  const int distances = (sizeof(typename T::Bits) == 2 ? 2 : 1) + (a.options.temperature == 1 ? 0 : 2);
  const double unit = T::precision == 53 ? 0x1p-53 : 0x1p-24, smallest = T::precision == 53 ? 0x1p-1022 : 0x1p-126;
  const auto check = [&](double got, long double exact, long double error, int64_t j) {
    if constexpr (sizeof(typename T::Bits) == 2) error += 0.5 * spacing<T>(double(fabsl(exact) + error));
    // What is not a number of the type on either side of infinity has no distance.
    if (!(std::isnan(got) && std::isnan(double(exact))) && !(fabsl(got - exact) <= error))
      fail("place " + std::to_string(j) + " is " + text(got) + " rather than " + text(double(exact)));
  };
  for (int64_t outer = 0; outer < s.outer; ++outer)
    for (int64_t inner = 0; inner < s.inner; ++inner) {
      const auto at = [&](int64_t j) { return size_t((outer * s.length + j) * s.inner + inner); };
      const long double t = a.options.temperature;
      long double m = -HUGE_VAL, sum = 0, far = 0, dot = 0, size = 0;
      bool nan = false;
      for (int64_t j = 0; j < s.length; ++j) {
        const double v = value(T(), x.p[at(j)]);
        nan = nan || std::isnan(v);
        m = std::max<long double>(m, std::isnan(v) ? -HUGE_VAL : v);
      }
      const bool masked = !nan && m == -HUGE_VAL && a.options.masked_zero;
      nan = nan || (std::isinf(double(m)) && !masked);
      for (int64_t j = 0; j < s.length && !nan && !masked; ++j) {
        const long double below = (m - value(T(), x.p[at(j)])) / t, term = expl(-below);
        sum += term;
        if (term > 0) far += term * below;
        const long double g = value(T(), dy.p[at(j)]), product = a.logarithm() ? g : g * value(T(), y.p[at(j)]);
        dot += product;
        size += fabsl(product);
      }
      for (int64_t j = 0; j < s.length; ++j) {
        const double got = value(T(), y.p[at(j)]), gradient = value(T(), dx.p[at(j)]);
        if (nan) {
          expect(std::isnan(got), "a row without a maximum is not all NaN");
          continue;
        }
        if (masked) {
          expect(got == 0 && gradient == 0, "a masked row is not 0 with a gradient of 0");
          continue;
        }
        const long double below = (m - value(T(), x.p[at(j)])) / t, g = value(T(), dy.p[at(j)]);
        const bool infinite = std::isinf(double(below));
        if (a.logarithm() && infinite) {
          expect(std::isinf(got) && got < 0 && same<T>(dx.p[at(j)], dy.p[at(j)]), "-inf does not stay so, with its gradient");
          continue;
        }
        if (a.logarithm()) {
          const long double exact = -below - logl(sum);
          check(got, exact, (below - exact + 3 * logl(sum) + distances * far / sum + 20) * unit, j);
          const long double p = expl(got);
          const long double error = fabsl(g) + p * ((distances * fabsl(got) + 4) * fabsl(dot) + 24 * size);
          check(gradient, g - p * dot, error * unit + smallest * (1 + fabsl(dot)), j);
          continue;
        }
        const long double exact = expl(-below) / sum;
        check(got, exact, infinite ? 0 : exact * (distances * below + 20) * unit + smallest, j);
        const long double slope = (g - dot) / t;
        check(gradient, got * slope, got * (6 * fabsl(slope) + 24 * size / t) * unit + smallest / t, j);
      }
    }
}

std::vector<SoftmaxShape> shapes() {
  std::vector<SoftmaxShape> all;
  for (int64_t length = 1; length <= 40; ++length) all.push_back({length % 3 == 0 ? 130 : 5, length, 1});
  for (int64_t length : {63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 300, 1000, 1023, 1024, 1025, 2047, 2048, 2049, 4097})
    all.push_back({3, length, 1});
  for (int64_t length : {8191, 8192, 16384, 16385, 40000, 65536, 131073}) all.push_back({2, length, 1});
  all.push_back({1, 262144, 1});
  all.push_back({1, 262145, 1});
  for (int64_t inner : {2, 3, 7, 8, 16, 33, 49, 128})
    for (int64_t length : {2, 5, 21, 32, 100, 257}) all.push_back({3, length, inner});
  all.push_back({70, 3, 2});
  all.push_back({1, 2, 1000});
  all.push_back({1, 600, 8});
  all.push_back({2, 3000, 4});
  all.push_back({1, 5000, 16});
  all.push_back({1, 9000, 8});
  all.push_back({1, 20000, 3});
  return all;
}

template <class T>
void check_softmax(const Along& a) {
  long cases = 0;
  const std::vector<SoftmaxShape> all = shapes();
  for (const Device& device : kDevices) {
    const cuda::Queue queue = use(device);
    for (size_t k = 0; k < all.size(); ++k) {
      const SoftmaxShape s = all[k];
      // What fits into a block does not ask how large clusters are.
      if (&device == &kDevices[2] && s.length * std::min<int64_t>(s.inner, 8) < 8192) continue;
      const size_t n = size_t(s.outer * s.length * s.inner);
      // Options meet every kernel on a device without clusters.
      if (!a.plain() && (&device == &kDevices[2] || (&device == &kDevices[0] && n > 3000))) continue;
      // Every kind of values meets every regime; the largest shapes see two of them.
      for (int values = 0; values < kValues; ++values) {
        const bool telling = a.options.masked_zero && values == kAllMasked;
        if (n > 3000 && values != kNormal && values != int(k) % kValues && !telling) continue;
        if (n <= 3000 && values != kNormal && &device != &kDevices[0] && !telling) continue;
        where = std::string(a.name) + " (" + std::to_string(s.outer) + ", " + std::to_string(s.length) + ", " +
                std::to_string(s.inner) + ") for sm_" + std::to_string(queue.capability) + ", clusters of " +
                std::to_string(device.most_blocks_of_cluster) + ", values " + std::to_string(values);
        Buffer<T> x(n), dy(n);
        fill(x, Values(values), s);
        fill_normal(dy, 1);
        shim::schedule = shim::kInOrder;
        const Buffer<T> y = softmax(a, x, s, queue), dx = softmax_backward(a, dy, y, s, queue);
        check_softmax_values(a, x, y, dy, dx, s);
        ++cases;
        // Nor may the hardware's approximate results be off by so much that it shows.
        for (const int ulps : {-2, 2}) {
          if (sizeof(typename T::Bits) > 2 || n > 1000) break;
          shim::approximate_ulps = ulps;
          const Buffer<T> y_moved = softmax(a, x, s, queue);
          check_softmax_values(a, x, y_moved, dy, softmax_backward(a, dy, y_moved, s, queue), s);
          shim::approximate_ulps = 0;
        }

        // Options change what a thread computes, not which thread does.
        for (int schedule = 1; schedule < (a.plain() ? shim::kSchedules : 1); ++schedule) {
          // The order must not matter, nor where the inputs begin.
          shim::schedule = shim::Schedule(schedule);
          const Buffer<T> x_moved(x, schedule), dy_moved(dy, schedule % 3), y_moved(y, 2 * schedule % 5);
          expect(softmax(a, x_moved, s, queue) == y, "depends on the schedule or the address");
          expect(softmax_backward(a, dy_moved, y_moved, s, queue) == dx, "backward depends on the schedule or the address");
        }
        // Nor what other rows there are.
        if (s.outer > 1 && s.outer < 10) {
          const SoftmaxShape last = {1, s.length, s.inner};
          const size_t rest = size_t(s.length * s.inner);
          Buffer<T> alone(rest);
          memcpy(alone.p, x.p + (n - rest), rest * sizeof(typename T::Bits));
          const Buffer<T> y_alone = softmax(a, alone, last, queue);
          for (size_t i = 0; i < rest; ++i) expect(same<T>(y_alone.p[i], y.p[n - rest + i]), "depends on its neighbours");
        }
      }
    }
  }
  printf("%s: %zu shapes, %ld cases, each under several schedules\n", a.name, all.size(), cases);
}

// ---- Parameters per channel ----------------------------------------------------------------------------------------------

struct ChannelRowOf {
  const char* name;
  int parameters;
};
#define CHANNEL_ROW_OF(name, Functor, ...) ChannelRowOf{#name, generic::Functor<double>::parameters},
const ChannelRowOf kChannelRows[] = {FASTACT_CHANNEL_ACTIVATIONS(CHANNEL_ROW_OF)};

template <class T>
struct ChannelRun {
  Buffer<T> dx;
  std::vector<Buffer<T>> gradients;

  ChannelRun(int row, const Buffer<T>& dy, const Buffer<T>& x, const void* const* parameters, const ChannelShape& s,
             bool wants_dx, bool wants_gradients, cuda::Queue queue)
      : dx(wants_dx ? x.n : 0) {
    const int count = kChannelRows[row].parameters;
    void* to[kMaxParameters] = {};
    for (int k = 0; k < count; ++k) gradients.emplace_back(size_t(s.channels));
    for (int k = 0; k < count; ++k) to[k] = gradients[size_t(k)].p;
    const int64_t bytes = cuda::kernels().channel_workspace(T::dtype, s, count);
    Workspace<T> space(wants_gradients ? static_cast<unsigned char*>(malloc(size_t(bytes))) : nullptr, free);
    if (space) memset(space.get(), 0xff, size_t(bytes));
    expect(cuda::kernels().channel_backward[row][T::dtype](dy.p, x.p, wants_dx ? dx.p : nullptr, parameters, to, space.get(), s,
                                                           queue) == 0,
           "launch");
  }
};

/// What an element adds to the gradients of the parameters.
std::array<long double, 2> channel_terms(const std::string& name, long double dy, long double x, const long double* p) {
  if (name == "prelu") return {x > 0 ? 0 : x * dy, 0};
  expect(name == "channel_scaled_sigmoid", "has no terms to compare with");
  const long double y = 1 / (1 + expl(-p[1] * x)), rest = 1 / (1 + expl(p[1] * x));
  return {dy * y, dy * p[0] * y * rest * x};
}

template <class T>
void check_channels() {
  long cases = 0, off = 0, elements = 0;
  const ChannelShape shapes[] = {{1, 1, 1},    {1, 1, 5},    {1, 1, 16},   {1, 1, 4099}, {1, 1, 40000}, {2, 3, 49},
                                 {3, 5, 64},   {2, 2, 3001}, {40, 3, 16},  {300, 2, 7},  {1, 7, 8},     {5, 1000, 2},
                                 {1, 3, 1},    {9, 3, 1},    {1000, 3, 1}, {7, 8, 1},    {33, 16, 1},   {100, 100, 1},
                                 {70, 513, 1}, {3, 1024, 1}, {300, 64, 1}, {2, 2, 8192}};
  const cuda::Queue queue = kDevices[0].queue;
  for (int row = 0; row < int(std::size(kChannelRows)); ++row)
    for (const ChannelShape& s : shapes)
      for (int offset = 0; offset < 2; ++offset) {
        const std::string name = kChannelRows[row].name;
        const int count = kChannelRows[row].parameters;
        const size_t n = size_t(s.outer * s.channels * s.inner);
        where = name + " (" + std::to_string(s.outer) + ", " + std::to_string(s.channels) + ", " + std::to_string(s.inner) +
                "), inputs " + std::to_string(offset) + " after an aligned address";
        const int64_t units = channel_work(s).units;
        std::vector<Buffer<T>> numbers;
        const void* parameters[kMaxParameters] = {};
        for (int k = 0; k < count; ++k) {
          numbers.emplace_back(size_t(s.channels), offset);
          fill_normal(numbers.back(), 1, 0.5);
        }
        for (int k = 0; k < count; ++k) parameters[k] = numbers[size_t(k)].p;
        Buffer<T> x(n, offset), dy(n, 3 * offset), y(n), expected(n);
        fill_wild(x);
        fill_wild(dy);
        shim::schedule = shim::kInOrder;
        cpu::kernels().channel_forward[row][T::dtype](x.p, expected.p, parameters, s, 0, units);
        expect(cuda::kernels().channel_forward[row][T::dtype](x.p, y.p, parameters, s, queue) == 0, "launch");
        compare(y, expected, &off);
        const ChannelRun<T> wild(row, dy, x, parameters, s, true, false, queue);
        cpu::kernels().channel_backward[row][T::dtype](dy.p, x.p, expected.p, parameters, nullptr, s, 0, units);
        compare(wild.dx, expected, &off);
        elements += 2 * long(n);

        // The sums, of what is finite.
        fill_normal(x, 2);
        fill_normal(dy, 1);
        const ChannelRun<T> all(row, dy, x, parameters, s, true, true, queue);
        for (int64_t c = 0; c < s.channels; ++c) {
          long double p[2] = {}, sums[2] = {}, sizes[2] = {};
          for (int k = 0; k < count; ++k) p[k] = value(T(), numbers[size_t(k)].p[c]);
          for (int64_t o = 0; o < s.outer; ++o)
            for (int64_t i = 0; i < s.inner; ++i) {
              const size_t at = size_t((o * s.channels + c) * s.inner + i);
              const auto terms = channel_terms(name, value(T(), dy.p[at]), value(T(), x.p[at]), p);
              for (int k = 0; k < count; ++k) sums[k] += terms[size_t(k)], sizes[k] += fabsl(terms[size_t(k)]);
            }
          for (int k = 0; k < count; ++k) {
            // At most 300 additions on the way of a term through thread, warp and block; a dozen units in the term itself, more
            // where the hardware approximates and z is large.
            const double unit = T::precision == 53 ? 0x1p-53 : 0x1p-24, got = value(T(), all.gradients[size_t(k)].p[c]);
            const double error = double(sizes[k]) * 340 * unit + spacing<T>(double(fabsl(sums[k])));
            if (!(fabsl(got - sums[k]) <= error))
              fail("sum " + std::to_string(k) + " of channel " + std::to_string(c) + " is " + text(got) + " rather than " +
                   text(double(sums[k])));
          }
        }
        ++cases;
        // Nor do they depend on the schedule, the address, or what else is wanted.
        for (int schedule = 1; schedule < shim::kSchedules; ++schedule) {
          shim::schedule = shim::Schedule(schedule);
          const Buffer<T> x_moved(x, schedule % 3), dy_moved(dy, schedule % 2);
          const ChannelRun<T> moved(row, dy_moved, x_moved, parameters, s, schedule % 2 == 0, true, queue);
          expect(schedule % 2 != 0 || moved.dx == all.dx, "dx depends on the schedule or the address");
          for (int k = 0; k < count; ++k)
            expect(moved.gradients[size_t(k)] == all.gradients[size_t(k)], "the sums depend on the schedule or the address");
        }
      }
  printf("channels: %ld cases, %ld elements, %ld a step from the CPU's\n", cases, elements, off);
  expect(off * 10000 < elements, "too many are a step off");
}

// ---- Maxout --------------------------------------------------------------------------------------------------------------

template <class T>
void check_maxout() {
  const MaxoutShape shapes[] = {{1, 1, 1, 1},   {5, 7, 2, 1},    {300, 3, 5, 1}, {2, 3, 4, 8},
                                {2, 300, 2, 7}, {3, 2, 255, 16}, {2, 2, 3, 512}};
  const cuda::Queue queue = kDevices[0].queue;
  for (const MaxoutShape& s : shapes)
    for (int offset = 0; offset < 2; ++offset) {
      where = "maxout (" + std::to_string(s.outer) + ", " + std::to_string(s.groups) + ", " + std::to_string(s.pieces) + ", " +
              std::to_string(s.inner) + "), inputs " + std::to_string(offset) + " after an aligned address";
      const size_t m = size_t(s.outer * s.groups * s.inner), n = m * size_t(s.pieces);
      Buffer<T> x(n, offset), y(m), dy(m, offset), dx(n), y_expected(m), dx_expected(n);
      Buffer<Byte> index(m), index_expected(m);
      fill_wild(x);
      fill_wild(dy);
      // Ties.
      for (size_t i = 0; i < n; ++i)
        if (generator() % 3 == 0) x.p[i] = bits_of<T>(7);
      cpu::kernels().maxout_forward[T::dtype](x.p, y_expected.p, index_expected.p, s, 0, maxout_units(s));
      expect(cuda::kernels().maxout_forward[T::dtype](x.p, y.p, index.p, s, queue) == 0, "launch");
      expect(y == y_expected, "is not the CPU's");
      expect(memcmp(index.p, index_expected.p, m) == 0, "the index is not the CPU's");
      cpu::kernels().maxout_backward[T::dtype](dy.p, index.p, dx_expected.p, s, 0, maxout_units(s));
      expect(cuda::kernels().maxout_backward[T::dtype](dy.p, index.p, dx.p, s, queue) == 0, "launch");
      expect(dx == dx_expected, "backward is not the CPU's");
    }
  printf("maxout: %zu shapes\n", std::size(shapes));
}

// ---- What a monitor counts -------------------------------------------------------------------------------------------------

bool close(double a, double b, double size) {
  return a == b || (std::isnan(a) && std::isnan(b)) || fabs(a - b) <= 1e-12 * size;
}

template <class T>
void check_look() {
  const cuda::Queue queue = kDevices[0].queue;
  for (int64_t n : {1, 64, 65, 1000, 20001})
    for (int64_t sample : {0, 64, 700})
      for (int64_t units : {0, 1, 7, 300})
        for (int schedule = 0; schedule < shim::kSchedules; ++schedule) {
          where = "looking at " + std::to_string(n) + " elements, sample " + std::to_string(sample) + ", " +
                  std::to_string(units) + " units";
          shim::schedule = shim::Schedule(schedule);
          Buffer<T> x(size_t(n), schedule % 3);
          fill_wild(x);
          for (size_t i = 0; i < x.n; ++i)
            if (generator() % 2 == 0) x.p[i] = bits_of<T>(i % 3 ? 0.0 : 2.5);
          Look a = Look::at(n, sample, schedule);
          a.low = -0.5, a.high = 0.75, a.units = units, a.inner = 1 + schedule;
          if (units == 7) a.shown = false;
          Tally tally = {}, expected = {};
          const auto histogram = std::make_unique<Histogram>(), expected_histogram = std::make_unique<Histogram>();
          Buffer<Byte> flags(size_t(2 * units)), expected_flags(size_t(2 * units + Look::kRun));
          memset(flags.p, 0, flags.n);
          memset(expected_flags.p, 0, expected_flags.n);
          std::vector<Glimpse> glimpses(size_t(a.runs));
          std::vector<Bins> bins(size_t(a.runs));
          cpu::kernels().look[T::dtype](x.p, a, 0, n, 0, glimpses.data(), bins.data());
          cpu::kernels().gather(a, 0, a.runs, glimpses.data(), bins.data(), &expected, expected_histogram.get(),
                                expected_flags.p);
          expect(cuda::kernels().look[T::dtype](x.p, a, &tally, histogram.get(), flags.p, queue) == 0, "launch");
          expect(memcmp(&tally, &expected, offsetof(Tally, total)) == 0, "the counts are not the CPU's");
          expect(memcmp(histogram.get(), expected_histogram.get(), sizeof(Histogram)) == 0, "the histogram is not the CPU's");
          expect(memcmp(flags.p, expected_flags.p, flags.n) == 0, "the units are not the CPU's");
          expect(close(tally.squares, expected.squares, expected.squares), "the sum of squares is not the CPU's");
          // Sums of numbers near the largest there are may overflow in one order only.
          if (std::isfinite(expected.squares))
            expect(close(tally.total, expected.total, sqrt(double(n) * expected.squares)), "the sum is not the CPU's");
        }
  const SoftmaxShape shapes[] = {{1, 1, 1}, {70, 5, 1}, {3, 100, 1}, {2, 33, 7}, {1, 2000, 3}};
  for (const SoftmaxShape& s : shapes)
    for (const bool logarithms : {false, true}) {
      where = "looking at rows (" + std::to_string(s.outer) + ", " + std::to_string(s.length) + ", " + std::to_string(s.inner) +
              ")";
      Buffer<T> y(size_t(s.outer * s.length * s.inner));
      for (size_t i = 0; i < y.n; ++i) {
        const double p = std::uniform_real_distribution<double>()(generator);
        y.p[i] = bits_of<T>(i % 97 == 0 ? NAN : logarithms ? log(p) : i % 5 ? p : 0);
      }
      for (int64_t rows : {s.outer * s.inner, (s.outer * s.inner + 1) / 2}) {
        const RowLook a{s.length, s.inner, rows, s.outer * s.inner / rows, 3, logarithms, 0.5};
        RowTally tally = {}, expected = {};
        cpu::kernels().look_at_rows[T::dtype](y.p, a, &expected);
        expect(cuda::kernels().look_at_rows[T::dtype](y.p, a, &tally, queue) == 0, "launch");
        expect(tally.count == expected.count && tally.sure == expected.sure && tally.nan == expected.nan,
               "the counts are not the CPU's");
        // Logarithms of float32 with some units in the last place.
        expect(fabs(tally.entropy - expected.entropy) <= 1e-5 * expected.entropy, "the entropy is not the CPU's");
      }
    }
  printf("looks: as the CPU's\n");
}

// ---- How many numbers are misrounded ---------------------------------------------------------------------------------------

/// Of the functions that take an exponential; those with a precise gradient have the same forward.
template <class T>
void print_misrounded(const char* type) {
  Buffer<T> x(65536), y(65536);
  for (size_t i = 0; i < x.n; ++i) x.p[i] = uint16_t(i);
  const double parameters[] = {1, 16};  // powers of two, so that no product with them is rounded
  for (int row = 0; row < int(std::size(kRows)); ++row) {
    const std::string name = kRows[row].name;
    if (!kRows[row].costly || name.starts_with("precise_") || name.starts_with("result_")) continue;
    printf("| %s | %s |", name.c_str(), type);
    for (int ulps = -2; ulps <= 2; ++ulps) {
      shim::approximate_ulps = ulps;
      cuda::kernels().forward[row][T::dtype](x.p, y.p, int64_t(x.n), parameters, kDevices[0].queue);
      long wrong = 0;
      for (size_t i = 0; i < x.n; ++i) {
        const double v = value(T(), x.p[i]);
        const int64_t far = steps<T>(y.p[i], bits_of<T>(kRows[row].exact(v, parameters)));
        where = name + " of " + text(v);
        expect(far <= 1, "more than a step off");
        wrong += far;
      }
      printf(" %ld |", wrong);
    }
    printf("\n");
  }
}

}  // namespace

int main(int, char** argv) {
  const std::string what = argv[1];
  const auto check = [&]<class T>(const char* name, T) {
    if (what != name) return;
    check_rows<T>();
    for (const Along& a : all_along()) check_softmax<T>(a);
    check_channels<T>();
    check_maxout<T>();
    check_look<T>();
  };
  check("float64", Float64());
  check("float32", Float32());
  check("bfloat16", BFloat16());
  check("float16", Float16());
  if (what == "table") {
    print_misrounded<BFloat16>("bfloat16");
    print_misrounded<Float16>("float16");
  }
}
