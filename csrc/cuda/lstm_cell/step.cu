// Launcher of the decoding step.
#include "cuda/lstm_cell/step.h"

#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/lstm_cell/step.cuh"

namespace fastseq::cuda {
namespace {

template <class T, class W, int N, int Rows>
std::string run(const StepParams& p, Stream stream) {
  const int64_t blocks = p.hidden * ((p.batch + Rows - 1) / Rows);
  if (blocks > std::numeric_limits<int32_t>::max()) return "too many sequences for one step, split the batch";
  const StepPointers<T, W> pointers{.batch = p.batch,
                                    .input_size = p.input_size,
                                    .hidden = p.hidden,
                                    .bias_stride = p.bias_stride,
                                    .input = static_cast<const T*>(p.input),
                                    .h = static_cast<const T*>(p.h),
                                    .c = static_cast<const T*>(p.c),
                                    .weight_ih = static_cast<const W*>(p.weight_ih),
                                    .weight_hh = static_cast<const W*>(p.weight_hh),
                                    .bias_ih = static_cast<const T*>(p.bias_ih),
                                    .bias_hh = static_cast<const T*>(p.bias_hh),
                                    .h_n = static_cast<T*>(p.h_n),
                                    .c_n = static_cast<T*>(p.c_n)};
  return launch({.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(kStepWarps * 32), .stream = stream},
                lstm_step_kernel<T, W, N, Rows>, pointers);
}

template <class T, class W>
std::string run(const StepParams& p, Stream stream) {
  constexpr int N = kWidth<W>;
  const bool wide = p.input_size % N == 0 && p.hidden % N == 0 && aligned({p.input, p.h, p.weight_ih, p.weight_hh});
  if (!wide) return run<T, W, 1, 4>(p, stream);
  if (p.batch == 1) return run<T, W, N, 1>(p, stream);
  return p.batch <= 4 ? run<T, W, N, 4>(p, stream) : run<T, W, N, 8>(p, stream);
}

}  // namespace

std::string launch_lstm_step(const StepParams& p, Type type, Stream stream) {
  if (p.batch * p.hidden == 0) return "";
  if (p.narrow) return run<float, bf16>(p, stream);
  return with_type(type, [&](auto zero) { return run<decltype(zero), decltype(zero)>(p, stream); });
}

}  // namespace fastseq::cuda
