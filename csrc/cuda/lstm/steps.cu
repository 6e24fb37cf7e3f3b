// Launchers of the cells of one step.
#include "cuda/lstm/steps.h"

#include "cuda/common/launch.cuh"
#include "cuda/lstm/steps.cuh"

namespace fastseq::cuda {
namespace {

Launch launch_of(const LstmShape& s, Stream stream) {
  return {.grid = dim3(static_cast<unsigned>(divide_up(s.batch * s.hidden, kCellThreads))),
          .block = dim3(kCellThreads),
          .stream = stream};
}

}  // namespace

std::string launch_lstm_forward_step(
    const LstmForwardParams& p, int64_t time, const void* product, float* c, Type type, Stream stream) {
  return with_float_type(type, [&](auto zero) {
    using T = decltype(zero);
    return launch(launch_of(p.shape, stream), lstm_forward_step_kernel<T>, p, time, static_cast<const T*>(product), c);
  });
}

std::string launch_lstm_backward_step(
    const LstmBackwardParams& p, int64_t time, const void* product, float* carry, Type type, Stream stream) {
  return with_float_type(type, [&](auto zero) {
    using T = decltype(zero);
    return launch(launch_of(p.shape, stream), lstm_backward_step_kernel<T>, p, time, static_cast<const T*>(product),
                  carry);
  });
}

}  // namespace fastseq::cuda
