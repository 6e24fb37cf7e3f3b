// Launchers of the pointwise cell.
#include "cuda/lstm_cell/cell.h"

#include "cuda/common/launch.cuh"
#include "cuda/lstm_cell/cell.cuh"

namespace fastseq::cuda {
namespace {

constexpr int kThreads = 256;

Launch launch_of(int64_t threads, Stream stream) {
  return {.grid = dim3(static_cast<unsigned>(divide_up(threads, kThreads))), .block = dim3(kThreads), .stream = stream};
}

template <class T, int N>
std::string forward(const CellForwardParams& p, Stream stream) {
  return launch(launch_of(p.batch * (p.hidden / N), stream), lstm_cell_forward_kernel<T, N>, p.batch, p.hidden,
                static_cast<const T*>(p.gates), static_cast<const T*>(p.c), static_cast<T*>(p.h),
                static_cast<T*>(p.c_n), static_cast<Acc<T>*>(p.activations));
}

template <class T, int N>
std::string backward(const CellBackwardParams& p, Stream stream) {
  return launch(launch_of(p.batch * (p.hidden / N), stream), lstm_cell_backward_kernel<T, N>, p.batch, p.hidden,
                static_cast<const Acc<T>*>(p.activations), static_cast<const T*>(p.c), static_cast<const T*>(p.c_n),
                static_cast<const T*>(p.grad_h), static_cast<const T*>(p.grad_c_n), static_cast<T*>(p.grad_gates),
                static_cast<T*>(p.grad_c));
}

}  // namespace

std::string launch_lstm_cell_forward(const CellForwardParams& p, Type type, Stream stream) {
  if (p.batch * p.hidden == 0) return "";
  const bool wide = p.hidden % 8 == 0 && aligned({p.gates, p.c, p.h, p.c_n, p.activations});
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return wide ? forward<T, kWidth<T>>(p, stream) : forward<T, 1>(p, stream);
  });
}

std::string launch_lstm_cell_backward(const CellBackwardParams& p, Type type, Stream stream) {
  if (p.batch * p.hidden == 0) return "";
  const bool wide =
      p.hidden % 8 == 0 && aligned({p.activations, p.c, p.c_n, p.grad_h, p.grad_c_n, p.grad_gates, p.grad_c});
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return wide ? backward<T, kWidth<T>>(p, stream) : backward<T, 1>(p, stream);
  });
}

std::string device_problem() { return kernel_problem(lstm_cell_forward_kernel<float, 1>); }

}  // namespace fastseq::cuda
