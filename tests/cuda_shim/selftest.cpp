// What the shim must find. `selftest NAME` runs one kernel with a fault planted in it, or its sound twin, and exits with 0
// where the result is right under every schedule.
#include <string>

#include "cuda_shim.h"

namespace {

float* shared_floats() { return reinterpret_cast<float*>(shim::machine.block().shared.get()); }

/// Sums of blocks of 128 numbers; twice through the same shared memory, so that both barriers count.
void block_sums(const float* x, float* y, bool first_barrier, bool second_barrier) {
  float* shared = shared_floats();
  const unsigned thread = threadIdx.x, warp = thread / 32;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    float part = x[(blockIdx.x * 2 + unsigned(round)) * 128 + thread];
    for (int lanes = 1; lanes < 32; lanes *= 2) part += __shfl_xor_sync(0xffffffffu, part, lanes);
    if (thread % 32 == 0) shared[warp] = part;
    if (first_barrier) __syncthreads();
    for (int w = 0; w < 4; ++w) sum += shared[w];
    if (second_barrier) __syncthreads();
  }
  y[blockIdx.x * 128 + thread] = sum;
}

void cluster_barrier() { shim::machine.wait(shim::machine.cluster_barrier, 4 * 64); }

/// Every block of a cluster of four adds up what the others left in their shared memory; twice through the same.
void cluster_sums(const float* x, float* y, const std::string& fault) {
  const unsigned thread = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    shared_floats()[thread] = x[(blockIdx.x * 2 + unsigned(round)) * 64 + thread];
    if (fault != "first cluster barrier") cluster_barrier();
    for (int rank = 0; rank < 4; ++rank) sum += reinterpret_cast<float*>(shim::machine.block(rank).shared.get())[thread];
    if (fault == "block barriers for a cluster" && round == 0) {
      // Two: a thread that comes last to one goes on in its turn, and so is ahead without being let.
      __syncthreads();
      __syncthreads();
    } else if (fault != "last cluster barrier" || round == 0) {
      cluster_barrier();
    }
  }
  y[blockIdx.x * 64 + thread] = sum;
}

/// Adds up all numbers in one launch, wrong because a block may run before the one whose sum it takes.
void running_sums(const float* x, float* y) {
  if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x] + (blockIdx.x > 0 ? y[blockIdx.x - 1] : 0);
}

struct alignas(16) Four {
  float v[4];
};

}  // namespace

int main(int, char** argv) {
  const std::string fault = argv[1];
  const int blocks = 8;
  std::vector<float> x(blocks * 256), y(blocks * 128);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 17);
  bool right = true;
  int error = 0;
  for (int schedule = 0; schedule < shim::kSchedules; ++schedule) {
    shim::schedule = shim::Schedule(schedule);
    const auto run = [&](int threads, int cluster, int shared, auto kernel) {
      error = shim::launch(blocks, threads, cluster, shared, nullptr, kernel);
    };
    if (fault == "sound" || fault == "first barrier" || fault == "second barrier") {
      run(128, 1, 16, [&] { block_sums(x.data(), y.data(), fault != "first barrier", fault != "second barrier"); });
      for (int i = 0; i < blocks * 128; ++i) {
        float expected = 0;
        for (int k = 0; k < 256; ++k) expected += x[size_t(i / 128 * 256 + k)];
        right = right && y[size_t(i)] == expected;
      }
    } else if (fault == "sound cluster" || fault == "first cluster barrier" || fault == "last cluster barrier" ||
               fault == "block barriers for a cluster") {
      run(64, 4, 64 * 4, [&] { cluster_sums(x.data(), y.data(), fault); });
      for (int i = 0; i < blocks * 64; ++i) {
        float expected = 0;
        for (int k = 0; k < 8; ++k) expected += x[size_t((i / 256 * 8 + k) * 64 + i % 64)];
        right = right && y[size_t(i)] == expected;
      }
    } else if (fault == "order of blocks") {
      std::fill(y.begin(), y.end(), 0.0f);
      run(32, 1, 0, [&] { running_sums(x.data(), y.data()); });
      for (int i = 1; i < blocks; ++i) right = right && y[size_t(i)] == y[size_t(i - 1)] + x[size_t(i)];
    } else if (fault == "read out of bounds") {
      run(128, 1, 0, [&] { y[threadIdx.x] = x[blockIdx.x * 256 + threadIdx.x + 129]; });
    } else if (fault == "shared overrun") {
      run(128, 1, 128 * 4, [&] { shared_floats()[threadIdx.x + 1] = 1; });
    } else if (fault == "no shared memory") {
      run(128, 1, 0, [&] { shared_floats()[0] = 1; });
    } else if (fault == "unwritten shared memory") {
      run(128, 1, 128 * 4, [&] { y[threadIdx.x] = shared_floats()[threadIdx.x]; });
      right = right && !std::isnan(y[0]);
    } else if (fault == "divergent barrier") {
      run(128, 1, 0, [&] {
        if (threadIdx.x < 64) __syncthreads();
      });
    } else if (fault == "divergent shuffle") {
      run(128, 1, 0, [&] {
        if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
      });
    } else if (fault == "part of a warp") {
      run(128, 1, 0, [&] { y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1); });
    } else if (fault == "block outside the cluster") {
      run(32, 2, 128, [&] { shim::machine.block(2); });
    } else if (fault == "misaligned access") {
      run(32, 1, 0, [&] { y[threadIdx.x] = reinterpret_cast<const Four*>(x.data() + 1)->v[0]; });
    } else if (fault == "too many threads") {
      run(1025, 1, 0, [] {});
    } else if (fault == "too much shared memory") {
      run(32, 1, (48 << 10) + 1, [] {});
    } else if (fault == "uneven clusters") {
      run(32, 3, 0, [] {});
    } else {
      fprintf(stderr, "no such fault\n");
      return 3;
    }
  }
  if (error) fprintf(stderr, "launch refused\n");
  if (!right) fprintf(stderr, "wrong result\n");
  return error || !right;
}
