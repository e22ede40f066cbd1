// What the CUDA kernels ask of the machine and a plain C++ compiler does not know: each behind one named function, so that the
// rest of this folder is compiled by nvcc for a GPU, and by any C++ compiler with tests/cuda_shim, which runs it on the CPU.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_shim.h"
#endif

#include "../kernels.h"
#include "../lane.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

/// The shape of a launch: `blocks` blocks of `threads` threads, `cluster` neighbouring blocks at a time sharing their shared
/// memory (1: none), each block with `shared` bytes of it.
struct Grid {
  int64_t blocks;
  int threads;
  int cluster = 1;
  int shared = 0;
};

/// The number, or the struct, of another type with the same bits.
template <class To, class From>
FASTACT_FN To bit_pattern(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

#if defined(__CUDACC__)

/// Sixteen bytes, and their moves to and from an address aligned to 16: one instruction, where the compiler may make several
/// of a plain assignment.
using Words = uint4;
__device__ __forceinline__ Words load_words(const void* p) { return __ldca(static_cast<const Words*>(p)); }
__device__ __forceinline__ void store_words(void* p, Words words) { __stwb(static_cast<Words*>(p), words); }

/// Nothing, but that the compiler takes the words for new ones: what it had made of them before need not stay in registers.
__device__ __forceinline__ void renew(Words& w) { asm volatile("" : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w)); }

/// The block's shared memory, as much as the launch asked for; aligned to 16 bytes.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 fastact_shared[];
  return fastact_shared;
}

/// 2^x, max relative error about 2^-22; subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x, within 1 ULP, for normal x with a normal result.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two floats rounded to nearest even, as bfloat16 or float16 bit patterns: `low` in the low half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ float unpack_float16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

/// Where in its cluster a block is; and what holds every thread of the cluster until all have come, with all they wrote to
/// shared memory visible to all. Only in launches with a cluster, which need sm_90.
__device__ __forceinline__ int cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
}
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

/// The same place in the shared memory of the block of that rank.
template <class T>
__device__ __forceinline__ T* cluster_peer(T* place, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(reinterpret_cast<uint64_t>(place)), "r"(rank));
  return reinterpret_cast<T*>(peer);
#else
  return place;
#endif
}

/// Atomically. CUDA's 64-bit integers have another name than the standard's.
__device__ __forceinline__ void add_to(uint64_t* sum, uint64_t n) {
  if (n > 0) atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(n));
}
__device__ __forceinline__ void raise_to(uint64_t* most, uint64_t n) {
  atomicMax(reinterpret_cast<unsigned long long*>(most), static_cast<unsigned long long>(n));
}

/// What CUDA wants to know of a launch. Points into itself.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  Launch(Grid grid, int64_t blocks) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(grid.cluster), 1, 1};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = size_t(grid.shared);
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
  }
  Launch(const Launch&) = delete;
};

/// Returns the cudaError_t of the launch.
template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, cuda::Queue queue, A... arguments) {
  if (grid.blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  Launch all(grid, grid.blocks);
  all.config.stream = static_cast<cudaStream_t>(queue.stream);
  return cudaLaunchKernelEx(&all.config, kernel, P(arguments)...);
}

/// Whether the device can hold such a cluster: a part of a GPU may be too small. To be asked before the launch, because more
/// than 8 blocks are allowed only to kernels that asked for it.
template <class... P>
bool fits(void (*kernel)(P...), Grid grid) {
  Launch all(grid, grid.cluster);
  int clusters = 0;
  cudaError_t error = cudaSuccess;
  if (grid.cluster > 8) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &all.config);
  if (error != cudaSuccess) cudaGetLastError();  // else the next check would find it
  return error == cudaSuccess && clusters > 0;
}

#else
#include "twins.h"
#endif

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact
