// The CUDA operators on the host-side device: torch.ops.fastseq_sim, CPU tensors. Python sets schedule and limits.
#include "cuda/common/operators.h"
#include "schemas.h"
#include "world.h"

STABLE_TORCH_LIBRARY(fastseq_sim, m) { fastseq::define_operators(m); }

extern "C" __attribute__((visibility("default"))) void fastseq_host_schedule(int shuffle, uint64_t seed) {
  host::options().shuffle = shuffle;
  host::options().seed = seed;
}

// capability: 10 * major + minor. shared_memory: largest of a block, bytes. resident_blocks: limit of a launch whose
// blocks must run at the same time. placed_blocks: those that run until they end before the others begin; 0: all.
extern "C" __attribute__((visibility("default"))) void fastseq_host_device(
    int multiprocessors, int capability, size_t shared_memory, int resident_blocks, int placed_blocks) {
  host::options().multiprocessors = multiprocessors;
  host::options().resident_blocks = resident_blocks;
  host::options().placed_blocks = placed_blocks;
  host::options().capability = capability;
  host::options().shared_memory = shared_memory;
}
