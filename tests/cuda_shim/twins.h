// The functions of csrc/cuda/device.h for the shim: included there, in the same place.

inline float moved(float x) {
  if (std::isfinite(x) && x != 0) x = bit_pattern<float>(bit_pattern<int32_t>(x) + shim::approximate_ulps);
  return x;
}

struct alignas(16) Words {
  uint32_t x, y, z, w;
};
inline Words load_words(const void* p) { return *static_cast<const Words*>(p); }
inline void store_words(void* p, Words words) { *static_cast<Words*>(p) = words; }
inline void renew(Words&) {}

inline void* shared_memory() { return shim::machine.block().shared.get(); }

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : moved(y);
}
inline float reciprocal_approx(float x) { return moved(1 / x); }

inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = bit_pattern<uint32_t>(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t float16_bits(float x) { return bit_pattern<uint16_t>(_Float16(x)); }
inline uint32_t pack_bfloat16(float low, float high) { return bfloat16_bits(low) | bfloat16_bits(high) << 16; }
inline uint32_t pack_float16(float low, float high) { return float16_bits(low) | float16_bits(high) << 16; }
inline float unpack_float16(uint16_t bits) { return bit_pattern<_Float16>(bits); }

// One fiber runs at a time.
template <class T>
void atomicAdd(T* sum, T n) {
  *sum += n;
}
inline void add_to(uint64_t* sum, uint64_t n) { *sum += n; }
inline void raise_to(uint64_t* most, uint64_t n) { *most = std::max(*most, n); }

inline int cluster_rank() { return shim::machine.current().block; }
inline void cluster_barrier() {
  shim::machine.wait(shim::machine.cluster_barrier, int(shim::machine.threads) * shim::machine.cluster());
}
template <class T>
T* cluster_peer(T* place, int rank) {
  const auto offset = reinterpret_cast<unsigned char*>(place) - shim::machine.block().shared.get();
  return reinterpret_cast<T*>(shim::machine.block(rank).shared.get() + offset);
}

template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, cuda::Queue queue, A... arguments) {
  return shim::launch(grid.blocks, grid.threads, grid.cluster, grid.shared, queue.stream, [=] { kernel(P(arguments)...); });
}
template <class... P>
bool fits(void (*)(P...), Grid grid) {
  return grid.cluster <= shim::most_blocks_of_cluster;
}
