// The operators lstm_forward and lstm_backward on the CPU: checks, outputs, packing, threads. See lstm_*.inc.
#include "lstm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "operators.h"
#include "pool.h"
#include "tables.h"

namespace fastseq {
namespace {

using torch::stable::parallel_for;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What both operators are given of a layer.
struct Layer {
  const Tensor &input, &h0, &c0;       // (rows, I), (D, B, H) each
  const std::vector<Tensor>& weights;  // per direction W_ih, W_hh and, with bias, b_ih, b_hh
  bool bias, reverse;
  int64_t input_size, hidden, batch, directions;
  ScalarType dtype;

  int64_t per_direction() const { return bias ? 4 : 2; }
  const Tensor& weight(int64_t direction, int64_t which) const { return weights[direction * per_direction() + which]; }
};

Layer read_layer(const char* op,
                 const Tensor& input,
                 const Tensor& h0,
                 const Tensor& c0,
                 const std::vector<Tensor>& weights,
                 const SequenceTable& table,
                 bool reverse) {
  const int64_t D = c0.size(0), B = c0.size(1), H = c0.size(2), I = input.size(input.dim() - 1);
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(D == 1 || D == 2, op, ": c0 must be for 1 or 2 directions, got ", D);
  const int64_t count = weights.size();
  STD_TORCH_CHECK(count == 2 * D || count == 4 * D, op, ": weights must be weight_ih, weight_hh and optionally ",
                  "bias_ih, bias_hh for each of ", D, " directions, got ", count, " tensors");
  const Layer layer{input, h0, c0, weights, count == 4 * D, reverse, I, H, B, D, dtype};
  check_cpu(op, "input", input, with_columns(table.rows, I), dtype);
  check_cpu(op, "h0", h0, {D, B, H}, dtype);
  check_cpu(op, "c0", c0, {D, B, H}, dtype);
  for (int64_t d = 0; d < D; ++d) {
    check_cpu(op, "weight_ih", layer.weight(d, 0), {4 * H, I}, dtype);
    check_cpu(op, "weight_hh", layer.weight(d, 1), {4 * H, H}, dtype);
    if (!layer.bias) continue;
    check_cpu(op, "bias_ih", layer.weight(d, 2), {4 * H}, dtype);
    check_cpu(op, "bias_hh", layer.weight(d, 3), {4 * H}, dtype);
  }
  return layer;
}

// LstmForward or LstmBackward, with what they have in common.
template <class Pass, class S>
Pass start_pass(const Layer& layer, const SequenceTable& table) {
  Pass p{};
  p.seq = table.seq;
  p.input_size = layer.input_size;
  p.hidden = layer.hidden;
  p.directions = layer.directions;
  p.input = read<S>(layer.input);
  for (int64_t d = 0; d < layer.directions; ++d) {
    LstmDirection<S>& to = p.direction[d];
    to.reverse = layer.directions == 2 ? d == 1 : layer.reverse;
    to.weight_ih = read<S>(layer.weight(d, 0));
    to.weight_hh = read<S>(layer.weight(d, 1));
    to.h0 = read<S>(layer.h0) + d * layer.batch * layer.hidden;
    to.c0 = read<S>(layer.c0) + d * layer.batch * layer.hidden;
  }
  return p;
}

// How threads share the recurrence: every direction as `blocks` blocks of sequences, each run by a team of `members`;
// the directions at the same time or, if each needs all threads, one after the other.
struct Plan {
  int64_t blocks, members;
  bool together;
};

// Few rows make a step wait for its weights: then the share of a thread should fit into its L2 cache.
constexpr int64_t kShareOfWeights = 1 << 20;  // bytes

Plan share_out(const Layer& layer, const SequenceTable& table, int64_t panels) {
  const int64_t B = layer.batch, D = layer.directions, H = layer.hidden;
  const int64_t work = table.valid_steps * D * 4 * H * (layer.input_size + H);
  const int64_t threads = std::clamp<int64_t>(work / kGrain, 1, torch::stable::get_num_threads());
  const bool together = B > kFewRows || D == 1 || 4 * H * H * 4 <= kShareOfWeights;
  const int64_t per_direction = together ? std::max<int64_t>(1, threads / D) : threads;
  const bool split_batch = per_direction == 1 || B >= 4 * per_direction;
  const int64_t shares = split_batch ? per_direction : 1;
  const int64_t blocks = std::min(std::max<int64_t>(B, 1), shares * divide_up(divide_up(B, shares), kBlockRows));
  const bool alone = split_batch || Team::machine_is_crowded();
  return {std::max<int64_t>(blocks, 1), alone ? 1 : std::min(per_direction, panels), together || alone};
}

// Calls run(direction, block, team's number, team, share) on the threads of torch, for all members of all teams.
template <class Run>
void run_teams(int64_t directions, const Plan& plan, const Run& run) {
  const int64_t teams = directions * plan.blocks, members = plan.members;
  const int64_t at_once = plan.together ? teams : plan.blocks;
  for (int64_t first = 0; first < teams; first += at_once) {
    std::vector<std::unique_ptr<Team>> team;
    for (int64_t i = 0; i < at_once; ++i) team.push_back(std::make_unique<Team>(members));
    parallel_for(0, at_once * members, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin / members; i * members < end; ++i) {
        const int64_t low = std::max(begin - i * members, int64_t{0}), high = std::min(end - i * members, members);
        const Team::Share share = team[i]->join(low, high);
        const int64_t number = first + i;
        if (share.begin < share.end) run(number / plan.blocks, number % plan.blocks, number, *team[i], share);
      }
    });
  }
}

// b_ih + b_hh of every direction, (D, 4H).
template <class S>
void sum_biases(const Layer& layer, Acc<S>* out) {
  const int64_t gates = 4 * layer.hidden;
  for (int64_t d = 0; d < layer.directions; ++d) {
    for (int64_t j = 0; j < gates; ++j) {
      out[d * gates + j] = layer.bias ? load(read<S>(layer.weight(d, 2))[j]) + load(read<S>(layer.weight(d, 3))[j]) : 0;
    }
  }
}

// run(begin, end) of `count` tasks on all threads, a thread taking at least `grain`. On a crowded machine on one, as
// the recurrence does: whoever shares work out waits for a thread that may be away.
template <class Run>
void share(int64_t count, int64_t grain, const Run& run) {
  parallel_for(0, count, Team::machine_is_crowded() ? std::max(count, grain) : grain, run);
}

// Packs panels of all given weights; `work`: elements of one panel.
template <class Pack>
void pack_all(int64_t weights, int64_t panels, int64_t work, const Pack& pack) {
  share(weights * panels, kGrain / 2 / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(i / panels, i % panels);
  });
}

template <class S>
int64_t packed_bytes(int64_t panels, int64_t width, int64_t K) {
  const Kernels<S>& k = kernels<S>();
  return panels * width * divide_up(K, k.pair) * k.pair * k.operand_bytes + 64;
}

// Input rows in one chunk: enough for a panel of W_ih to be worth its way, few enough for their gates to stay near.
int64_t chunk_rows(int64_t block_rows, int64_t hidden) {
  constexpr int64_t kGates = 1 << 15;
  return std::clamp<int64_t>(kGates / (4 * hidden + 1), std::max<int64_t>(block_rows, 32), kChunkRows);
}

// Below this many rows in a call, reading the weights as they are costs less than packing them.
constexpr int64_t kRowsWorthPacking = 128;

template <class S>
void forward(const Layer& layer, const SequenceTable& table, LstmForward<S>& p) {
  const Kernels<S>& k = kernels<S>();
  const int64_t H = layer.hidden, I = layer.input_size, D = layer.directions;
  const int64_t panels = divide_up(H, k.gate_units);
  const Plan plan = share_out(layer, table, panels);
  p.blocks = plan.blocks;
  p.chunk_rows = chunk_rows(divide_up(layer.batch, plan.blocks), H);

  const bool few_inputs = table.valid_steps < kRowsWorthPacking, few_rows = few_inputs || layer.batch <= kFewRows;
  const int64_t bytes_ih = few_inputs ? 0 : packed_bytes<S>(panels, 4 * k.gate_units, I);
  const int64_t bytes_hh = few_rows ? 0 : packed_bytes<S>(panels, 4 * k.gate_units, H);
  const Scratch packed(D * (bytes_ih + bytes_hh)), bias(D * 4 * H * sizeof(Acc<S>));
  sum_biases<S>(layer, bias.at<Acc<S>>(0));
  for (int64_t d = 0; d < D; ++d) {
    p.direction[d].packed_ih = few_inputs ? nullptr : packed.at(d * bytes_ih);
    p.direction[d].packed_hh = few_rows ? nullptr : packed.at(D * bytes_ih + d * bytes_hh);
    p.direction[d].bias = bias.at<Acc<S>>(0) + d * 4 * H;
  }
  pack_all(few_inputs ? 0 : 2 * D, panels, 4 * k.gate_units * (I + H) / 2, [&](int64_t weight, int64_t panel) {
    const LstmForwardDirection<S>& d = p.direction[weight / 2];
    if (weight % 2 == 0) k.pack_gates(d.weight_ih, H, I, panel, const_cast<void*>(d.packed_ih));
    if (weight % 2 == 1 && !few_rows) k.pack_gates(d.weight_hh, H, H, panel, const_cast<void*>(d.packed_hh));
  });

  const int64_t shared = divide_up(k.forward_shared_bytes(p), 64) * 64,
                own = divide_up(k.forward_member_bytes(p), 64) * 64;
  const int64_t teams = D * plan.blocks;
  const Scratch scratch(teams * (shared + plan.members * own));
  run_teams(D, plan, [&](int64_t d, int64_t block, int64_t i, Team& team, Team::Share share) {
    void* const member = scratch.at(teams * shared + (i * plan.members + share.begin) * own);
    k.lstm_forward(p, d, block, team, plan.members, share, scratch.at(i * shared), member);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward_cpu(Tensor input,
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
  const Layer layer = read_layer(op, input, h0, c0, weights, table, reverse);
  const int64_t B = layer.batch, H = layer.hidden, D = layer.directions;
  const ScalarType dtype = layer.dtype;

  Tensor output = pooled_empty(input, with_columns(table.rows, D * H), dtype);
  Tensor h_n = pooled_empty(c0, {D, B, H}, dtype), c_n = pooled_empty(c0, {D, B, H}, dtype);
  Tensor activations = pooled_empty(input, need_activations ? with_columns(table.rows, D * 4 * H) : Shape{0}, dtype);
  Tensor cell_states =
      pooled_empty(input, need_cell_states ? with_columns(table.rows, D * H) : Shape{0}, accumulate_type(dtype));
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    LstmForward<S> p = start_pass<LstmForward<S>, S>(layer, table);
    p.output = write<S>(output);
    p.activations = write<S>(activations);
    p.cell_states = write<Acc<S>>(cell_states);
    for (int64_t d = 0; d < D; ++d) {
      p.direction[d].h_n = write<S>(h_n) + d * B * H;
      p.direction[d].c_n = write<S>(c_n) + d * B * H;
    }
    forward(layer, table, p);
  });
  return {output, h_n, c_n, activations, cell_states};
}

// The scratch memory of one backward call, laid out one after the other.
template <class S>
struct BackwardScratch {
  int64_t packed_ih, packed_hh, gates, hidden, end;  // bytes before each, per direction

  BackwardScratch(const LstmBackward<S>& p, int64_t columns_ih, int64_t columns_hh) {
    const Kernels<S>& k = kernels<S>();
    const auto aligned = [](int64_t bytes) { return divide_up(bytes, 64) * 64; };
    packed_ih = 0;
    packed_hh = packed_ih + aligned(packed_bytes<S>(columns_ih, k.panel_columns, 4 * p.hidden));
    gates = packed_hh + aligned(packed_bytes<S>(columns_hh, k.panel_columns, 4 * p.hidden));
    hidden = gates + aligned(p.seq.rows * p.gates_stride * k.operand_bytes);
    end = hidden + aligned((p.seq.rows + p.seq.batch) * p.hidden * k.operand_bytes);
  }
};

template <class S>
void weight_gradients(const Layer& layer, const LstmBackward<S>& p, const ValidRows& valid) {
  const Kernels<S>& k = kernels<S>();
  const int64_t gates = 4 * layer.hidden, bytes = divide_up(k.weight_gradient_bytes(p), 64) * 64;
  const int64_t work = valid.count * gates * (layer.input_size + layer.hidden) * layer.directions;
  const int64_t threads = std::clamp<int64_t>(work / kGrain, 1, torch::stable::get_num_threads());
  const int64_t shares = std::min(divide_up(threads, layer.directions), gates), tasks = shares * layer.directions;
  const Scratch scratch(tasks * bytes);
  share(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % shares;
      k.lstm_weight_gradients(p, i / shares, valid, gates * part / shares, gates * (part + 1) / shares,
                              scratch.at(i * bytes));
    }
  });
}

template <class S>
void input_gradients(const LstmBackward<S>& p, const ValidRows& valid, int64_t panels) {
  constexpr int64_t kRows = kInputGradientRows;
  const int64_t blocks = divide_up(valid.count, kRows);
  const int64_t work = kRows * kernels<S>().panel_columns * 4 * p.hidden * p.directions;
  share(blocks * panels, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / panels * kRows;
      kernels<S>().lstm_input_gradients(p, valid, i % panels, first, std::min(first + kRows, valid.count));
    }
  });
}

// Adds the conversion from sums to the storage type, where these differ.
template <class S>
void round_sums(const Acc<S>* sums, const Tensor& out) {
  S* const to = write<S>(out);
  if (static_cast<const void*>(sums) == to) return;
  for (int64_t i = 0; i < out.numel(); ++i) store(sums[i], to + i);
}

// Hands every direction its part of the scratch memory, and the tensors of its weight gradients or `wide` ones.
template <class S>
void place_directions(LstmBackward<S>& p,
                      const BackwardScratch<S>& at,
                      const Scratch& scratch,
                      const std::vector<Tensor>& grad_weights,  // W_ih, W_hh, bias per direction; or none
                      Acc<S>* wide) {                           // (D, 4H, I + H), or null: sums need no rounding
  const int64_t gates = 4 * p.hidden, columns = p.input_size + p.hidden;
  for (int64_t d = 0; d < p.directions; ++d) {
    LstmBackwardDirection<S>& to = p.direction[d];
    const int64_t base = d * at.end;
    to.packed_ih = p.grad_input ? scratch.at(base + at.packed_ih) : nullptr;
    to.packed_hh = scratch.at(base + at.packed_hh);
    to.grad_gates = scratch.at(base + at.gates);
    to.hidden_states = scratch.at(base + at.hidden);
    if (grad_weights.empty()) continue;
    to.sums_ih = wide ? wide + d * gates * columns : write<Acc<S>>(grad_weights[3 * d]);
    to.sums_hh = wide ? to.sums_ih + gates * p.input_size : write<Acc<S>>(grad_weights[3 * d + 1]);
    to.grad_bias = write<S>(grad_weights[3 * d + 2]);
  }
}

template <class S>
void backward(const Layer& layer,
              const SequenceTable& table,
              LstmBackward<S>& p,
              const std::vector<Tensor>& grad_weights) {  // W_ih, W_hh, bias per direction; or none
  const Kernels<S>& k = kernels<S>();
  const int64_t H = layer.hidden, I = layer.input_size, D = layer.directions;
  const int64_t panels_ih = p.grad_input ? divide_up(I, k.panel_columns) : 0, panels_hh = divide_up(H, k.panel_columns);
  const Plan plan = share_out(layer, table, panels_hh);
  p.blocks = plan.blocks;
  // Padded, so that rows of a power of two do not all fall into the same cache sets.
  p.gates_stride = 4 * H + 64 / k.operand_bytes;

  const BackwardScratch<S> at(p, panels_ih, panels_hh);
  const Scratch scratch(D * at.end);
  constexpr bool kNarrow = sizeof(S) < sizeof(Acc<S>);
  const Scratch wide(kNarrow && !grad_weights.empty() ? D * 4 * H * (I + H) * sizeof(Acc<S>) : 0);
  place_directions(p, at, scratch, grad_weights, kNarrow ? wide.at<Acc<S>>(0) : nullptr);
  pack_all(D, panels_ih + panels_hh, k.panel_columns * 4 * H, [&](int64_t direction, int64_t panel) {
    const LstmBackwardDirection<S>& d = p.direction[direction];
    if (panel < panels_ih) return k.pack_columns(d.weight_ih, 4 * H, I, panel, d.packed_ih);
    k.pack_columns(d.weight_hh, 4 * H, H, panel - panels_ih, d.packed_hh);
  });

  const int64_t states = divide_up(divide_up(layer.batch, plan.blocks) * H * sizeof(Acc<S>), 64) * 64;
  const Scratch shared(D * plan.blocks * states);
  run_teams(D, plan, [&](int64_t d, int64_t block, int64_t i, Team& team, Team::Share share) {
    k.lstm_backward(p, d, block, team, plan.members, share, shared.at(i * states));
  });

  const bool reverse[2] = {p.direction[0].reverse, p.direction[1].reverse};
  const ValidRowTable valid = list_valid_rows(p.seq, reverse, D);
  if (p.grad_input) input_gradients(p, valid.rows(), panels_ih);
  if (grad_weights.empty()) return;
  weight_gradients(layer, p, valid.rows());
  for (int64_t d = 0; d < D; ++d) {
    round_sums<S>(p.direction[d].sums_ih, grad_weights[3 * d]);
    round_sums<S>(p.direction[d].sums_hh, grad_weights[3 * d + 1]);
  }
}

void check_per_step(const char* op,
                    const SequenceTable& table,
                    int64_t columns,
                    ScalarType dtype,
                    std::initializer_list<std::pair<const char*, OptionalTensor>> tensors) {
  for (const auto& [name, t] : tensors) check_optional(op, name, t, with_columns(table.rows, columns), dtype);
}

// W_ih, W_hh, bias per direction.
std::vector<Tensor> empty_weight_gradients(const Layer& layer) {
  std::vector<Tensor> grads;
  for (int64_t d = 0; d < layer.directions; ++d) {
    for (const Shape& shape :
         {Shape{4 * layer.hidden, layer.input_size}, {4 * layer.hidden, layer.hidden}, {4 * layer.hidden}}) {
      grads.push_back(pooled_empty(layer.input, shape, layer.dtype));
    }
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
  const Layer layer = read_layer(op, input, h0, c0, weights, table, reverse);
  const int64_t B = layer.batch, H = layer.hidden, D = layer.directions;
  const ScalarType dtype = layer.dtype;
  check_per_step(op, table, D * H, dtype, {{"grad_output", grad_output}, {"grad_cell_states", grad_cell_states}});
  check_per_step(op, table, D * 4 * H, dtype, {{"activations", activations}});
  check_per_step(op, table, D * H, accumulate_type(dtype), {{"cell_states", cell_states}});
  check_optional(op, "grad_h_n", grad_h_n, {D, B, H}, dtype);
  check_optional(op, "grad_c_n", grad_c_n, {D, B, H}, dtype);
  Tensor grad_input = pooled_empty(input, need_input ? with_columns(table.rows, layer.input_size) : Shape{0}, dtype);
  Tensor grad_h0 = pooled_empty(c0, {D, B, H}, dtype), grad_c0 = pooled_empty(c0, {D, B, H}, dtype);
  const std::vector<Tensor> grad_weights = need_weights ? empty_weight_gradients(layer) : std::vector<Tensor>{};
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    LstmBackward<S> p = start_pass<LstmBackward<S>, S>(layer, table);
    p.grad_output = read<S>(grad_output);
    p.grad_cell_states = read<S>(grad_cell_states);
    p.activations = read<S>(activations);
    p.cell_states = read<Acc<S>>(cell_states);
    p.grad_input = write<S>(grad_input);
    if (p.grad_input && table.valid_steps < p.seq.rows) fill_zero(p.grad_input, p.seq.rows * p.input_size);
    for (int64_t d = 0; d < D; ++d) {
      LstmBackwardDirection<S>& to = p.direction[d];
      to.grad_h_n = grad_h_n ? read<S>(grad_h_n) + d * B * H : nullptr;
      to.grad_c_n = grad_c_n ? read<S>(grad_c_n) + d * B * H : nullptr;
      to.grad_h0 = write<S>(grad_h0) + d * B * H;
      to.grad_c0 = write<S>(grad_c0) + d * B * H;
    }
    backward(layer, table, p, grad_weights);
  });
  return {grad_input, grad_h0, grad_c0, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward_cpu));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward_cpu));
}

}  // namespace fastseq
