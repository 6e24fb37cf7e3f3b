// The operators lstm_cell_forward and lstm_cell_backward on CUDA: checks, outputs, launch. See lstm_cell.cuh.
#include <tuple>

#include "cuda/lstm_cell/cell.h"
#include "cuda/common/operators.h"

namespace fastseq::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward_cuda(Tensor gates, Tensor c) {
  const char* op = "lstm_cell_forward";
  check_rank(op, "c", c, 2, "(B, H)");
  const int64_t B = c.size(0), H = c.size(1);
  const ScalarType dtype = c.scalar_type();
  check_like(op, "c", c, {B, H}, dtype, c);
  check_like(op, "gates", gates, {B, 4 * H}, dtype, c);

  const OnDeviceOf device(c);
  Tensor h = empty(c, {B, H}, dtype), c_n = empty(c, {B, H}, dtype);
  Tensor activations = empty(c, {B, 4 * H}, accumulate_type(dtype));
  const CellForward p{.batch = B,
                      .hidden = H,
                      .gates = read(gates),
                      .c = read(c),
                      .h = write(h),
                      .c_n = write(c_n),
                      .activations = write(activations)};
  check_launch(op, launch_lstm_cell_forward(p, type_of(op, dtype, true), device.stream()));
  return {h, c_n, activations};
}

std::tuple<Tensor, Tensor> lstm_cell_backward_cuda(
    Tensor activations, Tensor c, Tensor c_n, OptionalTensor grad_h, OptionalTensor grad_c_n) {
  const char* op = "lstm_cell_backward";
  check_rank(op, "c", c, 2, "(B, H)");
  const int64_t B = c.size(0), H = c.size(1);
  const ScalarType dtype = c.scalar_type();
  check_like(op, "c", c, {B, H}, dtype, c);
  check_like(op, "c_n", c_n, {B, H}, dtype, c);
  check_like(op, "activations", activations, {B, 4 * H}, accumulate_type(dtype), c);
  check_like(op, "grad_h", grad_h, {B, H}, dtype, c);
  check_like(op, "grad_c_n", grad_c_n, {B, H}, dtype, c);

  const OnDeviceOf device(c);
  Tensor grad_gates = empty(c, {B, 4 * H}, dtype), grad_c = empty(c, {B, H}, dtype);
  const CellBackward p{.batch = B,
                       .hidden = H,
                       .activations = read(activations),
                       .c = read(c),
                       .c_n = read(c_n),
                       .grad_h = read(grad_h),
                       .grad_c_n = read(grad_c_n),
                       .grad_gates = write(grad_gates),
                       .grad_c = write(grad_c)};
  check_launch(op, launch_lstm_cell_backward(p, type_of(op, dtype, true), device.stream()));
  return {grad_gates, grad_c};
}

}  // namespace
}  // namespace fastseq::cuda

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_LIBRARY, FASTSEQ_DISPATCH, m) {
  m.impl("lstm_cell_forward", TORCH_BOX(&fastseq::cuda::lstm_cell_forward_cuda));
  m.impl("lstm_cell_backward", TORCH_BOX(&fastseq::cuda::lstm_cell_backward_cuda));
}
