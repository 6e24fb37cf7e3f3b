// Operators lstm_cell_forward, lstm_cell_backward and lstm_step on CUDA: checks, outputs, launch.
#include <tuple>

#include "cuda/common/operators.h"
#include "cuda/lstm_cell/cell.h"
#include "cuda/lstm_cell/step.h"

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
  const CellForwardParams p{.batch = B,
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
  const CellBackwardParams p{.batch = B,
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

std::tuple<Tensor, Tensor> lstm_step_cuda(Tensor input,
                                          Tensor h,
                                          Tensor c,
                                          Tensor weight_ih,
                                          Tensor weight_hh,
                                          OptionalTensor bias_ih,
                                          OptionalTensor bias_hh) {
  const char* op = "lstm_step";
  check_rank(op, "input", input, 2, "(B, I)");
  check_rank(op, "c", c, 2, "(B, H)");
  const int64_t B = c.size(0), H = c.size(1), I = input.size(1);
  const ScalarType dtype = c.scalar_type();
  const Type type = type_of(op, dtype, true);
  const bool narrow = dtype == ScalarType::Float && weight_ih.scalar_type() == ScalarType::BFloat16;
  const ScalarType weight_dtype = narrow ? ScalarType::BFloat16 : dtype;
  const bool per_row = bias_ih && bias_ih->dim() == 2;
  check_like(op, "input", input, {B, I}, dtype, c);
  check_like(op, "h", h, {B, H}, dtype, c);
  check_like(op, "c", c, {B, H}, dtype, c);
  check_like(op, "weight_ih", weight_ih, {4 * H, I}, weight_dtype, c);
  check_like(op, "weight_hh", weight_hh, {4 * H, H}, weight_dtype, c);
  check_like(op, "bias_ih", bias_ih, per_row ? Shape{B, 4 * H} : Shape{4 * H}, dtype, c);
  check_like(op, "bias_hh", bias_hh, {4 * H}, dtype, c);

  const OnDeviceOf device(c);
  Tensor h_n = empty(c, {B, H}, dtype), c_n = empty(c, {B, H}, dtype);
  const StepParams p{.batch = B,
                     .input_size = I,
                     .hidden = H,
                     .narrow = narrow,
                     .bias_stride = per_row ? 4 * H : 0,
                     .input = read(input),
                     .h = read(h),
                     .c = read(c),
                     .weight_ih = read(weight_ih),
                     .weight_hh = read(weight_hh),
                     .bias_ih = read(bias_ih),
                     .bias_hh = read(bias_hh),
                     .h_n = write(h_n),
                     .c_n = write(c_n)};
  check_launch(op, launch_lstm_step(p, type, device.stream()));
  return {h_n, c_n};
}

}  // namespace
}  // namespace fastseq::cuda

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_LIBRARY, FASTSEQ_DISPATCH, m) {
  m.impl("lstm_cell_forward", TORCH_BOX(&fastseq::cuda::lstm_cell_forward_cuda));
  m.impl("lstm_cell_backward", TORCH_BOX(&fastseq::cuda::lstm_cell_backward_cuda));
  m.impl("lstm_step", TORCH_BOX(&fastseq::cuda::lstm_step_cuda));
}
