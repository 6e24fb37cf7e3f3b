// A substitute CUDA runtime with the functions that launch.cuh calls. It passes every launch of the compiled launchers
// to Python, which runs the PTX. Also registers torch.ops.fastseq_ptx, the CUDA operators on CPU tensors.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "cuda/common/operators.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(fastseq_ptx, m) { fastseq::define_operators(m); }

namespace {

// kernel: mangled name. sizes: grid, block, cluster. Returns 0, or writes the error to `error`.
using Launcher =
    int (*)(const char* kernel, const unsigned* sizes, size_t shared, int cooperative, void** arguments, char* error);

constexpr size_t kErrorSize = 4096;

struct Device {
  Launcher launcher = nullptr;
  int capability = 90, multiprocessors = 4;
  std::map<const void*, std::string> kernels;  // mangled names by address of the launch stub
  char error[kErrorSize] = "";
};

Device& device() {
  static Device instance;
  return instance;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void fastseq_ptx_device(Launcher launcher, int capability, int multiprocessors) {
  device().launcher = launcher;
  device().capability = capability;
  device().multiprocessors = multiprocessors;
}

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(
    void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  device().kernels[stub] = name;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  dim3 cluster(1, 1, 1);
  int cooperative = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) cooperative = a.val.cooperative;
    if (a.id == cudaLaunchAttributeClusterDimension)
      cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
  }
  const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, cluster.x, cluster.y, cluster.z};
  const auto kernel = device().kernels.find(stub);
  if (kernel == device().kernels.end()) return cudaErrorInvalidDeviceFunction;
  const int failed = device().launcher(kernel->second.c_str(), sizes, config->dynamicSmemBytes, cooperative, arguments,
                                       device().error);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

// Launch by <<< >>>: unused by launch.cuh, but the stubs of nvcc refer to it.
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }

const char* cudaGetErrorString(cudaError_t error) {
  static char text[64];
  if (error == cudaErrorLaunchFailure) return device().error;
  std::snprintf(text, sizeof text, "CUDA error %d of the substitute runtime", error);
  return text;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool hopper = device().capability >= 90;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device().capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device().capability % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = device().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (hopper ? 227 : 163) << 10;
      return cudaSuccess;
    default:
      return cudaErrorNotSupported;
  }
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = device().capability;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* config) {
  const unsigned blocks = config->numAttrs ? config->attrs[config->numAttrs - 1].val.clusterDim.x : 1;
  *count = device().capability >= 90 ? device().multiprocessors / static_cast<int>(blocks) : 0;
  return cudaSuccess;
}

}  // extern "C"
