// The operators lstm_cell_forward and lstm_cell_backward on the CPU: checks, outputs, threads. See lstm_cell.inc.
#include "lstm_cell.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kernels.h"
#include "operators.h"
#include "pool.h"

namespace fastseq {
namespace {

using torch::stable::parallel_for;

// Rows that make a task worth a thread, when one row costs about `work` multiply-adds.
int64_t rows_per_task(int64_t work) { return kGrain / (work + 1) + 1; }

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward_cpu(Tensor gates, Tensor c) {
  const char* op = "lstm_cell_forward";
  check_rank(op, "c", c, 2, "(B, H)");
  const int64_t B = c.size(0), H = c.size(1);
  check_cpu(op, "c", c, {B, H}, c.scalar_type());
  check_cpu(op, "gates", gates, {B, 4 * H}, c.scalar_type());

  Tensor h = pooled_empty(c, {B, H}, c.scalar_type()), c_n = pooled_empty(c, {B, H}, c.scalar_type());
  Tensor activations = pooled_empty(c, {B, 4 * H}, accumulate_type(c.scalar_type()));
  with_storage_type(op, c.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    CellForward<S> p{};
    p.hidden = H;
    p.gates = read<S>(gates);
    p.c = read<S>(c);
    p.h = write<S>(h);
    p.c_n = write<S>(c_n);
    p.activations = write<Acc<S>>(activations);
    parallel_for(0, B, rows_per_task(64 * H), [&](int64_t begin, int64_t end) { kernels<S>().cell_forward(p, begin, end); });
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

  Tensor grad_gates = pooled_empty(c, {B, 4 * H}, dtype), grad_c = pooled_empty(c, {B, H}, dtype);
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    CellBackward<S> p{};
    p.hidden = H;
    p.activations = read<Acc<S>>(activations);
    p.c = read<S>(c);
    p.c_n = read<S>(c_n);
    p.grad_h = read<S>(grad_h);
    p.grad_c_n = read<S>(grad_c_n);
    p.grad_gates = write<S>(grad_gates);
    p.grad_c = write<S>(grad_c);
    parallel_for(0, B, rows_per_task(64 * H), [&](int64_t begin, int64_t end) { kernels<S>().cell_backward(p, begin, end); });
  });
  return {grad_gates, grad_c};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("lstm_cell_forward", TORCH_BOX(&lstm_cell_forward_cpu));
  m.impl("lstm_cell_backward", TORCH_BOX(&lstm_cell_backward_cpu));
}

}  // namespace fastseq
