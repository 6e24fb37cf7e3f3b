// The operators lstm_cell_forward, lstm_cell_backward and lstm_step on the CPU: checks, outputs, threads. The
// arithmetic is in lstm_cell-inl.h.
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
    const int64_t operands = p.batch * (columns + 2) * sizeof(Acc<S>);
    const PooledScratch scratch(2 * p.batch * sizeof(void*) + operands);
    kernels<S>().cell_step(p, begin, end, scratch.at<const void*>(0), scratch.at(2 * p.batch * sizeof(void*)));
  });
}

std::tuple<Tensor, Tensor> lstm_step_cpu(Tensor input,
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
  const bool narrow = dtype == ScalarType::Float && weight_ih.scalar_type() == ScalarType::BFloat16;
  const bool per_row = bias_ih && bias_ih->dim() == 2;
  check_cpu(op, "input", input, {B, I}, dtype);
  check_cpu(op, "h", h, {B, H}, dtype);
  check_cpu(op, "c", c, {B, H}, dtype);
  check_cpu(op, "weight_ih", weight_ih, {4 * H, I}, narrow ? ScalarType::BFloat16 : dtype);
  check_cpu(op, "weight_hh", weight_hh, {4 * H, H}, narrow ? ScalarType::BFloat16 : dtype);
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
    p.weight_ih = weight_ih.const_data_ptr();
    p.weight_hh = weight_hh.const_data_ptr();
    p.narrow = narrow;
    p.bias_ih = read<S>(bias_ih);
    p.bias_stride = per_row ? 4 * H : 0;
    p.bias_hh = read<S>(bias_hh);
    p.h_n = write<S>(h_n);
    p.c_n = write<S>(c_n);
    step(p);
  });
  return {h_n, c_n};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("lstm_cell_forward", TORCH_BOX(&Retried<&lstm_cell_forward_cpu>::run));
  m.impl("lstm_cell_backward", TORCH_BOX(&Retried<&lstm_cell_backward_cpu>::run));
  m.impl("lstm_step", TORCH_BOX(&Retried<&lstm_step_cpu>::run));
}

}  // namespace fastseq::cpu
