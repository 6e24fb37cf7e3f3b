// Shared by lstm_forward and lstm_backward on the CPU: arguments of a layer, division of its work among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/isa/kernel_table.h"
#include "cpu/ops/arguments.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/sequence_tables.h"
#include "cpu/runtime/team.h"

namespace fastseq::cpu {

// The arguments that both operators share. Refers to tensors of the call.
struct LayerArguments {
  const Tensor &input, &h0, &c0;       // (rows, I), (D, B, P), (D, B, H)
  const std::vector<Tensor>& weights;  // per direction W_ih, W_hh, with bias b_ih, b_hh, if projected W_hr
  bool bias, projected, reverse;
  int64_t input_size, hidden, outputs, batch, directions;  // I, H, P, B, D
  ScalarType dtype;
  const std::vector<Tensor>* scales = nullptr;  // of int8 weights: (4H,) of W_ih and of W_hh for each direction

  int64_t per_direction() const { return 2 + 2 * bias + projected; }
  const Tensor& weight(int64_t direction, int64_t index) const { return weights[direction * per_direction() + index]; }
  const Tensor& weight_hr(int64_t direction) const { return weight(direction, 2 + 2 * bias); }
  // Columns of `activations` for each direction: the gates, then h if projected.
  int64_t saved() const { return 4 * hidden + (projected ? outputs : 0); }
  // Elements of the weights that a step of the recurrence reads, for each direction.
  int64_t step_weights() const { return 4 * hidden * outputs + (projected ? outputs * hidden : 0); }
};

// Checks all tensors of a layer against each other and against `table`.
LayerArguments read_layer(const char* op,
                          const Tensor& input,
                          const Tensor& h0,
                          const Tensor& c0,
                          const std::vector<Tensor>& weights,
                          const SequenceTable& table,
                          bool reverse);

// As read_layer, for float32 tensors with weights in bfloat16 or int8. scales: as in LayerArguments, or empty.
LayerArguments read_narrow_layer(const char* op,
                                 const Tensor& input,
                                 const Tensor& h0,
                                 const Tensor& c0,
                                 const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& scales,
                                 const SequenceTable& table,
                                 bool reverse);

// Fills the fields that LstmForwardParams and LstmBackwardParams share.
template <class Params, class S>
Params layer_params(const LayerArguments& layer, const SequenceTable& table) {
  Params p{};
  p.seq = table.seq;
  p.input_size = layer.input_size;
  p.hidden = layer.hidden;
  p.outputs = layer.outputs;
  p.projected = layer.projected;
  p.saved = layer.saved();
  p.directions = layer.directions;
  p.input = read<S>(layer.input);
  for (int64_t d = 0; d < layer.directions; ++d) {
    LstmDirection<S>& to = p.direction[d];
    to.reverse = layer.directions == 2 ? d == 1 : layer.reverse;
    to.weight_ih = read<S>(layer.weight(d, 0));  // unused by the forward, whose weights may have another type
    to.weight_hh = read<S>(layer.weight(d, 1));
    if (layer.projected) to.weight_hr = read<S>(layer.weight_hr(d));
    to.h0 = read<S>(layer.h0) + d * layer.batch * layer.outputs;
    to.c0 = read<S>(layer.c0) + d * layer.batch * layer.hidden;
  }
  return p;
}

// Division of the recurrence: each direction is `blocks` blocks of sequences, and a team of `members` threads runs each
// block. Directions run at the same time if `together`, else one after the other.
struct ThreadPlan {
  int64_t blocks, members;
  bool together;
};

// panels: number of panels of hidden units, which a team divides among its members.
ThreadPlan plan_threads(const LayerArguments& layer, const SequenceTable& table, int64_t panels);

// Calls run(direction, block, team's index, team, share) on torch's threads, for all members of all teams.
template <class Run>
void run_teams(int64_t directions, const ThreadPlan& plan, const Run& run) {
  const int64_t teams = directions * plan.blocks, members = plan.members;
  const int64_t at_once = plan.together ? teams : plan.blocks;
  for (int64_t first = 0; first < teams; first += at_once) {
    std::vector<std::unique_ptr<ThreadTeam>> team;
    for (int64_t i = 0; i < at_once; ++i) team.push_back(std::make_unique<ThreadTeam>(members));
    parallel_for(at_once * members, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin / members; i * members < end; ++i) {
        const int64_t low = std::max(begin - i * members, int64_t{0}), high = std::min(end - i * members, members);
        const ThreadTeam::Share share = team[i]->join(low, high);
        const int64_t index = first + i;
        if (share.begin < share.end) run(index / plan.blocks, index % plan.blocks, index, *team[i], share);
      }
    });
  }
}

// Calls run(begin, end) for ranges of `count` tasks on all threads, at least `grain` tasks a thread. Runs on one thread
// when cores are oversubscribed: parallel_for would wait for a descheduled worker.
template <class Run>
void run_tasks(int64_t count, int64_t grain, const Run& run) {
  parallel_for(count, ThreadTeam::oversubscribed() ? std::max(count, grain) : grain, run);
}

// Calls pack(weight, panel) for all panels of `weights` weights. panel_elements: elements of one panel.
template <class Pack>
void pack_all(int64_t weights, int64_t panels, int64_t panel_elements, const Pack& pack) {
  run_tasks(weights * panels, kGrain / 2 / (panel_elements + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(i / panels, i % panels);
  });
}

// Bytes of `panels` packed panels, each of depth K and `width` columns.
template <class S>
int64_t packed_bytes(int64_t panels, int64_t width, int64_t K) {
  const Kernels<S>& k = kernels<S>();
  return panels * width * divide_up(K, k.pair) * k.pair * k.operand_bytes + 64;
}

}  // namespace fastseq::cpu
