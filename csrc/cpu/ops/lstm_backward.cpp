// The operator lstm_backward on the CPU: checks, outputs, packing, threads. The arithmetic is in lstm_backward-inl.h
// and lstm_gradients-inl.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa/kernel_table.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/ops/arguments.h"
#include "cpu/ops/lstm_layer.h"
#include "cpu/runtime/pool.h"
#include "cpu/runtime/sequence_tables.h"

namespace fastseq::cpu {
namespace {

// Layout of the scratch memory of one direction in one backward call: byte offsets of its parts.
template <class S>
struct BackwardScratch {
  int64_t packed_ih, packed_hh, packed_hr, gates, hidden, grad_hidden, unprojected, end;

  BackwardScratch(const LstmBackwardParams<S>& p, int64_t panels_ih, int64_t panels_hh, int64_t panels_hr) {
    const Kernels<S>& k = kernels<S>();
    const auto aligned = [](int64_t bytes) { return divide_up(bytes, 64) * 64; };
    packed_ih = 0;
    packed_hh = packed_ih + aligned(packed_bytes<S>(panels_ih, k.panel_columns, 4 * p.hidden));
    packed_hr = packed_hh + aligned(packed_bytes<S>(panels_hh, k.panel_columns, 4 * p.hidden));
    gates = packed_hr + aligned(packed_bytes<S>(panels_hr, k.panel_columns, p.outputs));
    hidden = gates + aligned(p.seq.rows * p.gates_stride * k.operand_bytes);
    grad_hidden = hidden + aligned((p.seq.rows + p.seq.batch) * p.outputs * k.operand_bytes);
    unprojected = grad_hidden + aligned(p.projected ? p.seq.rows * p.hidden_stride * k.operand_bytes : 0);
    end = unprojected + aligned(p.projected ? p.seq.rows * p.hidden * k.operand_bytes : 0);
  }
};

// Calls multiply(direction, first row, last row, scratch) for all `rows` rows of a weight gradient, divided among the
// threads. row_work: multiply-adds of a row.
template <class S, class Multiply>
void for_gradient_rows(const LstmBackwardParams<S>& p, int64_t rows, int64_t row_work, const Multiply& multiply) {
  const int64_t bytes = divide_up(kernels<S>().weight_gradient_bytes(p), 64) * 64, D = p.directions;
  const int64_t threads = std::clamp<int64_t>(rows * row_work * D / kGrain, 1, torch::stable::get_num_threads());
  const int64_t shares = std::min(divide_up(threads, D), rows), tasks = shares * D;
  const PooledScratch scratch(tasks * bytes);
  run_tasks(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % shares;
      multiply(i / shares, rows * part / shares, rows * (part + 1) / shares, scratch.at(i * bytes));
    }
  });
}

template <class S>
void weight_gradients(const LstmBackwardParams<S>& p, const ValidRows& valid) {
  const Kernels<S>& k = kernels<S>();
  for_gradient_rows(p, 4 * p.hidden, valid.count * (p.input_size + p.outputs),
                    [&](int64_t direction, int64_t begin, int64_t end, void* scratch) {
                      k.lstm_weight_gradients(p, direction, valid, begin, end, scratch);
                    });
  if (!p.projected) return;
  for_gradient_rows(p, p.outputs, valid.count * p.hidden,
                    [&](int64_t direction, int64_t begin, int64_t end, void* scratch) {
                      k.lstm_projection_gradients(p, direction, valid, begin, end, scratch);
                    });
}

template <class S>
void input_gradients(const LstmBackwardParams<S>& p, const ValidRows& valid) {
  constexpr int64_t kRows = kInputGradientRows;
  const int64_t width = kernels<S>().panel_columns;
  const int64_t panels = divide_up(p.input_size, width), blocks = divide_up(valid.count, kRows);
  const int64_t work = kRows * (is_one_row<S>(p.input_size) ? 1 : width) * 4 * p.hidden * p.directions;
  run_tasks(blocks * panels, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / panels * kRows;
      kernels<S>().lstm_input_gradients(p, valid, i % panels, first, std::min(first + kRows, valid.count));
    }
  });
}

// Elements of all weight gradients of one direction.
template <class S>
int64_t wide_elements(const LstmBackwardParams<S>& p) {
  return 4 * p.hidden * (p.input_size + p.outputs) + (p.projected ? p.outputs * p.hidden : 0);
}

// Sets the scratch pointers of every direction, its weight gradients, and where these are summed: `wide`, or in place.
template <class S>
void place_directions(LstmBackwardParams<S>& p,
                      const BackwardScratch<S>& at,
                      const PooledScratch& scratch,
                      const std::vector<Tensor>& grad_weights,  // as empty_weight_gradients; or none
                      Acc<S>* wide) {                           // (D, wide_elements), or null: a single chunk
  const int64_t gates = 4 * p.hidden, count = 3 + p.projected;
  for (int64_t d = 0; d < p.directions; ++d) {
    LstmBackwardDirection<S>& to = p.direction[d];
    const int64_t base = d * at.end;
    to.packed_ih = p.grad_input ? scratch.at(base + at.packed_ih) : nullptr;
    to.packed_hh = scratch.at(base + at.packed_hh);
    to.packed_hr = scratch.at(base + at.packed_hr);
    to.grad_gates = scratch.at(base + at.gates);
    to.hidden_states = scratch.at(base + at.hidden);
    to.grad_hidden = scratch.at(base + at.grad_hidden);
    to.unprojected = scratch.at(base + at.unprojected);
    if (grad_weights.empty()) continue;
    to.grad_ih = write<S>(grad_weights[count * d]);
    to.grad_hh = write<S>(grad_weights[count * d + 1]);
    to.grad_bias = write<S>(grad_weights[count * d + 2]);
    to.grad_hr = p.projected ? write<S>(grad_weights[count * d + 3]) : nullptr;
    if constexpr (kIsSummedInPlace<S>) {
      to.sums_ih = to.grad_ih;
      to.sums_hh = to.grad_hh;
      to.sums_hr = to.grad_hr;
    } else if (wide) {
      to.sums_ih = wide + d * wide_elements(p);
      to.sums_hh = to.sums_ih + gates * p.input_size;
      to.sums_hr = to.sums_hh + gates * p.outputs;
    }
  }
}

template <class S>
void backward(const LayerArguments& layer,
              const SequenceTable& table,
              LstmBackwardParams<S>& p,
              const std::vector<Tensor>& grad_weights) {  // as empty_weight_gradients; or none
  const Kernels<S>& k = kernels<S>();
  const int64_t H = layer.hidden, I = layer.input_size, P = layer.outputs, D = layer.directions;
  const int64_t panels_ih = p.grad_input && !is_one_row<S>(I) ? divide_up(I, k.panel_columns) : 0;
  const int64_t panels_hh = divide_up(P, k.panel_columns), panels_of_cells = divide_up(H, k.panel_columns);
  const int64_t panels_hr = p.projected ? panels_of_cells : 0;
  const ThreadPlan plan = plan_threads(layer, table, panels_of_cells);
  p.blocks = plan.blocks;
  // Padded by a cache line, so that rows of a power-of-two length do not all map to the same cache sets.
  p.gates_stride = 4 * H + 64 / k.operand_bytes;
  p.hidden_stride = P + 64 / k.operand_bytes;

  const BackwardScratch<S> at(p, panels_ih, panels_hh, panels_hr);
  const PooledScratch scratch(D * at.end);
  const bool is_summed_wide = sizeof(S) < sizeof(Acc<S>) && table.valid_steps > kGradientChunk && !grad_weights.empty();
  const PooledScratch wide(is_summed_wide ? D * wide_elements(p) * sizeof(Acc<S>) : 0);
  place_directions(p, at, scratch, grad_weights, is_summed_wide ? wide.at<Acc<S>>(0) : nullptr);
  pack_all(D, panels_ih + panels_hh + panels_hr, k.panel_columns * 4 * H, [&](int64_t direction, int64_t panel) {
    const LstmBackwardDirection<S>& d = p.direction[direction];
    const int64_t panel_hh = panel - panels_ih;
    if (panel_hh < 0) return k.pack_columns(d.weight_ih, 4 * H, I, panel, d.packed_ih);
    if (panel_hh < panels_hh) return k.pack_columns(d.weight_hh, 4 * H, P, panel_hh, d.packed_hh);
    k.pack_columns(d.weight_hr, P, H, panel_hh - panels_hh, d.packed_hr);
  });

  const int64_t states = divide_up(divide_up(layer.batch, plan.blocks) * H * sizeof(Acc<S>), 64) * 64;
  const PooledScratch shared(D * plan.blocks * states);
  run_teams(D, plan, [&](int64_t d, int64_t block, int64_t i, ThreadTeam& team, ThreadTeam::Share share) {
    k.lstm_backward(p, d, block, team, plan.members, share, shared.at(i * states));
  });

  const bool reverse[2] = {p.direction[0].reverse, p.direction[1].reverse};
  const ValidRowTable valid = list_valid_rows(p.seq, reverse, D);
  if (p.grad_input) input_gradients(p, valid.rows());
  if (grad_weights.empty()) return;
  weight_gradients(p, valid.rows());
}

void check_per_step(const char* op,
                    const SequenceTable& table,
                    int64_t columns,
                    ScalarType dtype,
                    std::initializer_list<std::pair<const char*, OptionalTensor>> tensors) {
  for (const auto& [name, t] : tensors) check_optional(op, name, t, with_columns(table.rows, columns), dtype);
}

// W_ih, W_hh, bias and, if projected, W_hr per direction.
std::vector<Tensor> empty_weight_gradients(const LayerArguments& layer) {
  const int64_t gates = 4 * layer.hidden;
  std::vector<Tensor> grads;
  for (int64_t d = 0; d < layer.directions; ++d) {
    for (const Shape& shape : {Shape{gates, layer.input_size}, {gates, layer.outputs}, {gates}}) {
      grads.push_back(result_empty(shape, layer.dtype));
    }
    if (layer.projected) grads.push_back(result_empty({layer.outputs, layer.hidden}, layer.dtype));
  }
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward_cpu(OptionalTensor grad_output,
                                                                          OptionalTensor grad_h_n,
                                                                          OptionalTensor grad_c_n,
                                                                          OptionalTensor grad_cell_states,
                                                                          Tensor input,
                                                                          Tensor h0,
                                                                          Tensor c0,
                                                                          std::vector<Tensor> weights,
                                                                          Tensor activations,
                                                                          Tensor cell_states,
                                                                          OptionalTensor lengths,
                                                                          OptionalTensor batch_sizes,
                                                                          bool reverse,
                                                                          bool need_input,
                                                                          bool need_weights) {
  const char* op = "lstm_backward";
  const SequenceTable table = read_sequences(op, input, c0, lengths, batch_sizes);
  const LayerArguments layer = read_layer(op, input, h0, c0, weights, table, reverse);
  const int64_t B = layer.batch, H = layer.hidden, P = layer.outputs, D = layer.directions;
  const ScalarType dtype = layer.dtype;
  check_per_step(op, table, D * P, dtype, {{"grad_output", grad_output}});
  check_per_step(op, table, D * H, dtype, {{"grad_cell_states", grad_cell_states}});
  check_per_step(op, table, D * layer.saved(), dtype, {{"activations", activations}});
  check_per_step(op, table, D * H, accumulate_type(dtype), {{"cell_states", cell_states}});
  check_optional(op, "grad_h_n", grad_h_n, {D, B, P}, dtype);
  check_optional(op, "grad_c_n", grad_c_n, {D, B, H}, dtype);
  Tensor grad_input = result_empty(need_input ? with_columns(table.rows, layer.input_size) : Shape{0}, dtype);
  Tensor grad_h0 = result_empty({D, B, P}, dtype), grad_c0 = result_empty({D, B, H}, dtype);
  const std::vector<Tensor> grad_weights = need_weights ? empty_weight_gradients(layer) : std::vector<Tensor>{};
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    LstmBackwardParams<S> p = layer_params<LstmBackwardParams<S>, S>(layer, table);
    p.grad_output = read<S>(grad_output);
    p.grad_cell_states = read<S>(grad_cell_states);
    p.activations = read<S>(activations);
    p.cell_states = read<Acc<S>>(cell_states);
    p.grad_input = write<S>(grad_input);
    if (p.grad_input && table.valid_steps < p.seq.rows) fill_zero(p.grad_input, p.seq.rows * p.input_size);
    for (int64_t d = 0; d < D; ++d) {
      LstmBackwardDirection<S>& to = p.direction[d];
      to.grad_h_n = grad_h_n ? read<S>(grad_h_n) + d * B * P : nullptr;
      to.grad_c_n = grad_c_n ? read<S>(grad_c_n) + d * B * H : nullptr;
      to.grad_h0 = write<S>(grad_h0) + d * B * P;
      to.grad_c0 = write<S>(grad_c0) + d * B * H;
    }
    backward(layer, table, p, grad_weights);
  });
  return {grad_input, grad_h0, grad_c0, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) { m.impl("lstm_backward", TORCH_BOX(&Retried<&lstm_backward_cpu>::run)); }

}  // namespace fastseq::cpu
