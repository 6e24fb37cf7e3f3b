// Operators cpu_fma_chain, the peak of the multiply-adds, and cpu_empty_cache.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "cpu/isa/kernel_table.h"
#include "cpu/ops/arguments.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/pool.h"

namespace fastseq::cpu {
namespace {

int64_t cpu_fma_chain(Tensor example, int64_t steps) {
  std::atomic<int64_t> operations{0};
  with_storage_type("cpu_fma_chain", example.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    parallel_for(torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) operations += kernels<S>().fma_chain(steps);
    });
  });
  return operations;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) { m.impl("cpu_fma_chain", TORCH_BOX(&cpu_fma_chain)); }

STABLE_TORCH_LIBRARY_IMPL(fastseq, CompositeExplicitAutograd, m) { m.impl("cpu_empty_cache", TORCH_BOX(&empty_pool)); }

}  // namespace fastseq::cpu
