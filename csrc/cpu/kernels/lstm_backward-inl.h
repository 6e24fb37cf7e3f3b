// Backpropagation through time of one direction over one block of sequences: gradients of the gates and initial states.
//
// From the last processed step t to the first: dh_t = grad_output_t + dgates_{t+1} W_hh, then the backward of the cell
// while the sums are in registers. A panel is 4 * kLanes neighbouring hidden units. lstm_gradients-inl.h continues from
// the gates.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/cell-inl.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/vector-inl.h"
#include "cpu/runtime/sequences.h"
#include "cpu/runtime/team.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

template <class S>
struct BackwardJob {
  const LstmBackwardParams<S>& p;
  const LstmBackwardDirection<S>& d;
  int64_t direction;
  SequenceBlock block;
  ThreadTeam& team;
  ThreadTeam::Share share;
  int64_t members;
  Acc<S>* dc;  // (block rows, H), shared by the team

  int64_t panels() const { return (p.hidden + 4 * kLanes<S> - 1) / (4 * kLanes<S>); }
  int64_t first_panel() const { return panels() * share.begin / members; }
  int64_t last_panel() const { return panels() * share.end / members; }
  // Alternates the order of panels, as the forward does.
  int64_t panel_of(int64_t k, int64_t step) const { return step % 2 == 0 ? first_panel() + k : last_panel() - 1 - k; }
  const Operand<S>* weights(int64_t panel) const {  // the first panel again after the last
    const bool inside = first_panel() <= panel && panel < last_panel();
    return panel_at<S>(d.packed_hh, inside ? panel : first_panel(), padded_depth<S>(4 * p.hidden));
  }
  Operand<S>* gates(int64_t position) const {
    return static_cast<Operand<S>*>(d.grad_gates) + position * p.gates_stride;
  }
  Operand<S>* hidden(int64_t position) const { return static_cast<Operand<S>*>(d.hidden_states) + position * p.hidden; }
};

// Pointers of one row at one step, at hidden unit 0.
template <class S>
struct BackwardRow {
  const Operand<S>* later;    // (4H,) gate gradients of step t + 1, or null at the last step
  const S* grad_h_n;          // (H,) at the last step, if given, else null
  const S* activations;       // (4H,)
  const Acc<S>* cell_states;  // (H,)
  const Acc<S>* c_prev;       // (H,) or null at the first step, which reads c0
  const S* c0;                // (H,)
  const S* grad_output;       // (H,) or null
  const S* grad_cell_states;  // (H,) or null
  Acc<S>* dc;                 // (H,)
  Operand<S>* gates;          // (4H,)
  Operand<S>* hidden;         // (H,)
};

// Backward of the cell for kLanes units from `unit` on. dh: dgates_{t+1} W_hh.
template <class S>
FASTSEQ_INLINE void backward_units(const BackwardRow<S>& row, int64_t H, int64_t unit, int64_t n, Vec<Acc<S>> dh) {
  using V = Vec<Acc<S>>;
  V gates[4], dc = vload(row.dc + unit, n);
  load_gates(row.activations + unit, H, n, gates);
  const V tanh_c = vtanh(vload(row.cell_states + unit, n)), h = gates[3] * tanh_c;
  const V c_prev = row.c_prev ? vload(row.c_prev + unit, n) : vload(row.c0 + unit, n);
  if (row.grad_h_n) dh += vload(row.grad_h_n + unit, n);
  if (row.grad_output) dh += vload(row.grad_output + unit, n);
  if (row.grad_cell_states) dc += vload(row.grad_cell_states + unit, n);
  cell_gradients<Acc<S>>(gates, c_prev, tanh_c, dh, dc);
  store_gates(gates, row.gates + unit, H, n);
  vstore(dc, row.dc + unit, n);
  vstore(h, row.hidden + unit, n);
}

template <class S>
FASTSEQ_INLINE BackwardRow<S> describe_row(const BackwardJob<S>& job, int64_t r, int64_t step) {
  const LstmBackwardParams<S>& p = job.p;
  const int64_t H = p.hidden, D = p.directions, b = job.block.sequence(r), length = job.block.length(r);
  const int64_t position = job.block.position(r, step), at = position * D + job.direction;
  BackwardRow<S> row{};
  if (step + 1 < length) {
    row.later = job.gates(job.block.position(r, step + 1));
  } else if (job.d.grad_h_n) {
    row.grad_h_n = job.d.grad_h_n + b * H;
  }
  row.activations = p.activations + at * 4 * H;
  row.cell_states = p.cell_states + at * H;
  row.c0 = job.d.c0 + b * H;
  if (step > 0) row.c_prev = p.cell_states + (job.block.position(r, step - 1) * D + job.direction) * H;
  if (p.grad_output) row.grad_output = p.grad_output + at * H;
  if (p.grad_cell_states) row.grad_cell_states = p.grad_cell_states + at * H;
  row.dc = job.dc + r * H;
  row.gates = job.gates(position);
  row.hidden = job.hidden(position);
  return row;
}

// sums (rows, 4 vectors) = dgates_{t+1} W_hh, for one panel of hidden units. Calls finish(first row, rows) once the
// sums of a tile are complete.
template <class S, class Finish>
FASTSEQ_INLINE void multiply_later(const BackwardJob<S>& job,
                                   const Operand<S>* const* later,  // (rows) rows of 4H
                                   int64_t rows,
                                   int64_t panel,
                                   int64_t next,  // panel to prefetch
                                   Acc<S>* sums,
                                   const Finish& finish) {
  const int64_t depth = padded_depth<S>(4 * job.p.hidden);
  multiply_block<S>(later, rows, job.weights(panel), depth, job.weights(next), false, sums, finish);
}

// One step of `running` rows. The first `continuing` of them have a step t + 1.
template <class S>
void backward_rows(
    const BackwardJob<S>& job, const BackwardRow<S>* rows, int64_t running, int64_t continuing, int64_t step) {
  const int64_t H = job.p.hidden, width = 4 * kLanes<S>;
  const Operand<S>* later[kBlockRows];
  alignas(64) Acc<S> sums[kBlockRows * 4 * kLanes<S>];
  for (int64_t r = 0; r < continuing; ++r) later[r] = rows[r].later;
  for (int64_t k = 0; k < job.last_panel() - job.first_panel(); ++k) {
    const int64_t panel = job.panel_of(k, step);
    const auto finish = [&](int64_t first, int64_t count) FASTSEQ_NOINLINE {
      for (int64_t r = first; r < first + count; ++r) {
        for (int64_t j = 0, unit = panel * width; j < width && unit < H; j += kLanes<S>, unit += kLanes<S>) {
          backward_units<S>(rows[r], H, unit, H - unit, vload(sums + r * width + j));
        }
      }
    };
    multiply_later(job, later, continuing, panel, job.panel_of(k + 1, step), sums, finish);
    fill_zero(sums + continuing * width, (running - continuing) * width);
    finish(continuing, running - continuing);
  }
}

template <class S>
void backward_step(const BackwardJob<S>& job, int64_t step) {
  const int64_t continuing = job.block.running(step + 1, job.block.rows());
  const int64_t running = job.block.running(step, job.block.rows());
  BackwardRow<S> rows[kBlockRows];
  for (int64_t r = 0; r < running; ++r) rows[r] = describe_row(job, r, step);
  backward_rows(job, rows, running, continuing, step);
}

// Stores the gradients of the initial states.
template <class S>
void backward_start(const BackwardJob<S>& job) {
  const int64_t H = job.p.hidden, running = job.block.running(0, job.block.rows());
  const Operand<S>* first_gates[kBlockRows];
  for (int64_t r = 0; r < running; ++r) first_gates[r] = job.gates(job.block.position(r, 0));
  alignas(64) Acc<S> sums[kBlockRows * 4 * kLanes<S>];
  for (int64_t panel = job.first_panel(); panel < job.last_panel(); ++panel) {
    multiply_later(job, first_gates, running, panel, panel + 1, sums, [](int64_t, int64_t) {});
    for (int64_t r = 0; r < running; ++r) {
      S* const out = job.d.grad_h0 + job.block.sequence(r) * H;
      for (int64_t v = 0, unit = panel * 4 * kLanes<S>; v < 4 && unit < H; ++v, unit += kLanes<S>) {
        vstore(vload(sums + (r * 4 + v) * kLanes<S>), out + unit, H - unit);
      }
    }
  }
  if (job.share.begin > 0) return;
  for (int64_t r = 0; r < job.block.rows(); ++r) {
    const int64_t b = job.block.sequence(r);
    for (int64_t j = 0; j < H; j += kLanes<S>)
      vstore(vload(job.dc + r * H + j, H - j), job.d.grad_c0 + b * H + j, H - j);
    if (r < running) continue;
    if (job.d.grad_h_n) {
      std::memcpy(job.d.grad_h0 + b * H, job.d.grad_h_n + b * H, H * sizeof(S));
    } else {
      fill_zero(job.d.grad_h0 + b * H, H);
    }
  }
}

template <class S>
void lstm_backward(const LstmBackwardParams<S>& p,
                   int64_t direction,
                   int64_t block,
                   ThreadTeam& team,
                   int64_t members,
                   ThreadTeam::Share share,
                   void* shared) {  // (block rows, H) of Acc<S>
  const FlushDenormals flush;
  const LstmBackwardDirection<S>& d = p.direction[direction];
  BackwardJob<S> job{p,    d,     direction, SequenceBlock{p.seq, d.reverse, block, p.blocks},
                     team, share, members,   static_cast<Acc<S>*>(shared)};
  const int64_t H = p.hidden;
  if (share.begin == 0) {
    for (int64_t r = 0; r < job.block.rows(); ++r) {
      const int64_t b = job.block.sequence(r);
      for (int64_t j = 0; j < H; j += kLanes<S>) {
        const Vec<Acc<S>> grad = d.grad_c_n ? vload(d.grad_c_n + b * H + j, H - j) : Vec<Acc<S>>{};
        vstore(grad, job.dc + r * H + j, H - j);
      }
      convert_row(d.h0 + b * H, H, H, job.hidden(p.seq.rows + b));
    }
  }
  if (!team.wait(job.share)) return;
  const int64_t steps = job.block.rows() == 0 ? 0 : job.block.length(0);
  for (int64_t step = steps - 1; step >= 0; --step) {
    backward_step(job, step);
    if (!team.wait(job.share)) return;
  }
  backward_start(job);
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
