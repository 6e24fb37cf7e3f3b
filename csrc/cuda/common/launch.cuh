// Kernel launches and device limits. Functions return errors as text; the empty string means success.
#pragma once

#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "cuda/common/device.cuh"
#include "cuda/common/types.h"

namespace fastseq::cuda {

struct Launch {
  dim3 grid, block;
  size_t shared_memory = 0;  // dynamic, bytes
  Stream stream = nullptr;
  bool cooperative = false;  // all blocks must be resident at once, else the launch is refused
  unsigned cluster = 1;      // blocks of a cluster, along x
};

struct DeviceLimits {
  int multiprocessors;
  size_t shared_memory;  // largest of one block, bytes
  int capability;        // 10 * major + minor
};

#ifdef FASTSEQ_HOST_DEVICE

inline DeviceLimits device_limits() {
  const host::Options& o = host::options();
  return {o.multiprocessors, o.shared_memory, o.capability};
}

template <class... Parameters, class... Arguments>
std::string launch(const Launch& l, void (*kernel)(Parameters...), Arguments... arguments) {
  const bool together = l.cooperative || l.cluster > 1;
  const std::string error =
      host::launch(l.grid, l.block, l.shared_memory, together, l.cluster, [&] { kernel(arguments...); });
  return error.empty() ? error : "host-side device: " + error;
}

template <class... Parameters, class... Arguments>
Outcome launch_together(const Launch& l, void (*kernel)(Parameters...), Arguments... arguments) {
  const unsigned together = l.cooperative ? l.grid.count() : l.cluster;
  const unsigned resident = static_cast<unsigned>(host::options().resident_blocks);
  if (together > resident) return {"host-side device: no room for " + std::to_string(together) + " blocks", true};
  return {launch(l, kernel, arguments...)};
}

// Clusters resident at once; 0 if the device cannot run them.
template <class Kernel>
int resident_clusters(const Launch& l, Kernel*) {
  return host::options().capability >= 90 ? host::options().multiprocessors / static_cast<int>(l.cluster) : 0;
}

template <class Kernel>
std::string kernel_problem(Kernel*) {
  return "";
}

#else

inline DeviceLimits device_limits() {
  int device = 0, major = 0, minor = 0, multiprocessors = 0, shared_memory = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {multiprocessors, static_cast<size_t>(shared_memory), 10 * major + minor};
}

inline std::string error_text(cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // clears the error, else the next call returns it again
  return cudaGetErrorString(error);
}

// Returns why the current device cannot run the kernel, or "". Loads the kernel or compiles its PTX.
template <class Kernel>
std::string kernel_problem(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  return error_text(cudaFuncGetAttributes(&attributes, kernel));
}

template <class Kernel>
cudaError_t allow_shared_memory(const Launch& l, Kernel* kernel) {
  constexpr size_t kAlwaysAllowed = 48 << 10;
  if (l.cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  if (l.shared_memory <= kAlwaysAllowed) return cudaSuccess;
  // Sets the device's maximum, not l.shared_memory: the attribute belongs to the function, and another thread may
  // launch the function with more. These kernels have no static shared memory.
  const int most = static_cast<int>(device_limits().shared_memory);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// The result points to `attributes`, which must outlive it.
inline cudaLaunchConfig_t configuration(const Launch& l, cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.shared_memory;
  config.stream = static_cast<cudaStream_t>(l.stream);
  config.attrs = attributes;
  if (l.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (l.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {l.cluster, 1, 1};
  }
  return config;
}

template <class... Parameters, class... Arguments>
cudaError_t enqueue(const Launch& l, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(l, attributes);
  const cudaError_t error = allow_shared_memory(l, kernel);
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...) : error;
}

template <class... Parameters, class... Arguments>
std::string launch(const Launch& l, void (*kernel)(Parameters...), Arguments... arguments) {
  return error_text(enqueue(l, kernel, arguments...));
}

// True if the driver found no room for the blocks. The attributes of a device promise more than a green context, a
// share of MPS or a partition by MIG may hold.
inline bool means_no_room(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorLaunchOutOfResources ||
         error == cudaErrorInvalidClusterSize || error == cudaErrorNotSupported;
}

// launch() for a cooperative grid or for clusters.
template <class... Parameters, class... Arguments>
Outcome launch_together(const Launch& l, void (*kernel)(Parameters...), Arguments... arguments) {
  const cudaError_t error = enqueue(l, kernel, arguments...);
  return {error_text(error), means_no_room(error)};
}

// Clusters resident at once, cached per kernel, device, cluster and block size: each LSTM call tries several plans.
template <class Kernel>
int resident_clusters(const Launch& l, Kernel* kernel) {
  using Key = std::tuple<const void*, int, unsigned, unsigned, size_t>;
  static std::mutex mutex;
  static std::map<Key, int> cache;
  int device = 0;
  cudaGetDevice(&device);
  const Key key(reinterpret_cast<const void*>(kernel), device, l.cluster, l.block.x, l.shared_memory);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = cache.find(key);
  if (entry != cache.end()) return entry->second;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(l, attributes);
  int count = 0;
  cudaFuncAttributes compiled{};
  cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error == cudaSuccess && compiled.ptxVersion < 90) return 0;  // PTX older than sm_90: no clusters
  if (error == cudaSuccess) error = allow_shared_memory(l, kernel);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  if (!error_text(error).empty()) return 0;
  return cache[key] = count;
}

#endif

// True if all pointers allow 16-byte loads and stores.
inline bool aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return bits % 16 == 0;
}

// Returns run(T{}) for the element type T. For kernels without a double instantiation.
template <class Run>
auto with_float_type(Type type, const Run& run) {
  switch (type) {
    case Type::kBFloat16:
      return run(bf16{});
    case Type::kHalf:
      return run(half{});
    default:
      return run(float{});
  }
}

// Returns run(T{}) for the element type T, double included.
template <class Run>
auto with_type(Type type, const Run& run) {
  return type == Type::kDouble ? run(double{}) : with_float_type(type, run);
}

}  // namespace fastseq::cuda
