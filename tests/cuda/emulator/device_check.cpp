// Small correct and faulty kernels to test the host-side device. device_check SCENARIO [SEED] prints "ok", "wrong", or
// the launch error. tests/cuda/test_emulator.py has the expected output per scenario and sanitizer.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/common/launch.cuh"

using namespace fastseq::cuda;

namespace {

// Reverses the block's numbers through shared memory.
__global__ void reverse_kernel(const float* in, float* out, bool wait) {
  FASTSEQ_SHARED(float, tile, 64);
  const int i = threadIdx.x, at = blockIdx.x * 64;
  tile[i] = in[at + i];
  if (wait) __syncthreads();
  out[at + i] = tile[63 - i];
}

// Reverses them between two barriers, neither of which orders the accesses.
__global__ void enclosed_kernel(const float* in, float* out, bool wait) {
  FASTSEQ_SHARED(float, tile, 64);
  const int i = threadIdx.x, at = blockIdx.x * 64;
  __syncthreads();
  tile[i] = in[at + i];
  if (wait) __syncthreads();
  out[at + i] = tile[63 - i];
  __syncthreads();
}

std::string reverse(void (*kernel)(const float*, float*, bool), bool wait) {
  std::vector<float> in(128), out(128);
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i);
  const Launch l{.grid = dim3(2), .block = dim3(64)};
  const std::string error = launch(l, kernel, in.data(), out.data(), wait);
  if (!error.empty()) return error;
  for (int i = 0; i < 128; ++i) {
    if (out[i] != in[i / 64 * 64 + 63 - i % 64]) return "wrong";
  }
  return "ok";
}

// Half of the block waits at a barrier, the other half for a flag that is never set.
__global__ void divergent_kernel(unsigned* flag) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    wait_for_flag(flag, 1);
}

__global__ void lost_lane_kernel(float* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_sync(kAllLanes, 1.0f, 3);
}

__global__ void copy_kernel(const float* in, float* out, bool wait) {
  FASTSEQ_SHARED(float, tile, 128);
  copy_async16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x);
  commit_copies();
  if (wait) wait_copies<0>();
  __syncthreads();
  for (int k = 0; k < 4; ++k) out[threadIdx.x + 32 * k] = tile[127 - threadIdx.x - 32 * k];
  if (!wait) wait_copies<0>();
}

std::string copy(bool wait) {
  alignas(16) float in[128], out[128];
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i);
  const std::string error = launch({.grid = dim3(1), .block = dim3(32)}, copy_kernel, (const float*)in, out, wait);
  if (!error.empty()) return error;
  for (int i = 0; i < 128; ++i) {
    if (out[i] != in[127 - i]) return "wrong";
  }
  return "ok";
}

// Every block adds its neighbour's number of the previous round. The result is wrong if a block runs ahead.
__global__ void ring_kernel(float* values, unsigned* counter, int rounds, bool two_buffers, bool synchronised) {
  const unsigned own = blockIdx.x, next = (own + 1) % gridDim.x, count = gridDim.x;
  for (int r = 0; r < rounds; ++r) {
    float* from = values + (two_buffers ? r % 2 * count : 0);
    float* to = values + (two_buffers ? (r + 1) % 2 * count : 0);
    if (threadIdx.x == 0) store_l2(to + own, load_l2(from + own) + load_l2(from + next));
    if (synchronised) grid_barrier(counter, r + 1, count);
  }
}

std::string ring(bool two_buffers, bool synchronised, int blocks = 5) {
  const int rounds = 4;
  std::vector<float> values(2 * blocks), want(blocks);
  for (int i = 0; i < blocks; ++i) want[i] = values[i] = values[blocks + i] = static_cast<float>(i);
  for (int r = 0; r < rounds; ++r) {
    const std::vector<float> before = want;
    for (int i = 0; i < blocks; ++i) want[i] = before[i] + before[(i + 1) % blocks];
  }
  unsigned counter = 0;
  const Launch l{.grid = dim3(blocks), .block = dim3(32), .cooperative = true};
  const std::string error = launch(l, ring_kernel, values.data(), &counter, rounds, two_buffers, synchronised);
  if (!error.empty()) return error;
  for (int i = 0; i < blocks; ++i) {
    if (values[i] != want[i]) return "wrong";
  }
  return "ok";
}

// Every block sends its rank to all blocks of its cluster, twice, and sums the ranks it receives.
__global__ void cluster_kernel(float* out, unsigned cluster, bool wait) {
  FASTSEQ_SHARED(uint64_t, mailbox, 8);
  FASTSEQ_SHARED(uint64_t, arrived, 1);
  if (threadIdx.x == 0) mbarrier_init(arrived, 1);
  cluster_barrier();
  float sum = 0;
  for (unsigned round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) mbarrier_arrive_expect(arrived, 8 * cluster);
    cluster_barrier();  // all have announced the bytes
    if (threadIdx.x < cluster) {
      const unsigned rank = threadIdx.x;
      store_async8(cluster_address(mailbox + cluster_rank(), rank), cluster_address(arrived, rank),
                   100 * round + cluster_rank());
    }
    if (wait) mbarrier_wait(arrived, round % 2);
    for (unsigned k = 0; k < cluster; ++k) sum += static_cast<float>(mailbox[k]);
    cluster_barrier();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

std::string clusters(bool wait) {
  std::vector<float> out(8);
  const Launch l{.grid = dim3(8), .block = dim3(32), .cluster = 4};
  const std::string error = launch(l, cluster_kernel, out.data(), 4u, wait);
  if (!error.empty()) return error;
  for (float x : out) {
    if (x != 2 * (0 + 1 + 2 + 3) + 4 * 100) return "wrong";
  }
  return "ok";
}

__global__ void out_of_bounds_kernel(float* out) {
  FASTSEQ_SHARED(float, tile, 33);
  tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 2];
}

__global__ void misaligned_kernel(const float* in, float* out) {
  float x[4];
  load_vector(x, in + 1);
  out[threadIdx.x] = x[0];
}

__global__ void nothing_kernel() {}

template <class... Arguments>
std::string one_block(void (*kernel)(Arguments...), Arguments... arguments) {
  const std::string error = launch({.grid = dim3(1), .block = dim3(64)}, kernel, arguments...);
  return error.empty() ? "ok" : error;
}

std::string run(const std::string& scenario) {
  static unsigned flag = 0;
  alignas(16) static float numbers[128];
  if (scenario == "reverse") return reverse(reverse_kernel, true);
  if (scenario == "reverse without barrier") return reverse(reverse_kernel, false);
  if (scenario == "enclosed") return reverse(enclosed_kernel, true);
  if (scenario == "enclosed without barrier") return reverse(enclosed_kernel, false);
  if (scenario == "copy") return copy(true);
  if (scenario == "copy without wait") return copy(false);
  if (scenario == "ring") return ring(true, true);
  if (scenario == "ring with one buffer") return ring(false, true);
  if (scenario == "ring without barrier") return ring(true, false);
  if (scenario == "ring too large") return ring(true, true, 200);
  if (scenario == "cluster") return clusters(true);
  if (scenario == "cluster without wait") return clusters(false);
  if (scenario == "deadlock") return one_block(divergent_kernel, &flag);
  if (scenario == "lost lane") return one_block(lost_lane_kernel, static_cast<float*>(numbers));
  if (scenario == "out of bounds") return one_block(out_of_bounds_kernel, static_cast<float*>(numbers));
  if (scenario == "misaligned") {
    return one_block(misaligned_kernel, static_cast<const float*>(numbers), static_cast<float*>(numbers));
  }
  if (scenario == "too much shared memory") {
    const std::string error = launch({.grid = dim3(1), .block = dim3(32), .shared_memory = 1 << 20}, nothing_kernel);
    return error.empty() ? "ok" : error;
  }
  return "no such scenario: " + scenario;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) {
    host::options().shuffle = true;
    host::options().seed = std::strtoull(arguments[2], nullptr, 10);
  }
  std::puts(run(count > 1 ? arguments[1] : "").c_str());
}
