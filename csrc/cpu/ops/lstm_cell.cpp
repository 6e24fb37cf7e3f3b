// The operators of one step on the CPU, lstm_cell_forward, lstm_cell_backward, lstm_step and linear_narrow: checks,
// outputs, threads. The arithmetic is in lstm_cell-inl.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/isa/kernel_table.h"
#include "cpu/kernels/lstm_cell_params.h"
#include "cpu/ops/arguments.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/pool.h"

namespace fastseq::cpu {
namespace {

// Rows that pay for another thread, at about `work` multiply-adds a row.
int64_t rows_per_task(int64_t work) { return kGrain / (work + 1) + 1; }

// Type of weights of `given` beside tensors of `dtype`.
WeightType weight_type(ScalarType dtype, ScalarType given, bool scaled) {
  if (scaled) return WeightType::kInt8;
  const bool narrow = dtype == ScalarType::Float && given == ScalarType::BFloat16;
  return narrow ? WeightType::kBFloat16 : WeightType::kStorage;
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward_cpu(Tensor gates, Tensor c) {
  const char* op = "lstm_cell_forward";
  check_rank(op, "c", c, 2, "(B, H)");
  const int64_t B = c.size(0), H = c.size(1);
  check_cpu(op, "c", c, {B, H}, c.scalar_type());
  check_cpu(op, "gates", gates, {B, 4 * H}, c.scalar_type());

  Tensor h = result_empty({B, H}, c.scalar_type()), c_n = result_empty({B, H}, c.scalar_type());
  Tensor activations = pooled_empty({B, 4 * H}, accumulate_type(c.scalar_type()));
  with_storage_type(op, c.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    LstmCellForwardParams<S> p{};
    p.hidden = H;
    p.gates = read<S>(gates);
    p.c = read<S>(c);
    p.h = write<S>(h);
    p.c_n = write<S>(c_n);
    p.activations = write<Acc<S>>(activations);
    parallel_for(B, rows_per_task(64 * H),
                 [&](int64_t begin, int64_t end) { kernels<S>().cell_forward(p, begin, end); });
  });
  return {h, c_n, activations};
}

std::tuple<Tensor, Tensor> lstm_cell_backward_cpu(
    Tensor activations, Tensor c, Tensor c_n, OptionalTensor grad_h, OptionalTensor grad_c_n) {
  const char* op = "lstm_cell_backward";
  check_rank(op, "c", c, 2, "(B, H)");
  const int64_t B = c.size(0), H = c.size(1);
  const ScalarType dtype = c.scalar_type();
  check_cpu(op, "c", c, {B, H}, dtype);
  check_cpu(op, "c_n", c_n, {B, H}, dtype);
  check_cpu(op, "activations", activations, {B, 4 * H}, accumulate_type(dtype));
  check_optional(op, "grad_h", grad_h, {B, H}, dtype);
  check_optional(op, "grad_c_n", grad_c_n, {B, H}, dtype);

  Tensor grad_gates = result_empty({B, 4 * H}, dtype), grad_c = result_empty({B, H}, dtype);
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    LstmCellBackwardParams<S> p{};
    p.hidden = H;
    p.activations = read<Acc<S>>(activations);
    p.c = read<S>(c);
    p.c_n = read<S>(c_n);
    p.grad_h = read<S>(grad_h);
    p.grad_c_n = read<S>(grad_c_n);
    p.grad_gates = write<S>(grad_gates);
    p.grad_c = write<S>(grad_c);
    parallel_for(B, rows_per_task(64 * H),
                 [&](int64_t begin, int64_t end) { kernels<S>().cell_backward(p, begin, end); });
  });
  return {grad_gates, grad_c};
}

// Divides the hidden units among threads, in panels of one vector.
template <class S>
void step(const LstmStepParams<S>& p) {
  const int64_t panels = (p.hidden + kernels<S>().gate_units - 1) / kernels<S>().gate_units;
  const int64_t columns = p.input_size + p.hidden, work = p.batch * 4 * kernels<S>().gate_units * columns;
  parallel_for(panels, rows_per_task(work), [&](int64_t begin, int64_t end) {
    const PooledScratch scratch(kernels<S>().cell_step_bytes(p));
    kernels<S>().cell_step(p, begin, end, scratch.at(0));
  });
}

// scale_ih, scale_hh: (4H,) of int8 weights, else none.
std::tuple<Tensor, Tensor> run_step(const char* op,
                                    const Tensor& input,
                                    const Tensor& h,
                                    const Tensor& c,
                                    const Tensor& weight_ih,
                                    const Tensor& weight_hh,
                                    const OptionalTensor& scale_ih,
                                    const OptionalTensor& scale_hh,
                                    const OptionalTensor& bias_ih,
                                    const OptionalTensor& bias_hh) {
  check_rank(op, "input", input, 2, "(B, I)");
  check_rank(op, "c", c, 2, "(B, H)");
  const int64_t B = c.size(0), H = c.size(1), I = input.size(1);
  const ScalarType dtype = scale_ih ? ScalarType::Float : c.scalar_type();
  const WeightType type = weight_type(dtype, weight_ih.scalar_type(), scale_ih.has_value());
  const ScalarType weights = type == WeightType::kInt8       ? ScalarType::Char
                             : type == WeightType::kBFloat16 ? ScalarType::BFloat16
                                                             : dtype;
  const bool per_row = bias_ih && bias_ih->dim() == 2;
  check_cpu(op, "input", input, {B, I}, dtype);
  check_cpu(op, "h", h, {B, H}, dtype);
  check_cpu(op, "c", c, {B, H}, dtype);
  check_cpu(op, "weight_ih", weight_ih, {4 * H, I}, weights);
  check_cpu(op, "weight_hh", weight_hh, {4 * H, H}, weights);
  check_optional(op, "scale_ih", scale_ih, {4 * H}, ScalarType::Float);
  check_optional(op, "scale_hh", scale_hh, {4 * H}, ScalarType::Float);
  check_optional(op, "bias_ih", bias_ih, per_row ? Shape{B, 4 * H} : Shape{4 * H}, dtype);
  check_optional(op, "bias_hh", bias_hh, {4 * H}, dtype);

  Tensor h_n = result_empty({B, H}, dtype), c_n = result_empty({B, H}, dtype);
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    LstmStepParams<S> p{};
    p.batch = B;
    p.input_size = I;
    p.hidden = H;
    p.input = read<S>(input);
    p.h = read<S>(h);
    p.c = read<S>(c);
    p.weight_ih = {weight_ih.const_data_ptr(), type, read<Acc<S>>(scale_ih)};
    p.weight_hh = {weight_hh.const_data_ptr(), type, read<Acc<S>>(scale_hh)};
    p.bias_ih = read<S>(bias_ih);
    p.bias_stride = per_row ? 4 * H : 0;
    p.bias_hh = read<S>(bias_hh);
    p.h_n = write<S>(h_n);
    p.c_n = write<S>(c_n);
    step(p);
  });
  return {h_n, c_n};
}

std::tuple<Tensor, Tensor> lstm_step_cpu(Tensor input,
                                         Tensor h,
                                         Tensor c,
                                         Tensor weight_ih,
                                         Tensor weight_hh,
                                         OptionalTensor bias_ih,
                                         OptionalTensor bias_hh) {
  return run_step("lstm_step", input, h, c, weight_ih, weight_hh, {}, {}, bias_ih, bias_hh);
}

std::tuple<Tensor, Tensor> lstm_step_int8_cpu(Tensor input,
                                              Tensor h,
                                              Tensor c,
                                              Tensor weight_ih,
                                              Tensor weight_hh,
                                              Tensor scale_ih,
                                              Tensor scale_hh,
                                              OptionalTensor bias_ih,
                                              OptionalTensor bias_hh) {
  return run_step("lstm_step_int8", input, h, c, weight_ih, weight_hh, scale_ih, scale_hh, bias_ih, bias_hh);
}

Tensor linear_narrow_cpu(Tensor input, Tensor weight, OptionalTensor scale, OptionalTensor bias) {
  const char* op = "linear_narrow";
  check_rank(op, "input", input, 2, "(B, K)");
  check_rank(op, "weight", weight, 2, "(N, K)");
  const int64_t B = input.size(0), K = input.size(1), N = weight.size(0);
  check_cpu(op, "input", input, {B, K}, ScalarType::Float);
  check_cpu(op, "weight", weight, {N, K}, scale ? ScalarType::Char : ScalarType::BFloat16);
  check_optional(op, "scale", scale, {N}, ScalarType::Float);
  check_optional(op, "bias", bias, {N}, ScalarType::Float);
  Tensor output = result_empty({B, N}, ScalarType::Float);
  const WeightType type = scale ? WeightType::kInt8 : WeightType::kBFloat16;
  const RowWeight<float> rows{weight.const_data_ptr(), type, read<float>(scale)};
  const LinearParams<float> p{B, K, N, read<float>(input), rows, read<float>(bias), write<float>(output)};
  const Kernels<float>& k = kernels<float>();
  parallel_for(divide_up(N, k.gate_units), rows_per_task(B * K * k.gate_units), [&](int64_t begin, int64_t end) {
    const PooledScratch scratch(k.linear_bytes(p));
    k.linear_rows(p, begin, end, scratch.at(0));
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("lstm_cell_forward", TORCH_BOX(&Retried<&lstm_cell_forward_cpu>::run));
  m.impl("lstm_cell_backward", TORCH_BOX(&Retried<&lstm_cell_backward_cpu>::run));
  m.impl("lstm_step", TORCH_BOX(&Retried<&lstm_step_cpu>::run));
  m.impl("lstm_step_int8", TORCH_BOX(&Retried<&lstm_step_int8_cpu>::run));
  m.impl("linear_narrow", TORCH_BOX(&Retried<&linear_narrow_cpu>::run));
}

}  // namespace fastseq::cpu
