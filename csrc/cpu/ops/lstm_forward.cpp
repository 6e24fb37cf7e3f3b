// The operator lstm_forward on the CPU: checks, outputs, packing, threads. The arithmetic is in lstm_forward-inl.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/isa/kernel_table.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/ops/arguments.h"
#include "cpu/ops/lstm_layer.h"
#include "cpu/runtime/pool.h"
#include "cpu/runtime/sequence_tables.h"

namespace fastseq::cpu {
namespace {

// Below this number of valid rows in a call, reading W_ih in place costs less than packing it: about four for each
// hidden unit of a panel, because the products of packed rows gain more from wide vectors.
int64_t rows_worth_packing(int64_t gate_units) { return std::max<int64_t>(32, 4 * gate_units); }

// b_ih + b_hh of every direction, (D, 4H).
template <class S>
void sum_biases(const LayerArguments& layer, Acc<S>* out) {
  const int64_t gates = 4 * layer.hidden;
  for (int64_t d = 0; d < layer.directions; ++d) {
    for (int64_t j = 0; j < gates; ++j) {
      out[d * gates + j] = layer.bias ? load(read<S>(layer.weight(d, 2))[j]) + load(read<S>(layer.weight(d, 3))[j]) : 0;
    }
  }
}

// Type of the weights of a layer beside its tensors.
WeightType weight_type(const LayerArguments& layer) {
  const ScalarType type = layer.weight(0, 0).scalar_type();
  if (type == layer.dtype) return WeightType::kStorage;
  return type == ScalarType::Char ? WeightType::kInt8 : WeightType::kBFloat16;
}

// Input rows in one chunk: enough to amortise reading a panel of W_ih, few enough for their gates to stay in cache.
int64_t chunk_rows(int64_t block_rows, int64_t hidden) {
  constexpr int64_t kGates = 1 << 15, kReuse = 128;
  return std::clamp<int64_t>(kGates / (4 * hidden + 1), std::max<int64_t>(block_rows, kReuse), kChunkRows);
}

template <class S>
void forward(const LayerArguments& layer, const SequenceTable& table, LstmForwardParams<S>& p) {
  const Kernels<S>& k = kernels<S>();
  const int64_t H = layer.hidden, I = layer.input_size, P = layer.outputs, D = layer.directions;
  const int64_t panels = divide_up(H, k.gate_units), panels_hr = layer.projected ? divide_up(P, k.panel_columns) : 0;
  const ThreadPlan plan = plan_threads(layer, table, panels);
  p.blocks = plan.blocks;
  p.chunk_rows = chunk_rows(divide_up(layer.batch, plan.blocks), H);

  const bool in_place = weight_type(layer) == WeightType::kInt8 && k.int8_in_place;
  const bool skinny_input = in_place || table.valid_steps < rows_worth_packing(k.gate_units);
  const bool skinny_batch = skinny_input || layer.batch <= k.skinny_rows;
  const int64_t bytes_ih = skinny_input ? 0 : packed_bytes<S>(panels, 4 * k.gate_units, I);
  const int64_t bytes_hh = skinny_batch ? 0 : packed_bytes<S>(panels, 4 * k.gate_units, P);
  const int64_t bytes_hr = skinny_batch || !panels_hr ? 0 : packed_bytes<S>(panels_hr, k.panel_columns, H);
  const PooledScratch packed(D * (bytes_ih + bytes_hh + bytes_hr)), bias(D * 4 * H * sizeof(Acc<S>));
  sum_biases<S>(layer, bias.at<Acc<S>>(0));
  for (int64_t d = 0; d < D; ++d) {
    const auto rows = [&](int64_t index) -> RowWeight<S> {
      const Acc<S>* const scale = layer.scales ? read<Acc<S>>((*layer.scales)[2 * d + index]) : nullptr;
      return {layer.weight(d, index).const_data_ptr(), weight_type(layer), scale};
    };
    p.direction[d].ih = {rows(0), skinny_input ? nullptr : packed.at(d * bytes_ih)};
    p.direction[d].hh = {rows(1), skinny_batch ? nullptr : packed.at(D * bytes_ih + d * bytes_hh)};
    p.direction[d].packed_hr = bytes_hr ? packed.at(D * (bytes_ih + bytes_hh) + d * bytes_hr) : nullptr;
    p.direction[d].bias = bias.at<Acc<S>>(0) + d * 4 * H;
  }
  pack_all(skinny_input ? 0 : 2 * D, panels, 4 * k.gate_units * (I + P) / 2, [&](int64_t weight, int64_t panel) {
    const LstmForwardDirection<S>& d = p.direction[weight / 2];
    const GateWeight<S>& w = weight % 2 == 0 ? d.ih : d.hh;
    const int64_t depth = weight % 2 == 0 ? I : P;
    if (w.packed) k.pack_gates(w.rows, w.type, w.scale, H, depth, panel, const_cast<void*>(w.packed));
  });
  pack_all(bytes_hr ? D : 0, panels_hr, k.panel_columns * H, [&](int64_t weight, int64_t panel) {
    const LstmForwardDirection<S>& d = p.direction[weight];
    k.pack_rows(d.weight_hr, P, H, panel, const_cast<void*>(d.packed_hr));
  });

  const int64_t team_bytes = divide_up(k.forward_shared_bytes(p), 64) * 64;
  const int64_t member_bytes = divide_up(k.forward_member_bytes(p), 64) * 64;
  const int64_t teams = D * plan.blocks;
  const PooledScratch scratch(teams * (team_bytes + plan.members * member_bytes));
  run_teams(D, plan, [&](int64_t d, int64_t block, int64_t i, ThreadTeam& team, ThreadTeam::Share share) {
    void* const member = scratch.at(teams * team_bytes + (i * plan.members + share.begin) * member_bytes);
    k.lstm_forward(p, d, block, team, plan.members, share, scratch.at(i * team_bytes), member);
  });
}

using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResults run_layer(const LayerArguments& layer,
                         const SequenceTable& table,
                         bool need_activations,
                         bool need_cell_states) {
  const int64_t B = layer.batch, H = layer.hidden, P = layer.outputs, D = layer.directions;
  const ScalarType dtype = layer.dtype;
  Tensor output = result_empty(with_columns(table.rows, D * P), dtype);
  Tensor h_n = result_empty({D, B, P}, dtype), c_n = result_empty({D, B, H}, dtype);
  Tensor activations = pooled_empty(need_activations ? with_columns(table.rows, D * layer.saved()) : Shape{0}, dtype);
  Tensor cell_states =
      pooled_empty(need_cell_states ? with_columns(table.rows, D * H) : Shape{0}, accumulate_type(dtype));
  with_storage_type("lstm_forward", dtype, [&](auto zero) {
    using S = decltype(zero);
    LstmForwardParams<S> p = layer_params<LstmForwardParams<S>, S>(layer, table);
    p.output = write<S>(output);
    p.activations = write<S>(activations);
    p.cell_states = write<Acc<S>>(cell_states);
    for (int64_t d = 0; d < D; ++d) {
      p.direction[d].h_n = write<S>(h_n) + d * B * P;
      p.direction[d].c_n = write<S>(c_n) + d * B * H;
    }
    forward(layer, table, p);
  });
  return {output, h_n, c_n, activations, cell_states};
}

ForwardResults lstm_forward_cpu(Tensor input,
                                Tensor h0,
                                Tensor c0,
                                std::vector<Tensor> weights,
                                OptionalTensor lengths,
                                OptionalTensor batch_sizes,
                                bool reverse,
                                bool need_activations,
                                bool need_cell_states) {
  const char* op = "lstm_forward";
  const SequenceTable table = read_sequences(op, input, c0, lengths, batch_sizes);
  const LayerArguments layer = read_layer(op, input, h0, c0, weights, table, reverse);
  return run_layer(layer, table, need_activations, need_cell_states);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_forward_narrow_cpu(Tensor input,
                                                                   Tensor h0,
                                                                   Tensor c0,
                                                                   std::vector<Tensor> weights,
                                                                   std::vector<Tensor> scales,
                                                                   OptionalTensor lengths,
                                                                   OptionalTensor batch_sizes,
                                                                   bool reverse,
                                                                   bool need_cell_states) {
  const char* op = "lstm_forward_narrow";
  const SequenceTable table = read_sequences(op, input, c0, lengths, batch_sizes);
  const LayerArguments layer = read_narrow_layer(op, input, h0, c0, weights, scales, table, reverse);
  const auto [output, h_n, c_n, activations, cell_states] = run_layer(layer, table, false, need_cell_states);
  return {output, h_n, c_n, cell_states};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&Retried<&lstm_forward_cpu>::run));
  m.impl("lstm_forward_narrow", TORCH_BOX(&Retried<&lstm_forward_narrow_cpu>::run));
}

}  // namespace fastseq::cpu
