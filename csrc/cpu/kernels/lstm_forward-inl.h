// Forward of one direction of an LSTM layer over one block of sequences, all steps.
//
// Runs in chunks of steps. A chunk first multiplies all its input rows with W_ih. Then, step by step, it multiplies h
// with W_hh and applies the cell while the sums are in registers. A projection is a second product in each step:
// m = o tanh(c) of all units, a barrier, h = m W_hr^T.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa/region.h"
#include "cpu/kernels/cell-inl.h"
#include "cpu/kernels/dot-inl.h"
#include "cpu/kernels/dot_int8-inl.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/panel_product-inl.h"
#include "cpu/kernels/vector-inl.h"
#include "cpu/runtime/sequences.h"
#include "cpu/runtime/team.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

template <class S>
struct ForwardJob {
  const LstmForwardParams<S>& p;
  const LstmForwardDirection<S>& d;
  int64_t direction;  // index, which selects the columns in tensors of the layer
  SequenceBlock block;
  ThreadTeam& team;
  ThreadTeam::Share share;
  int64_t members;

  Acc<S>* c;          // (block rows, H) shared by the team
  Operand<S>* h[2];   // (block rows, depth of P) read by even and odd steps; unless kDirect
  Operand<S>* m;      // (block rows, depth of H) o tanh(c) before the projection, shared by the team; if projected
  Operand<S>* x;      // (chunk rows, depth of I), one for each member; unless kDirect
  Acc<S>* gates;      // (panels, chunk rows, 4 vectors) x W_ih^T
  float* row_scale;   // (chunk rows,) of quantised rows
  int16_t* integers;  // (chunk rows, integer_stride of I or H) quantised rows, if weights are read in place

  int64_t panels() const { return (p.hidden + kLanes<S> - 1) / kLanes<S>; }
  int64_t first_panel() const { return panels() * share.begin / members; }
  int64_t last_panel() const { return panels() * share.end / members; }
  // The k-th panel of a step. The order alternates, so that a step begins with panels that the step before left in the
  // L2 cache.
  int64_t panel_of(int64_t k, int64_t step) const { return step % 2 == 0 ? first_panel() + k : last_panel() - 1 - k; }
  // A panel of this member: `panel`, or the first one for a panel of another member.
  int64_t own(int64_t panel) const { return first_panel() <= panel && panel < last_panel() ? panel : first_panel(); }
  IntegerRows quantize(const GateWeight<S>& weight, const Operand<S>* const* a, int64_t rows, int64_t K) const {
    return weight.packed ? IntegerRows{} : quantize_rows<S>(weight, a, rows, K, integers, row_scale);
  }
  // The columns of this member, of `width`.
  struct Columns {
    int64_t begin, end;
  };
  Columns columns(int64_t width) const {
    const int64_t vectors = (width + kLanes<S> - 1) / kLanes<S>, end = vectors * share.end / members * kLanes<S>;
    return {vectors * share.begin / members * kLanes<S>, end < width ? end : width};
  }
  int64_t units(int64_t panel) const {
    const int64_t rest = p.hidden - panel * kLanes<S>;
    return rest < kLanes<S> ? rest : kLanes<S>;
  }
};

// The running rows of one step: their positions, and h before the step.
template <class S>
struct StepRows {
  int64_t count;
  int64_t position[kBlockRows];
  const Operand<S>* h[kBlockRows];
};

// sums[r] = row r times W, for the four gates of one panel of hidden units. Calls finish(first row, rows) once the sums
// of a tile are complete.
template <class S, class Finish>
FASTSEQ_INLINE void multiply_gates(const ForwardJob<S>& job,
                                   const Operand<S>* const* a,  // (rows) rows of K elements
                                   IntegerRows integers,        // the same rows, if quantised
                                   int64_t rows,
                                   const GateWeight<S>& weight,  // (4H, K)
                                   int64_t K,
                                   int64_t panel,
                                   int64_t next,  // panel to prefetch
                                   Acc<S>* sums,  // (rows, 4 vectors)
                                   const Finish& finish) {
  if (weight.packed) {
    const int64_t depth = padded_depth<S>(K);
    return multiply_block<S>(a, rows, panel_at<S>(weight.packed, panel, depth), depth,
                             panel_at<S>(weight.packed, job.own(next), depth), false, sums, finish);
  }
  for_each_tile<kDotRows>(rows, [&](auto height, int64_t first) FASTSEQ_NOINLINE {
    constexpr int ROWS = decltype(height)::count;
    Vec<Acc<S>> gates[ROWS][4];
    multiply_gate_rows<S, ROWS>(a + first, integers.from(first, K), weight, job.p.hidden, K, panel * kLanes<S>,
                                job.units(panel), gates);
    for (int r = 0; r < ROWS; ++r) {
      for (int q = 0; q < 4; ++q) vstore(gates[r][q], sums + ((first + r) * 4 + q) * kLanes<S>);
    }
    finish(first, ROWS);
  });
}

// gates[panel][row] = x W_ih^T, for `rows` input rows and the panels of this member.
template <class S>
void multiply_inputs(ForwardJob<S>& job, const Operand<S>* const* x, int64_t rows) {
  const LstmForwardParams<S>& p = job.p;
  const IntegerRows integers = job.quantize(job.d.ih, x, rows, p.input_size);
  for (int64_t panel = job.first_panel(); panel < job.last_panel(); ++panel) {
    multiply_gates<S>(job, x, integers, rows, job.d.ih, p.input_size, panel, panel + 1,
                      job.gates + panel * p.chunk_rows * 4 * kLanes<S>, [](int64_t, int64_t) {});
  }
}

// Stores h, from `column` on, as result and as operand of the next step.
template <class S>
FASTSEQ_INLINE void store_hidden(ForwardJob<S>& job,
                                 int64_t row,
                                 int64_t position,
                                 int64_t column,
                                 int64_t n,
                                 int64_t next,  // index into job.h after the step
                                 Vec<Acc<S>> h) {
  const LstmForwardParams<S>& p = job.p;
  S* const output = p.output + (position * p.directions + job.direction) * p.outputs + column;
  vstore(h, output, n);
  if constexpr (!kDirect<S>) {
    Operand<S>* const operand = job.h[next] + row * padded_depth<S>(p.outputs) + column;
    if constexpr (sizeof(Operand<S>) == sizeof(S)) {
      vstore(h, operand, n);
    } else {
      vstore(vload(output, n), operand, n);  // rounded as the output is
    }
  }
}

// Applies the cell to the pre-activations of one row. Stores c, h and, if needed, the results for the backward.
template <class S>
FASTSEQ_INLINE void finish_row(ForwardJob<S>& job,
                               int64_t row,
                               int64_t position,
                               int64_t unit,
                               int64_t units,
                               int64_t next,               // index into job.h after the step
                               Vec<Acc<S>> (&gates)[4]) {  // pre-activations
  const LstmForwardParams<S>& p = job.p;
  const int64_t H = p.hidden, column = job.direction * H + unit;
  Acc<S>* const cell = job.c + row * H + unit;
  Vec<Acc<S>> c = vload(cell, units);
  const Vec<Acc<S>> h = cell_update<Acc<S>>(gates, c);
  vstore(c, cell, units);
  if (p.projected) {
    vstore(h, job.m + row * padded_depth<S>(H) + unit, units);
  } else {
    store_hidden(job, row, position, unit, units, next, h);
  }
  if (p.cell_states) vstore(c, p.cell_states + position * p.directions * H + column, units);
  if (!p.activations) return;
  store_gates(gates, p.activations + (position * p.directions + job.direction) * p.saved + unit, H, units);
}

// One step of all running rows. inputs: x W_ih^T of these rows, in the first panel of job.gates.
template <class S>
void run_step(ForwardJob<S>& job, const StepRows<S>& rows, const Acc<S>* inputs, int64_t step) {
  const LstmForwardParams<S>& p = job.p;
  const int64_t H = p.hidden;
  alignas(64) Acc<S> sums[kBlockRows * 4 * kLanes<S>];
  const IntegerRows integers = job.quantize(job.d.hh, rows.h, rows.count, p.outputs);
  for (int64_t k = 0; k < job.last_panel() - job.first_panel(); ++k) {
    const int64_t panel = job.panel_of(k, step), unit = panel * kLanes<S>, units = job.units(panel);
    Vec<Acc<S>> bias[4];
    for (int64_t q = 0; q < 4; ++q) bias[q] = vload(job.d.bias + q * H + unit, units);
    const Acc<S>* const start = inputs + panel * p.chunk_rows * 4 * kLanes<S>;
    const auto finish = [&](int64_t first, int64_t count) FASTSEQ_NOINLINE {
#pragma GCC unroll 1
      for (int64_t r = first; r < first + count; ++r) {
        Vec<Acc<S>> gates[4];
        // The input part is added last: sums of h W_hh are small, and a large start value would round them coarsely.
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const int64_t at = (r * 4 + q) * kLanes<S>;
          gates[q] = vload(sums + at) + (vload(start + at) + bias[q]);
        }
        finish_row(job, r, rows.position[r], unit, units, (step + 1) % 2, gates);
      }
    };
    multiply_gates<S>(job, rows.h, integers, rows.count, job.d.hh, p.outputs, panel, job.panel_of(k + 1, step), sums,
                      finish);
  }
}

// Terms in one accumulation chunk of the projection. No sigmoid dampens the errors of its sums: chunks of 128 terms
// were three times as inexact as MKL's products.
constexpr int64_t kProjectionChunk = 32;

// Calls finish(row, column, h) with vectors of h = m W_hr^T, for the columns of this member.
template <class S, class Finish>
FASTSEQ_INLINE void multiply_projection(const ForwardJob<S>& job,
                                        const Operand<S>* const* m,  // (rows) rows of H elements
                                        int64_t rows,
                                        int64_t step,  // alternates the order of panels
                                        const Finish& finish) {
  const int64_t H = job.p.hidden, P = job.p.outputs;
  if (job.d.packed_hr) {
    const PackedWeight weight{job.d.packed_hr, H, P};
    return multiply_panels<S, kProjectionChunk>(job, weight, m, rows, rows, step, finish);
  }
  const auto [begin, end] = job.columns(P);
  for (int64_t column = begin; column < end; column += kLanes<S>) {
    const int64_t count = end - column < kLanes<S> ? end - column : kLanes<S>;
    for_each_tile<kDotRows>(rows, [&](auto height, int64_t first) FASTSEQ_NOINLINE {
      constexpr int ROWS = decltype(height)::count;
      Vec<Acc<S>> h[ROWS];
      dot_rows<S, ROWS>(m + first, job.d.weight_hr + column * H, H, count, h);
      for (int r = 0; r < ROWS; ++r) finish(first + r, column, h[r]);
    });
  }
}

// Projects o tanh(c) of all running rows, which the whole team has stored, to h.
template <class S>
void project_step(ForwardJob<S>& job, const StepRows<S>& rows, int64_t step) {
  const LstmForwardParams<S>& p = job.p;
  const Operand<S>* m[kBlockRows];
  for (int64_t r = 0; r < rows.count; ++r) m[r] = job.m + r * padded_depth<S>(p.hidden);
  multiply_projection(job, m, rows.count, step, [&](int64_t r, int64_t column, Vec<Acc<S>> h) FASTSEQ_NOINLINE {
    const int64_t n = p.outputs - column, position = rows.position[r];
    store_hidden(job, r, position, column, n, (step + 1) % 2, h);
    if (!p.activations) return;
    vstore(h, p.activations + (position * p.directions + job.direction) * p.saved + 4 * p.hidden + column, n);
  });
}

// Operands of an input row: the tensor itself if kDirect, else a converted copy in slot `slot` of job.x.
template <class S>
FASTSEQ_INLINE const Operand<S>* input_operands(ForwardJob<S>& job, int64_t position, int64_t slot) {
  const S* const row = job.p.input + position * job.p.input_size;
  if constexpr (kDirect<S>) {
    return row;
  } else {
    const int64_t depth = padded_depth<S>(job.p.input_size);
    convert_row(row, job.p.input_size, depth, job.x + slot * depth);
    return job.x + slot * depth;
  }
}

template <class S>
FASTSEQ_INLINE void step_rows(ForwardJob<S>& job, int64_t step, int64_t count, StepRows<S>& rows) {
  const LstmForwardParams<S>& p = job.p;
  rows.count = count;
  for (int64_t r = 0; r < count; ++r) {
    rows.position[r] = job.block.position(r, step);
    if constexpr (kDirect<S>) {
      rows.h[r] = step == 0 ? job.d.h0 + job.block.sequence(r) * p.outputs
                            : p.output + (job.block.position(r, step - 1) * p.directions + job.direction) * p.outputs;
    } else {
      rows.h[r] = job.h[step % 2] + r * padded_depth<S>(p.outputs);
    }
  }
}

// Runs the next steps, as many as fill a chunk. Returns true if this thread continues.
template <class S>
bool run_chunk(ForwardJob<S>& job, int64_t& step, int64_t& running) {
  const Operand<S>* x[kChunkRows];
  int64_t rows = 0, end = step;
  for (int64_t count = running; (count = job.block.running(end, count)) > 0 && rows + count <= job.p.chunk_rows;
       ++end) {
    for (int64_t r = 0; r < count; ++r, ++rows) x[rows] = input_operands(job, job.block.position(r, end), rows);
  }
  multiply_inputs(job, x, rows);
  const int64_t shares = job.share.end - job.share.begin;
  StepRows<S> current;
  for (const Acc<S>* gates = job.gates; step < end; ++step) {
    running = job.block.running(step, running);
    step_rows(job, step, running, current);
    run_step(job, current, gates, step);
    gates += running * 4 * kLanes<S>;
    if (job.p.projected) {
      if (!job.team.wait(job.share)) return false;
      project_step(job, current, step);
    }
    if (!job.team.wait(job.share)) return false;
    if (job.share.end - job.share.begin != shares) {  // alone from here on; the new panels have no gates yet
      ++step;
      return true;
    }
  }
  return true;
}

// Sets the states before the first step and clears rows past the end of every sequence, in this member's columns.
template <class S>
void start_block(ForwardJob<S>& job) {
  const LstmForwardParams<S>& p = job.p;
  const int64_t H = p.hidden, P = p.outputs, depth = padded_depth<S>(P);
  const auto cells = job.columns(H), hidden = job.columns(P);
  for (int64_t r = 0; r < job.block.rows(); ++r) {
    const int64_t b = job.block.sequence(r);
    for (int64_t j = cells.begin; j < cells.end; j += kLanes<S>) {
      vstore(vload(job.d.c0 + b * H + j, cells.end - j), job.c + r * H + j, cells.end - j);
    }
    if constexpr (!kDirect<S>) {
      convert_row(job.d.h0 + b * P + hidden.begin, hidden.end - hidden.begin,
                  (hidden.end == P ? depth : hidden.end) - hidden.begin, job.h[0] + r * depth + hidden.begin);
      for (int64_t j = P; hidden.end == P && j < depth; ++j) job.h[1][r * depth + j] = Operand<S>{};
      for (int64_t j = H; p.projected && cells.end == H && j < padded_depth<S>(H); ++j) {
        job.m[r * padded_depth<S>(H) + j] = Operand<S>{};
      }
    }
    if (p.seq.packed) continue;
    for (int64_t t = job.block.length(r); t < p.seq.steps; ++t) {
      const int64_t row = (p.seq.offset[t] + b) * p.directions + job.direction;
      fill_zero(p.output + row * P + hidden.begin, hidden.end - hidden.begin);
      if (p.cell_states) fill_zero(p.cell_states + row * H + cells.begin, cells.end - cells.begin);
    }
  }
}

// Stores the states after the last step of every sequence.
template <class S>
void finish_block(const ForwardJob<S>& job) {
  const LstmForwardParams<S>& p = job.p;
  const int64_t H = p.hidden, P = p.outputs;
  for (int64_t r = 0; r < job.block.rows(); ++r) {
    const int64_t b = job.block.sequence(r), length = job.block.length(r);
    const S* h = job.d.h0 + b * P;
    if (length > 0) h = p.output + (job.block.position(r, length - 1) * p.directions + job.direction) * P;
    std::memcpy(job.d.h_n + b * P, h, P * sizeof(S));
    for (int64_t j = 0; j < H; j += kLanes<S>) vstore(vload(job.c + r * H + j, H - j), job.d.c_n + b * H + j, H - j);
  }
}

// Scratch bytes that a team shares.
template <class S>
int64_t forward_shared_bytes(const LstmForwardParams<S>& p) {
  const int64_t rows = SequenceBlock{p.seq, false, 0, p.blocks}.rows();
  const int64_t operands = (kDirect<S> ? 0 : 2 * padded_depth<S>(p.outputs)) +  // h of even and odd steps
                           (p.projected ? padded_depth<S>(p.hidden) : 0);
  return rows * (p.hidden * sizeof(Acc<S>) + operands * sizeof(Operand<S>));
}

// Bytes of quantised rows and their scales.
template <class S>
int64_t integer_bytes(const LstmForwardParams<S>& p) {
  if (!takes_integers<S>(p.direction[0].hh)) return 0;
  const int64_t rows = p.chunk_rows > kBlockRows ? p.chunk_rows : kBlockRows;
  const int64_t depth = p.input_size > p.hidden ? p.input_size : p.hidden;
  return rows * (sizeof(float) + integer_stride(depth) * sizeof(int16_t));
}

// Additional scratch bytes of each member.
template <class S>
int64_t forward_member_bytes(const LstmForwardParams<S>& p) {
  const int64_t panels = (p.hidden + kLanes<S> - 1) / kLanes<S>;
  const int64_t gates = panels * p.chunk_rows * 4 * kLanes<S> * sizeof(Acc<S>);
  const int64_t operands = kDirect<S> ? 0 : p.chunk_rows * padded_depth<S>(p.input_size) * sizeof(Operand<S>);
  return gates + operands + integer_bytes(p);
}

template <class S>
void lstm_forward(const LstmForwardParams<S>& p,
                  int64_t direction,
                  int64_t block,
                  ThreadTeam& team,
                  int64_t members,
                  ThreadTeam::Share share,
                  void* shared,    // forward_shared_bytes
                  void* member) {  // forward_member_bytes
  const FlushDenormals flush;
  const LstmForwardDirection<S>& d = p.direction[direction];
  ForwardJob<S> job{p,       d,       direction, SequenceBlock{p.seq, d.reverse, block, p.blocks},
                    team,    share,   members,   nullptr,
                    {},      nullptr, nullptr,   nullptr,
                    nullptr, nullptr};
  const int64_t rows = job.block.rows(), depth = padded_depth<S>(p.outputs);
  job.c = static_cast<Acc<S>*>(shared);
  job.m = reinterpret_cast<Operand<S>*>(job.c + rows * p.hidden) + (kDirect<S> ? 0 : 2 * rows * depth);
  job.gates = static_cast<Acc<S>*>(member);
  if constexpr (!kDirect<S>) {
    job.h[0] = reinterpret_cast<Operand<S>*>(job.c + rows * p.hidden);
    job.h[1] = job.h[0] + rows * depth;
    job.x = reinterpret_cast<Operand<S>*>(job.gates + job.panels() * p.chunk_rows * 4 * kLanes<S>);
  }
  if constexpr (std::is_same_v<S, float>) {
    job.row_scale = job.gates + job.panels() * p.chunk_rows * 4 * kLanes<S>;
    job.integers = reinterpret_cast<int16_t*>(job.row_scale + (p.chunk_rows > kBlockRows ? p.chunk_rows : kBlockRows));
  }
  start_block(job);
  if (!team.wait(job.share)) return;
  int64_t running = rows;
  for (int64_t step = 0; (running = job.block.running(step, running)) > 0;) {
    if (!run_chunk(job, step, running)) return;
  }
  if (job.share.begin == 0) finish_block(job);
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
