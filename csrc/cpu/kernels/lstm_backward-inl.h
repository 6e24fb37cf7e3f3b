// Backpropagation through time of one direction over one block of sequences: gradients of the gates and initial states.
//
// From the last processed step t to the first: dh_t = grad_output_t + dgates_{t+1} W_hh, then the backward of the cell
// while the sums are in registers. With a projection dh_t is stored, and after a barrier the cell reads dh_t W_hr. A
// panel is 4 * kLanes neighbouring columns. lstm_gradients-inl.h continues from the gates.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/cell-inl.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/panel_product-inl.h"
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

  PackedWeight recurrent() const { return {d.packed_hh, 4 * p.hidden, p.outputs}; }
  // The weight between the cell's output and the next gradients: W_hr, or W_hh without a projection.
  PackedWeight after_cell() const { return p.projected ? PackedWeight{d.packed_hr, p.outputs, p.hidden} : recurrent(); }
  Operand<S>* gates(int64_t position) const {
    return static_cast<Operand<S>*>(d.grad_gates) + position * p.gates_stride;
  }
  Operand<S>* hidden(int64_t position) const {
    return static_cast<Operand<S>*>(d.hidden_states) + position * p.outputs;
  }
  Operand<S>* grad_hidden(int64_t position) const {
    return static_cast<Operand<S>*>(d.grad_hidden) + position * p.hidden_stride;
  }
  Operand<S>* cell_outputs(int64_t position) const {  // o tanh(c)
    return p.projected ? static_cast<Operand<S>*>(d.unprojected) + position * p.hidden : hidden(position);
  }
};

// Pointers of one row at one step, at hidden unit 0.
template <class S>
struct BackwardRow {
  const Operand<S>* later;    // operands of after_cell(): (4H,) gate gradients of step t + 1, or null at the last
                              // step; if projected, (P,) gradients of h
  const S* grad_h_n;          // (H,) at the last step, if given, else null; null if projected, as grad_output is
  const S* activations;       // (4H,)
  const Acc<S>* cell_states;  // (H,)
  const Acc<S>* c_prev;       // (H,) or null at the first step, which reads c0
  const S* c0;                // (H,)
  const S* grad_output;       // (H,) or null
  const S* grad_cell_states;  // (H,) or null
  Acc<S>* dc;                 // (H,)
  Operand<S>* gates;          // (4H,)
  Operand<S>* hidden;         // (H,) o tanh(c)
};

// Backward of the cell for kLanes units from `unit` on. dh: dgates_{t+1} W_hh; if projected, dh_t W_hr.
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
  if (p.projected) {
    row.later = job.grad_hidden(position);
  } else if (step + 1 < length) {
    row.later = job.gates(job.block.position(r, step + 1));
  } else if (job.d.grad_h_n) {
    row.grad_h_n = job.d.grad_h_n + b * H;
  }
  row.activations = p.activations + at * p.saved;
  row.cell_states = p.cell_states + at * H;
  row.c0 = job.d.c0 + b * H;
  if (step > 0) row.c_prev = p.cell_states + (job.block.position(r, step - 1) * D + job.direction) * H;
  if (p.grad_output && !p.projected) row.grad_output = p.grad_output + at * H;
  if (p.grad_cell_states) row.grad_cell_states = p.grad_cell_states + at * H;
  row.dc = job.dc + r * H;
  row.gates = job.gates(position);
  row.hidden = job.cell_outputs(position);
  return row;
}

// With a projection: stores dh_t of all running rows, and h as operands for the gradient of W_hh.
template <class S>
void backward_projection(const BackwardJob<S>& job, int64_t step) {
  const LstmBackwardParams<S>& p = job.p;
  const int64_t P = p.outputs, continuing = job.block.running(step + 1, job.block.rows());
  const int64_t running = job.block.running(step, job.block.rows());
  const Operand<S>* later[kBlockRows];
  for (int64_t r = 0; r < continuing; ++r) later[r] = job.gates(job.block.position(r, step + 1));
  const auto finish = [&](int64_t r, int64_t column, Vec<Acc<S>> dh) FASTSEQ_LAMBDA_INLINE {
    const int64_t position = job.block.position(r, step), at = position * p.directions + job.direction;
    const int64_t n = P - column;
    if (r >= continuing && job.d.grad_h_n) dh += vload(job.d.grad_h_n + job.block.sequence(r) * P + column, n);
    if (p.grad_output) dh += vload(p.grad_output + at * P + column, n);
    Operand<S>* const grad = job.grad_hidden(position);
    vstore(dh, grad + column, n);
    for (int64_t j = P; n <= kLanes<S> && j < padded_depth<S>(P); ++j) grad[j] = Operand<S>{};
    vstore(vload(p.activations + at * p.saved + 4 * p.hidden + column, n), job.hidden(position) + column, n);
  };
  multiply_panels<S>(job, job.recurrent(), later, continuing, running, step, finish);
}

// Backward of the cells of one step. Without a projection, rows past the first `continuing` have no step t + 1.
template <class S>
void backward_step(const BackwardJob<S>& job, int64_t step) {
  const int64_t H = job.p.hidden, running = job.block.running(step, job.block.rows());
  const int64_t continuing = job.p.projected ? running : job.block.running(step + 1, job.block.rows());
  BackwardRow<S> rows[kBlockRows];
  const Operand<S>* later[kBlockRows];
  for (int64_t r = 0; r < running; ++r) {
    rows[r] = describe_row(job, r, step);
    later[r] = rows[r].later;
  }
  const auto finish = [&](int64_t r, int64_t unit, Vec<Acc<S>> dh)
                          FASTSEQ_LAMBDA_INLINE { backward_units<S>(rows[r], H, unit, H - unit, dh); };
  multiply_panels<S>(job, job.after_cell(), later, continuing, running, step, finish);
}

// Stores the gradients of the initial states.
template <class S>
void backward_start(const BackwardJob<S>& job) {
  const int64_t H = job.p.hidden, P = job.p.outputs, running = job.block.running(0, job.block.rows());
  const Operand<S>* first_gates[kBlockRows];
  for (int64_t r = 0; r < running; ++r) first_gates[r] = job.gates(job.block.position(r, 0));
  const auto finish = [&](int64_t r, int64_t column, Vec<Acc<S>> dh) FASTSEQ_LAMBDA_INLINE {
    vstore(dh, job.d.grad_h0 + job.block.sequence(r) * P + column, P - column);
  };
  multiply_panels<S>(job, job.recurrent(), first_gates, running, running, 0, finish);
  if (job.share.begin > 0) return;
  for (int64_t r = 0; r < job.block.rows(); ++r) {
    const int64_t b = job.block.sequence(r);
    for (int64_t j = 0; j < H; j += kLanes<S>)
      vstore(vload(job.dc + r * H + j, H - j), job.d.grad_c0 + b * H + j, H - j);
    if (r < running) continue;
    if (job.d.grad_h_n) {
      std::memcpy(job.d.grad_h0 + b * P, job.d.grad_h_n + b * P, P * sizeof(S));
    } else {
      fill_zero(job.d.grad_h0 + b * P, P);
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
      convert_row(d.h0 + b * p.outputs, p.outputs, p.outputs, job.hidden(p.seq.rows + b));
    }
  }
  if (!team.wait(job.share)) return;
  const int64_t steps = job.block.rows() == 0 ? 0 : job.block.length(0);
  for (int64_t step = steps - 1; step >= 0; --step) {
    if (p.projected) {
      backward_projection(job, step);
      if (!team.wait(job.share)) return;
    }
    backward_step(job, step);
    if (!team.wait(job.share)) return;
  }
  backward_start(job);
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
