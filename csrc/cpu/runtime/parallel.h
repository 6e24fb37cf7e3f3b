// Loops on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>

namespace fastseq::cpu {

// Calls run(begin, end) for ranges of [0, count), at least `grain` long, on torch's threads. Rethrows the first
// exception of run, whose type and message torch's parallel_for would lose.
template <class Run>
void parallel_for(int64_t count, int64_t grain, const Run& run) {
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      run(begin, end);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace fastseq::cpu
