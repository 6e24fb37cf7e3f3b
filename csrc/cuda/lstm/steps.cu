// Launchers of the cells of one step.
#include "cuda/lstm/steps.h"

#include "cuda/common/launch.cuh"
#include "cuda/lstm/cost.h"
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

double lstm_steps_microseconds(const LstmShape& s, Type type, bool backward) {
  const cost::Launches& l = backward ? cost::kStepsBackward : cost::kStepsForward;
  const double scale = backward ? cost::kStepsScale.backward : cost::kStepsScale.forward;
  return cost::of_launches(s, type, l, scale, device_limits().multiprocessors);
}

double lstm_torch_microseconds(const LstmShape& s, Type type, bool backward) {
  const cost::Launches& l = backward ? cost::kTorchBackward : cost::kTorchForward;
  const double scale = backward ? cost::kTorchScale.backward : cost::kTorchScale.forward;
  return cost::of_launches(s, type, l, scale, device_limits().multiprocessors);
}

}  // namespace fastseq::cuda
