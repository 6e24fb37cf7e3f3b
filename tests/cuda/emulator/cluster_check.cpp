// Blocks of a cluster send to each other every round, without a barrier between rounds. With one buffer, a block
// overwrites words that a slow block still reads. cluster_check BUFFERS SEED prints "ok", "wrong" or the launch error.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/common/launch.cuh"

using namespace fastseq::cuda;

static constexpr int kRounds = 6, kBlocks = 4;

static __global__ void exchange_kernel(float* out, int buffers) {
  FASTSEQ_SHARED(uint64_t, mailbox, 2 * kBlocks);
  FASTSEQ_SHARED(uint64_t, arrived, 2);
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b) {
      mbarrier_init(arrived + b, 1);
      mbarrier_arrive_expect(arrived + b, 8 * kBlocks);
    }
  }
  cluster_barrier();
  float sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    uint64_t* box = mailbox + round % buffers * kBlocks;
    uint64_t* news = arrived + round % 2;
    if (threadIdx.x < kBlocks) {
      store_async8(cluster_address(box + cluster_rank(), threadIdx.x), cluster_address(news, threadIdx.x),
                   100 * round + cluster_rank());
    }
    mbarrier_wait(news, round / 2 % 2);
    if (threadIdx.x == 0) mbarrier_arrive_expect(news, 8 * kBlocks);
    for (int k = 0; k < kBlocks; ++k) sum += static_cast<float>(box[k]);
    __syncwarp();  // sending again implies that the whole block has read
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  cluster_barrier();
}

int main(int, char** arguments) {
  host::options().shuffle = true;
  host::options().seed = std::strtoull(arguments[2], nullptr, 10);
  std::vector<float> out(kBlocks * 32);
  const Launch l{.grid = dim3(kBlocks), .block = dim3(32), .cluster = kBlocks};
  std::string result = launch(l, exchange_kernel, out.data(), std::atoi(arguments[1]));
  float want = 0;
  for (int round = 0; round < kRounds; ++round) want += 4 * 100 * round + 0 + 1 + 2 + 3;
  for (float x : out) {
    if (result.empty() && x != want) result = "wrong";
  }
  std::puts(result.empty() ? "ok" : result.c_str());
}
