// The CPU implementations of the operators: checks, outputs, threads. The arithmetic is in lstm_cell.cpp and lstm.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <tuple>

#include "../checks.h"
#include "kernels.h"
#include "lstm.h"
#include "lstm_cell.h"
#include "sequences.h"

namespace fastseq {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

template <class S>
const S* read(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}

template <class S>
const S* read(const OptionalTensor& t) {
  return t ? read<S>(*t) : nullptr;
}

template <class S>
S* write(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

// Rows that make a task worth a thread, when one row costs about `work` multiply-adds.
int64_t rows_per_task(int64_t work) { return kGrain / (work + 1) + 1; }

// The dtype that tensors of `dtype` are computed in.
ScalarType accumulate_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls run(S{}) with the storage type of `dtype`.
template <class Run>
void with_storage_type(const char* op, ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Half:
      return run(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be Float, Double, BFloat16 or Half, got ", dtype);
  }
}

void check_optional(const char* op, const char* name, const OptionalTensor& t, const Shape& shape, ScalarType dtype) {
  if (t) check_cpu(op, name, *t, shape, dtype);
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward_cpu(Tensor gates, Tensor c) {
  const char* op = "lstm_cell_forward";
  check_rank(op, "c", c, 2, "(B, H)");
  const int64_t B = c.size(0), H = c.size(1);
  check_cpu(op, "c", c, {B, H}, c.scalar_type());
  check_cpu(op, "gates", gates, {B, 4 * H}, c.scalar_type());

  Tensor h = new_empty(c, {B, H}), c_n = new_empty(c, {B, H});
  Tensor activations = new_empty(c, {B, 4 * H}, accumulate_type(c.scalar_type()));
  with_storage_type(op, c.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    CellForward<S> p{};
    p.hidden = H;
    p.gates = read<S>(gates);
    p.c = read<S>(c);
    p.h = write<S>(h);
    p.c_n = write<S>(c_n);
    p.activations = write<Acc<S>>(activations);
    parallel_for(0, B, rows_per_task(64 * H), [&](int64_t begin, int64_t end) { cell_forward(p, begin, end); });
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

  Tensor grad_gates = new_empty(c, {B, 4 * H}), grad_c = new_empty(c, {B, H});
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
    parallel_for(0, B, rows_per_task(64 * H), [&](int64_t begin, int64_t end) { cell_backward(p, begin, end); });
  });
  return {grad_gates, grad_c};
}

Shape with_columns(const Shape& rows, int64_t columns) {
  Shape shape = rows;
  shape.push_back(columns);
  return shape;
}

// W (K, N), W[k][n] = weight_hh[k * stride_k + n * stride_n], in the layout of the recurrent product.
template <class S>
Tensor pack(const Tensor& weight_hh, int64_t K, int64_t N, int64_t stride_k, int64_t stride_n) {
  using A = Acc<S>;
  Tensor packed = new_empty(weight_hh, {K * padded<A>(N)}, accumulate_type(weight_hh.scalar_type()));
  parallel_for(0, padded<A>(N) / kPanel<A>, rows_per_task(K * kPanel<A>), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_panel(read<S>(weight_hh), K, N, stride_k, stride_n, panel, write<A>(packed));
    }
  });
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward_cpu(Tensor gates,
                                                                    Tensor h0,
                                                                    Tensor c0,
                                                                    Tensor weight_hh,
                                                                    OptionalTensor lengths,
                                                                    OptionalTensor batch_sizes,
                                                                    bool reverse,
                                                                    bool need_activations,
                                                                    bool need_cell_states) {
  const char* op = "lstm_forward";
  const SequenceTable table = read_sequences(op, "gates", gates, c0, lengths, batch_sizes, reverse);
  const Sequences& seq = table.seq;
  const int64_t B = seq.batch, H = seq.hidden;
  const ScalarType dtype = gates.scalar_type(), accumulate = accumulate_type(dtype);
  check_cpu(op, "gates", gates, with_columns(table.rows, 4 * H), dtype);
  check_cpu(op, "h0", h0, {B, H}, dtype);
  check_cpu(op, "c0", c0, {B, H}, dtype);
  check_cpu(op, "weight_hh", weight_hh, {4 * H, H}, dtype);

  Tensor output = new_empty(gates, with_columns(table.rows, H));
  Tensor h_n = new_empty(gates, {B, H}), c_n = new_empty(gates, {B, H});
  Tensor activations = new_empty(gates, need_activations ? with_columns(table.rows, 4 * H) : Shape{0}, accumulate);
  Tensor cell_states = new_empty(gates, need_cell_states ? with_columns(table.rows, H) : Shape{0}, accumulate);
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    const Tensor weight = pack<S>(weight_hh, H, 4 * H, 1, H);
    const Tensor scratch = new_empty(gates, {seq.blocks * forward_scratch<S>(seq)}, accumulate);
    LstmForward<S> p{};
    p.seq = seq;
    p.gates = read<S>(gates);
    p.h0 = read<S>(h0);
    p.c0 = read<S>(c0);
    p.weight = read<Acc<S>>(weight);
    p.output = write<S>(output);
    p.h_n = write<S>(h_n);
    p.c_n = write<S>(c_n);
    p.activations = need_activations ? write<Acc<S>>(activations) : nullptr;
    p.cell_states = need_cell_states ? write<Acc<S>>(cell_states) : nullptr;
    p.scratch = write<Acc<S>>(scratch);
    parallel_for(0, seq.blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) lstm_forward_block(p, block);
    });
  });
  return {output, h_n, c_n, activations, cell_states};
}

std::tuple<Tensor, Tensor, Tensor> lstm_backward_cpu(OptionalTensor grad_output,
                                                     OptionalTensor grad_h_n,
                                                     OptionalTensor grad_c_n,
                                                     OptionalTensor grad_cell_states,
                                                     Tensor activations,
                                                     Tensor cell_states,
                                                     Tensor c0,
                                                     Tensor weight_hh,
                                                     OptionalTensor lengths,
                                                     OptionalTensor batch_sizes,
                                                     bool reverse) {
  const char* op = "lstm_backward";
  const SequenceTable table = read_sequences(op, "activations", activations, c0, lengths, batch_sizes, reverse);
  const Sequences& seq = table.seq;
  const int64_t B = seq.batch, H = seq.hidden;
  const ScalarType dtype = weight_hh.scalar_type(), accumulate = accumulate_type(dtype);
  check_optional(op, "grad_output", grad_output, with_columns(table.rows, H), dtype);
  check_optional(op, "grad_h_n", grad_h_n, {B, H}, dtype);
  check_optional(op, "grad_c_n", grad_c_n, {B, H}, dtype);
  check_optional(op, "grad_cell_states", grad_cell_states, with_columns(table.rows, H), dtype);
  check_cpu(op, "activations", activations, with_columns(table.rows, 4 * H), accumulate);
  check_cpu(op, "cell_states", cell_states, with_columns(table.rows, H), accumulate);
  check_cpu(op, "c0", c0, {B, H}, dtype);
  check_cpu(op, "weight_hh", weight_hh, {4 * H, H}, dtype);

  Tensor grad_gates = new_empty(weight_hh, with_columns(table.rows, 4 * H));
  Tensor grad_h0 = new_empty(weight_hh, {B, H}), grad_c0 = new_empty(weight_hh, {B, H});
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    const Tensor weight = pack<S>(weight_hh, 4 * H, H, H, 1);
    const Tensor scratch = new_empty(weight_hh, {seq.blocks * backward_scratch<S>(seq)}, accumulate);
    LstmBackward<S> p{};
    p.seq = seq;
    p.grad_output = read<S>(grad_output);
    p.grad_h_n = read<S>(grad_h_n);
    p.grad_c_n = read<S>(grad_c_n);
    p.grad_cell_states = read<S>(grad_cell_states);
    p.activations = read<Acc<S>>(activations);
    p.cell_states = read<Acc<S>>(cell_states);
    p.c0 = read<S>(c0);
    p.weight = read<Acc<S>>(weight);
    p.grad_gates = write<S>(grad_gates);
    p.grad_h0 = write<S>(grad_h0);
    p.grad_c0 = write<S>(grad_c0);
    p.scratch = write<Acc<S>>(scratch);
    parallel_for(0, seq.blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) lstm_backward_block(p, block);
    });
  });
  return {grad_gates, grad_h0, grad_c0};
}

int64_t cpu_fma_chain(Tensor example, int64_t steps) {
  std::atomic<int64_t> operations{0};
  with_storage_type("cpu_fma_chain", example.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) operations += kernels<S>().fma_chain(steps);
    });
  });
  return operations;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("lstm_cell_forward", TORCH_BOX(&lstm_cell_forward_cpu));
  m.impl("lstm_cell_backward", TORCH_BOX(&lstm_cell_backward_cpu));
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward_cpu));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward_cpu));
  m.impl("cpu_fma_chain", TORCH_BOX(&cpu_fma_chain));
}

}  // namespace fastseq
