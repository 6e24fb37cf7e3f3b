// Latencies on the critical path of a persistent LSTM step, and the number of clusters that fit this GPU: one line of
// JSON per figure. Run by gpu_check.py, or directly: make latencies && build/latencies
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>

namespace {

constexpr int kThreads = 256;
constexpr unsigned kSpins = 1u << 24;  // some seconds; then the wait becomes an error instead of a hang

__device__ void spin(unsigned& spins) {
  if (++spins > kSpins) __trap();
}

__device__ void store_release(unsigned* p, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

__device__ unsigned load_acquire(const unsigned* p) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ void wait_for(const unsigned* p, unsigned value) {
  for (unsigned spins = 0; load_acquire(p) < value;) spin(spins);
}

// Every block increments one counter and waits until it reaches gridDim.x.
__global__ void grid_barrier(unsigned* counter, int steps) {
  for (int i = 1; i <= steps; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      wait_for(counter, i * gridDim.x);
    }
    __syncthreads();
  }
}

// Every block sets its flag; thread i waits for the flag of block i.
__global__ void flag_gather(unsigned* flags, int steps) {
  for (int i = 1; i <= steps; ++i) {
    __syncthreads();
    if (threadIdx.x == 0) store_release(flags + blockIdx.x, i);
    if (threadIdx.x < gridDim.x) wait_for(flags + threadIdx.x, i);
    __syncthreads();
  }
}

// The first and the last block take turns; the other blocks exit at once.
__global__ void flag_round_trip(unsigned* flags, int steps) {
  if (threadIdx.x != 0) return;
  unsigned *ping = flags, *pong = flags + 64;  // on separate cache lines
  for (int i = 1; i <= steps; ++i) {
    if (blockIdx.x == 0) {
      store_release(ping, i);
      wait_for(pong, i);
    } else if (blockIdx.x == gridDim.x - 1) {
      wait_for(ping, i);
      store_release(pong, i);
    }
  }
}

__global__ void nothing() {}

__device__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__global__ void cluster_barrier(int steps) {
  for (int i = 0; i < steps; ++i) cluster_sync();
}

#if __CUDA_ARCH__ >= 900
__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ uint32_t address_in(uint32_t address, uint32_t rank) {
  uint32_t result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

__device__ void init_barriers(uint64_t* barriers, int count) {
  if (threadIdx.x == 0) {
    for (int k = 0; k < count; ++k)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + k)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
}

// Sends 16 bytes to block `rank`: to the address of `here`, completing on `barrier`, both in that block's shared
// memory.
__device__ void send(const uint4* here, const uint64_t* barrier, uint32_t rank, uint32_t value) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %1, %1, %1}, [%2];" ::"r"(
                   address_in(shared_address(here), rank)),
               "r"(value), "r"(address_in(shared_address(barrier), rank))
               : "memory");
}

__device__ void expect(const uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ void wait_for_bytes(const uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  for (unsigned spins = 0; !done; spin(spins))
    asm volatile(
        "{ .reg .pred p;\n"
        "  mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}
#endif

// Blocks 0 and 1 of a cluster send each other 16 bytes in turn.
__global__ void remote_round_trip(int steps) {
#if __CUDA_ARCH__ >= 900
  __shared__ uint4 word;
  __shared__ uint64_t barrier;
  init_barriers(&barrier, 1);
  const uint32_t rank = cluster_rank();
  for (int i = 0; i < steps && rank < 2 && threadIdx.x == 0; ++i) {
    if (rank == 0) send(&word, &barrier, 1, i);
    expect(&barrier, sizeof word);
    wait_for_bytes(&barrier, i & 1);
    if (rank == 1) send(&word, &barrier, 0, i);
  }
  __syncthreads();
  cluster_sync();  // keeps each block's shared memory alive until all writes to it have arrived
#endif
}

// Every step, each of the `blocks` of a cluster sends `words` x 16 bytes to all blocks, alternating between two
// buffers.
__global__ void remote_gather(int steps, int blocks, int words) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ uint4 buffers[];  // (2, blocks, words)
  __shared__ uint64_t barriers[2];
  init_barriers(barriers, 2);
  const int rank = cluster_rank(), all = blocks * words;
  for (int i = 0; i < steps; ++i) {
    const int half = i & 1;
    if (threadIdx.x == 0) expect(barriers + half, all * sizeof(uint4));
    for (int k = threadIdx.x; k < all; k += kThreads)
      send(buffers + half * all + rank * words + k % words, barriers + half, k / words, i);
    wait_for_bytes(barriers + half, i >> 1 & 1);
    __syncthreads();
  }
  cluster_sync();
#endif
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}

void report(const char* what, const std::string& where, double value, const char* unit) {
  printf("{\"quantity\": \"%s\", \"where\": \"%s\", \"number\": %.4g, \"value\": \"%.4g %s\"}\n", what, where.c_str(),
         value, value, unit);
  fflush(stdout);
}

// Microseconds per step without the launch: median of 9 long runs minus median of 9 short ones, over the extra steps.
double step_us(const char* what, const std::function<void(int)>& launch) {
  constexpr int kShort = 16, kLong = 2016;
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), what);
  check(cudaEventCreate(&end), what);
  auto median_us = [&](int steps) {
    std::array<float, 9> times;
    for (float& milliseconds : times) {
      check(cudaEventRecord(start), what);
      launch(steps);
      check(cudaGetLastError(), what);
      check(cudaEventRecord(end), what);
      check(cudaEventSynchronize(end), what);
      check(cudaEventElapsedTime(&milliseconds, start, end), what);
    }
    std::sort(times.begin(), times.end());
    return 1e3 * times[4];
  };
  median_us(kShort);  // warms up
  return (median_us(kLong) - median_us(kShort)) / (kLong - kShort);
}

void measure_grid(int multiprocessors) {
  unsigned* flags;
  constexpr size_t kBytes = 1 << 16;
  check(cudaMalloc(&flags, kBytes), "flags");
  const std::pair<const char*, void (*)(unsigned*, int)> kernels[] = {
      {"grid barrier, one counter", grid_barrier},
      {"grid barrier, a flag a block", flag_gather},
      {"flag round trip, first and last block", flag_round_trip}};
  for (const int blocks : {multiprocessors / 2, multiprocessors})
    for (const auto& [what, kernel] : kernels)
      report(what, std::to_string(blocks) + " blocks",
             step_us(what,
                     [&, kernel = kernel](int steps) {
                       void* arguments[] = {&flags, &steps};
                       cudaMemsetAsync(flags, 0, kBytes);
                       cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), blocks, kThreads, arguments, 0,
                                                   nullptr);
                     }),
             "µs");
  check(cudaFree(flags), "flags");
}

// Empty kernels in sequence in one CUDA graph: the minimum cost of one kernel per step.
void measure_launches() {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "stream");
  auto graph_of = [&](int kernels) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
    for (int k = 0; k < kernels; ++k) nothing<<<1, 32, 0, stream>>>();
    check(cudaStreamEndCapture(stream, &graph), "capture");
    check(cudaGraphInstantiate(&executable, graph, 0), "graph");
    return executable;
  };
  const cudaGraphExec_t few = graph_of(16), many = graph_of(2016);
  report("kernel boundary in a CUDA graph", "1 block",
         step_us("CUDA graph", [&](int steps) { cudaGraphLaunch(steps == 16 ? few : many, nullptr); }), "µs");
}

void measure_clusters(int largest_shared) {
  for (const auto kernel : {reinterpret_cast<void*>(cluster_barrier), reinterpret_cast<void*>(remote_round_trip),
                            reinterpret_cast<void*>(remote_gather)}) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "clusters of 16");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, largest_shared), "shared memory");
  }
  for (const int blocks : {2, 4, 8, 16}) {
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = kThreads;
    config.attrs = &cluster;
    config.numAttrs = 1;
    const std::string where = "cluster of " + std::to_string(blocks);
    for (const int kilobytes : {0, 100, largest_shared >> 10}) {
      int count = 0;
      config.dynamicSmemBytes = kilobytes << 10;
      if (cudaOccupancyMaxActiveClusters(&count, remote_gather, &config) != cudaSuccess) cudaGetLastError();
      report("clusters that fit at once", where + ", " + std::to_string(kilobytes) + " KiB a block", count, "clusters");
    }
    auto time = [&](const char* what, const std::string& detail, size_t shared, auto kernel, auto... more) {
      config.dynamicSmemBytes = shared;
      report(what, where + detail,
             step_us(what, [&](int steps) { cudaLaunchKernelEx(&config, kernel, steps, more...); }), "µs");
    };
    time("cluster barrier", "", 0, cluster_barrier);
    time("st.async round trip, 16 bytes", "", 0, remote_round_trip);
    for (const int words : {4, 16, 64})
      time("st.async gather", ", " + std::to_string(16 * words) + " bytes a block", 2 * blocks * words * sizeof(uint4),
           remote_gather, blocks, words);
  }
}

}  // namespace

int main() {
  cudaDeviceProp gpu;
  check(cudaGetDeviceProperties(&gpu, 0), "GPU");
  report("multiprocessors", gpu.name, gpu.multiProcessorCount, "");
  report("shared memory a block", gpu.name, gpu.sharedMemPerBlockOptin / 1024.0, "KiB");
  measure_launches();
  measure_grid(gpu.multiProcessorCount);
  if (gpu.major >= 9) measure_clusters(static_cast<int>(gpu.sharedMemPerBlockOptin) - 1024);
}
