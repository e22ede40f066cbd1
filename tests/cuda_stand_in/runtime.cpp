// A stand-in for CUDA's runtime library, so that torch with CUDA and fastact's own host code run on a machine without a GPU.
//
// It plays two GPUs. Their memory is the host's, which nobody but a task of theirs may touch: any other access to it is a
// segmentation fault, as a device's address would be. A stream runs what it gets at once, until torch.cuda._sleep() holds it
// up; then all that follows waits, as behind a GPU that is busy, until the host waits for the stream. An event behind a sleep
// has not happened before that. Memory is NaN before it is written. Graphs are captured and replayed. Kernels are not run here:
// fastact's are compiled for the host with tests/cuda_shim, torch's are replaced by torch_ops.cpp. What torch does not need is
// not supported.
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "stand_in.h"

namespace {

constexpr int kDevices = 2;
constexpr size_t kMemory = size_t(4) << 30;  // of each
constexpr size_t kGranularity = 512;

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// ---- Memory --------------------------------------------------------------------------------------------------------------

/// Of one device: a range of addresses, of which parts are given out.
class Memory {
 public:
  Memory() {
    void* range = mmap(nullptr, kMemory, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) abort();
    begin_ = static_cast<char*>(range);
    madvise(range, kMemory, MADV_HUGEPAGE);  // protect() takes time for each page
    free_[0] = kMemory;
  }
  bool holds(const void* p) const { return p >= begin_ && p < begin_ + kMemory; }
  size_t unused() const { return kMemory - used_; }

  void* take(size_t bytes) {
    bytes = (std::max<size_t>(bytes, 1) + kGranularity - 1) / kGranularity * kGranularity;
    for (auto [at, size] : free_) {
      if (size < bytes) continue;
      free_.erase(at);
      if (size > bytes) free_[at + bytes] = size - bytes;
      taken_[at] = bytes;
      used_ += bytes;
      highest_ = std::max(highest_, at + bytes);
      return begin_ + at;
    }
    return nullptr;
  }
  bool give_back(void* p) {
    const auto it = taken_.find(size_t(static_cast<char*>(p) - begin_));
    if (it == taken_.end()) return false;
    auto [at, size] = *it;
    taken_.erase(it);
    used_ -= size;
    auto next = free_.upper_bound(at);
    if (next != free_.end() && next->first == at + size) size += next->second, next = free_.erase(next);
    if (next != free_.begin() && std::prev(next)->first + std::prev(next)->second == at) {
      std::prev(next)->second += size;
    } else {
      free_[at] = size;
    }
    return true;
  }
  size_t size_of(void* p) const { return taken_.at(size_t(static_cast<char*>(p) - begin_)); }
  void protect(int how) const {
    if (mprotect(begin_, (highest_ + 4095) / 4096 * 4096, how) != 0) abort();
  }

 private:
  char* begin_;
  size_t used_ = 0, highest_ = 0;
  std::map<size_t, size_t> free_, taken_;  // sizes by offset
};
Memory memories[kDevices];
std::map<const char*, size_t> pinned;

Memory* memory_of(const void* p) {
  for (Memory& m : memories)
    if (m.holds(p)) return &m;
  return nullptr;
}

bool is_pinned(const void* p) {
  const auto after = pinned.upper_bound(static_cast<const char*>(p));
  return after != pinned.begin() && p < std::prev(after)->first + std::prev(after)->second;
}

/// While one lives, the memory of the devices can be touched.
struct OnDevice {
  static inline int depth = 0;
  OnDevice() {
    mutex.lock();
    if (depth++ == 0)
      for (Memory& m : memories) m.protect(PROT_READ | PROT_WRITE);
  }
  ~OnDevice() {
    if (--depth == 0)
      for (Memory& m : memories) m.protect(PROT_NONE);
    mutex.unlock();
  }
};

// ---- Streams -------------------------------------------------------------------------------------------------------------

struct Stream;
struct Graph {
  std::vector<std::function<void()>> tasks;  // in the order in which the host gave them
  unsigned long long id = 0;
};

/// A place in a stream, or in a graph that is captured.
struct Mark {
  bool reached = false;
  Stream* stream = nullptr;
  Graph* graph = nullptr;
  int sleeps = 0;  // of the stream, before this
};

struct Task {
  std::function<void()> run;  // empty: holds the stream up, until the host waits for it
  std::shared_ptr<Mark> after;
};

struct Stream {
  int device = 0;
  std::deque<Task> tasks;
  Graph* captures = nullptr;
  bool running = false;
  int sleeps = 0, awaited_sleeps = 0;  // given to it, and those whose end the host has waited for

  /// Runs one task, if it may; `force`: even if the host has to wait for that.
  bool step(bool force) {
    if (running || tasks.empty()) return false;
    Task& next = tasks.front();
    if (next.after && !next.after->reached) {
      if (!force) return false;
      while (!next.after->reached)
        if (!next.after->stream->step(true)) abort();
    }
    if (!next.run && !next.after && !force) return false;
    const Task task = std::move(next);
    tasks.pop_front();
    if (task.run) run_now(task.run);
    return true;
  }
  void run_now(const std::function<void()>& task) {
    const OnDevice on_device;
    struct Running {
      bool& flag;
      ~Running() { flag = false; }
    } const now{running = true};
    task();
  }
};

std::set<Stream*> streams;

/// What the devices do meanwhile.
void go_on() {
  for (bool any = true; any;) {
    any = false;
    for (Stream* stream : streams) any |= stream->step(false);
  }
}

Stream& stream_of(void* stream) {
  static Stream* defaults = [] {
    auto* all = new Stream[kDevices];
    for (int k = 0; k < kDevices; ++k) all[k].device = k, streams.insert(all + k);
    return all;
  }();
  return stream ? *static_cast<Stream*>(stream) : defaults[current_device];
}

void finish(Stream& stream) {
  while (stream.step(true)) go_on();
}

/// The host waits: not while a graph is captured.
cudaError_t wait_for(Stream& stream) {
  if (stream.captures) return result(cudaErrorStreamCaptureUnsupported);
  finish(stream);
  stream.awaited_sleeps = stream.sleeps;
  return cudaSuccess;
}

void put(Stream& stream, Task task) {
  if (stream.captures) {
    if (task.run) stream.captures->tasks.push_back(std::move(task.run));
    return;
  }
  stream.tasks.push_back(std::move(task));
  go_on();
}

struct Event {
  std::shared_ptr<Mark> mark = std::make_shared<Mark>(true);
};

void copy(void* to, const void* from, size_t bytes, Stream& stream) {
  // From memory that is not pinned, CUDA has taken the bytes when it returns, and so may what they come from be gone.
  if (memory_of(from) || is_pinned(from)) return put(stream, {[=] { memmove(to, from, bytes); }, nullptr});
  const auto bytes_of_host = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
  put(stream, {[=] { memcpy(to, bytes_of_host->data(), bytes); }, nullptr});
}

std::map<const void*, std::string>& kernel_names() {
  static auto* names = new std::map<const void*, std::string>;
  return *names;
}

cudaError_t launch(const void* kernel, void* stream) {
  Lock lock(mutex);
  const std::string& name = kernel_names()[kernel];
  if (name.find("spin_kernel") != name.npos) {
    ++stream_of(stream).sleeps;
    put(stream_of(stream), {});
    return cudaSuccess;
  }
  fprintf(stderr, "the stand-in for CUDA's runtime has no kernel %s\n", name.c_str());
  return result(cudaErrorInvalidDeviceFunction);
}

}  // namespace

namespace stand_in {

void submit(void* stream, std::function<void()> task) {
  Lock lock(mutex);
  put(stream_of(stream), {std::move(task), nullptr});
}

bool busy(void* stream) {
  Lock lock(mutex);
  return stream_of(stream).captures || !stream_of(stream).tasks.empty();
}

void run_now(void* stream, const std::function<void()>& task) {
  Lock lock(mutex);
  if (stream_of(stream).captures) throw std::runtime_error("the stand-in for a GPU cannot capture that");
  finish(stream_of(stream));
  stream_of(stream).run_now(task);
}

}  // namespace stand_in

extern "C" {

// ---- Devices, errors -----------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) { return *count = kDevices, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= kDevices) return result(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "a stand-in for a GPU");
  p->totalGlobalMem = kMemory;
  p->major = 9;
  p->multiProcessorCount = 4;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor = 227 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 50 << 20;
  for (int& n : p->maxThreadsDim) n = 1024;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->unifiedAddressing = p->concurrentKernels = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = p.major, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = p.minor, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = p.multiProcessorCount, cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      return *value = p.maxThreadsPerBlock, cudaSuccess;
    default:
      return *value = 0, cudaSuccess;
  }
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = *greatest = 0, cudaSuccess; }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t) { return "an error of the stand-in"; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNotSupported:
      return "the stand-in for CUDA's runtime does not support that";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorInvalidDeviceFunction:
      return "the stand-in for CUDA's runtime does not have that kernel";
    default:
      return "an error of the stand-in for CUDA's runtime";
  }
}

// ---- Memory --------------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** p, size_t bytes) {
  OnDevice on_device;
  Memory& memory = memories[current_device];
  *p = memory.take(bytes);
  if (!*p) return result(cudaErrorMemoryAllocation);
  memory.protect(PROT_READ | PROT_WRITE);
  memset(*p, 0xff, memory.size_of(*p));
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  OnDevice on_device;
  for (Stream* stream : streams)
    if (!stream->captures) wait_for(*stream);  // as CUDA does
  Memory* memory = memory_of(p);
  if (!memory) return result(cudaErrorInvalidValue);
  const size_t bytes = memory->size_of(p);
  char* const page = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 4095) / 4096 * 4096);
  char* const end = static_cast<char*>(p) + bytes;
  if (page < end) madvise(page, size_t(end - page) / 4096 * 4096, MADV_DONTNEED);
  return memory->give_back(p) ? cudaSuccess : result(cudaErrorInvalidValue);
}
cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  Lock lock(mutex);
  *unused = memories[current_device].unused();
  *total = kMemory;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  Lock lock(mutex);
  *p = aligned_alloc(4096, (std::max<size_t>(bytes, 1) + 4095) / 4096 * 4096);
  pinned[static_cast<char*>(*p)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  Lock lock(mutex);
  pinned.erase(static_cast<char*>(p));
  free(p);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  Lock lock(mutex);
  *a = {};
  if (const Memory* memory = memory_of(p)) {
    a->type = cudaMemoryTypeDevice;
    a->device = int(memory - memories);
    a->devicePointer = const_cast<void*>(p);
  } else if (is_pinned(p)) {
    a->type = cudaMemoryTypeHost;
    a->hostPointer = a->devicePointer = const_cast<void*>(p);
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  Lock lock(mutex);
  copy(to, from, bytes, stream_of(stream));
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  Lock lock(mutex);
  cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return wait_for(stream_of(nullptr));
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  Lock lock(mutex);
  put(stream_of(stream), {[=] { memset(p, value, bytes); }, nullptr});
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

// ---- Streams and events --------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  Lock lock(mutex);
  auto* made = new Stream;
  made->device = current_device;
  streams.insert(made);
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock lock(mutex);
  wait_for(stream_of(stream));
  streams.erase(&stream_of(stream));
  return cudaSuccess;  // marks may still name it
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Lock lock(mutex);
  return wait_for(stream_of(stream));
}
cudaError_t cudaDeviceSynchronize() {
  Lock lock(mutex);
  for (Stream* stream : streams)
    if (stream->device == current_device)
      if (const cudaError_t error = wait_for(*stream)) return error;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Lock lock(mutex);
  return stream_of(stream).tasks.empty() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  Lock lock(mutex);
  put(stream_of(stream), {[=] { function(data); }, nullptr});
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  Lock lock(mutex);
  put(stream_of(stream), {[=] { function(stream, cudaSuccess, data); }, nullptr});
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  Lock lock(mutex);
  Stream& where = stream_of(stream);
  const auto mark = std::make_shared<Mark>(where.captures != nullptr, &where, where.captures, where.sleeps);
  reinterpret_cast<Event*>(event)->mark = mark;
  put(where, {[=] { mark->reached = true; }, nullptr});
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Lock lock(mutex);
  const auto& mark = reinterpret_cast<Event*>(event)->mark;
  Stream& waits = stream_of(stream);
  if (mark->graph) {
    waits.captures = mark->graph;
  } else if (!mark->reached) {
    put(waits, {[] {}, mark});
  }
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  Lock lock(mutex);
  const Mark& mark = *reinterpret_cast<Event*>(event)->mark;
  return mark.reached && (!mark.stream || mark.sleeps <= mark.stream->awaited_sleeps) ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Lock lock(mutex);
  const auto mark = reinterpret_cast<Event*>(event)->mark;
  while (!mark->reached)
    if (!mark->stream->step(true)) abort();
  if (mark->stream) mark->stream->awaited_sleeps = std::max(mark->stream->awaited_sleeps, mark->sleeps);
  go_on();
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }

// ---- Graphs --------------------------------------------------------------------------------------------------------------

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  static unsigned long long graphs = 0;
  Lock lock(mutex);
  stream_of(stream).captures = new Graph{{}, ++graphs};
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Lock lock(mutex);
  Graph* captured = stream_of(stream).captures;
  *graph = reinterpret_cast<cudaGraph_t>(captured);
  for (Stream* each : streams)
    if (each->captures == captured) each->captures = nullptr;
  return captured ? cudaSuccess : result(cudaErrorIllegalState);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Lock lock(mutex);
  *status = stream_of(stream).captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  Lock lock(mutex);
  Graph* captures = stream_of(stream).captures;
  if (id) *id = captures ? captures->id : 0;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(captures);
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->tasks.size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* runnable, cudaGraph_t graph, unsigned long long) {
  *runnable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t runnable, cudaStream_t stream) {
  Lock lock(mutex);
  put(stream_of(stream), {[tasks = reinterpret_cast<Graph*>(runnable)->tasks] {
                            for (const auto& task : tasks) task();
                          },
                          nullptr});
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t runnable) {
  delete reinterpret_cast<Graph*>(runnable);
  return cudaSuccess;
}

// ---- Kernels, as far as they have a name ---------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) { return new void*(nullptr); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernel_names()[kernel] = name;
}

namespace {
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;
}  // namespace
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return launch(kernel, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return launch(kernel, config->stream);
}

}  // extern "C"
