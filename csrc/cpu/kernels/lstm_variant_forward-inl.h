// Forward of the LSTM variants over one block of sequences: recurrent dropout, zoneout, layer normalisation.
//
// Each step has two passes: W_hh times the masked h of all rows, then row by row the rest, which for a normalisation
// needs the whole row. One thread runs a block.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/cell-inl.h"
#include "cpu/kernels/dot_int8-inl.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/lstm_variant-inl.h"
#include "cpu/kernels/lstm_variant_params.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/vector-inl.h"
#include "cpu/runtime/sequences.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

template <class S>
struct VariantForwardJob {
  const LstmVariantForwardParams<S>& p;
  SequenceBlock block;
  Acc<S>*h, *c;          // (block rows, H)
  Acc<S>* sums;          // (panels, block rows, 4 vectors) W_hh h
  Acc<S>* row;           // (panels, 2 vectors) of one row: the new c, then o
  Operand<S>* operands;  // (block rows, depth of H) masked h

  Acc<S>* sums_at(int64_t panel, int64_t r) const { return sums + (panel * block.rows() + r) * 4 * kLanes<S>; }
};

// Offsets into the scratch memory of a block, in bytes.
template <class S>
struct VariantForwardScratch {
  int64_t c, sums, row, operands, end;

  explicit VariantForwardScratch(const LstmVariantForwardParams<S>& p) {
    const int64_t rows = SequenceBlock{p.seq, false, 0, p.blocks}.rows(), panels = panels_of<S>(p.hidden);
    const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    c = aligned(rows * p.hidden * sizeof(Acc<S>));
    sums = c + aligned(rows * p.hidden * sizeof(Acc<S>));
    row = sums + panels * rows * 4 * kLanes<S> * sizeof(Acc<S>);
    operands = row + panels * 2 * kLanes<S> * sizeof(Acc<S>);
    end = operands + aligned(rows * padded_depth<S>(p.hidden) * sizeof(Operand<S>));
  }
};

template <class S>
int64_t variant_forward_bytes(const LstmVariantForwardParams<S>& p) {
  return VariantForwardScratch<S>(p).end;
}

// Stores h times the mask, rounded to S, as the operand of the next product of a row; and at `position` for the
// backward, unless negative.
template <class S>
FASTSEQ_INLINE void store_operand(
    const VariantForwardJob<S>& job, int64_t r, int64_t position, int64_t unit, int64_t units, Vec<Acc<S>> h) {
  const int64_t H = job.p.hidden;
  if (job.p.hidden_mask) h *= vload(job.p.hidden_mask + job.block.sequence(r) * H + unit, units);
  S rounded[kLanes<S>];
  vstore(h, rounded);
  Operand<S>* const to = job.operands + r * padded_depth<S>(H) + unit;
  const int64_t count = units < kLanes<S> ? units : kLanes<S>;
  if constexpr (sizeof(Operand<S>) == sizeof(S)) {
    std::memcpy(to, rounded, count * sizeof(S));
  } else {
    vstore(vload(rounded), to, units);
  }
  if (job.p.operands && position >= 0) std::memcpy(job.p.operands + position * H + unit, rounded, count * sizeof(S));
}

// sums = W_hh times the operands of the first `rows` rows.
template <class S>
void multiply_operands(const VariantForwardJob<S>& job, int64_t rows, int64_t step) {
  const LstmVariantForwardParams<S>& p = job.p;
  const int64_t H = p.hidden, depth = padded_depth<S>(H), panels = panels_of<S>(H);
  const Operand<S>* a[kBlockRows];
  for (int64_t r = 0; r < rows; ++r) a[r] = job.operands + r * depth;
  const auto panel_of = [&](int64_t k) { return step % 2 == 0 ? k : panels - 1 - k; };  // as in lstm_forward-inl.h
  for (int64_t k = 0; k < panels; ++k) {
    const int64_t panel = panel_of(k), unit = panel * kLanes<S>;
    if (p.hh.packed) {
      const int64_t next = k + 1 < panels ? panel_of(k + 1) : panel;
      multiply_block<S>(a, rows, panel_at<S>(p.hh.packed, panel, depth), depth, panel_at<S>(p.hh.packed, next, depth),
                        false, job.sums_at(panel, 0));
      continue;
    }
    const int64_t units = H - unit < kLanes<S> ? H - unit : kLanes<S>;
    for_each_tile<kDotRows>(rows, [&](auto height, int64_t first) FASTSEQ_NOINLINE {
      constexpr int ROWS = decltype(height)::count;
      Vec<Acc<S>> gates[ROWS][4];
      multiply_gate_rows<S, ROWS>(a + first, IntegerRows{}, p.hh, H, H, unit, units, gates);
      for (int r = 0; r < ROWS; ++r) {
        for (int q = 0; q < 4; ++q) vstore(gates[r][q], job.sums_at(panel, first + r) + q * kLanes<S>);
      }
    });
  }
}

// Zoneout and all stores of kLanes units of a row. c, h: new values before zoneout. next: position of the row's next
// step, or negative.
template <class S>
FASTSEQ_INLINE void finish_units(const VariantForwardJob<S>& job,
                                 int64_t r,
                                 int64_t position,
                                 int64_t next,
                                 int64_t unit,
                                 int64_t units,
                                 Vec<Acc<S>> c,
                                 Vec<Acc<S>> h) {
  const LstmVariantForwardParams<S>& p = job.p;
  const int64_t H = p.hidden, at = position * H + unit;
  Acc<S>*const c_state = job.c + r * H + unit, *const h_state = job.h + r * H + unit;
  c = zone_out(p.zoneout_c, at, units, c, vload(c_state, units));
  h = zone_out(p.zoneout_h, at, units, h, vload(h_state, units));
  vstore(c, c_state, units);
  vstore(h, h_state, units);
  vstore(h, p.output + at, units);
  if (p.cell_states) vstore(c, p.cell_states + at, units);
  store_operand(job, r, next, unit, units, h);
}

// Pre-activations to activations, for kLanes units of a row; stores them if needed. Returns the new c.
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> activate(const VariantForwardJob<S>& job,
                                    int64_t r,
                                    int64_t position,
                                    int64_t unit,
                                    int64_t units,
                                    Vec<Acc<S>> (&gates)[4]) {
  const int64_t H = job.p.hidden;
  const S* const inputs = job.p.gates + position * 4 * H + unit;
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) gates[q] += vload(inputs + q * H, units);
  gates[0] = vsigmoid(gates[0]);
  gates[1] = vsigmoid(gates[1]);
  gates[2] = vtanh(gates[2]);
  gates[3] = vsigmoid(gates[3]);
  if (job.p.activations) store_gates(gates, job.p.activations + position * 4 * H + unit, H, units);
  return fma(gates[1], vload(job.c + r * H + unit, units), gates[0] * gates[2]);
}

// A step of one row without normalisation.
template <class S>
void plain_row(const VariantForwardJob<S>& job, int64_t r, int64_t position, int64_t next) {
  const int64_t H = job.p.hidden;
  for (int64_t panel = 0, unit = 0; unit < H; ++panel, unit += kLanes<S>) {
    Vec<Acc<S>> gates[4];
    const Acc<S>* const sums = job.sums_at(panel, r);
    for (int q = 0; q < 4; ++q) gates[q] = vload(sums + q * kLanes<S>);
    const Vec<Acc<S>> c = activate(job, r, position, unit, H - unit, gates);
    finish_units(job, r, position, next, unit, H - unit, c, gates[3] * vtanh(c));
  }
}

// A step of one row with both normalisations.
template <class S>
void normalised_row(const VariantForwardJob<S>& job, int64_t r, int64_t position, int64_t next) {
  using A = Acc<S>;
  const LstmVariantForwardParams<S>& p = job.p;
  const int64_t H = p.hidden, panels = panels_of<S>(H);
  const Moments<A> of_sums = moments<A>(4 * H, [&](const auto& add) FASTSEQ_LAMBDA_INLINE {
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int q = 0; q < 4; ++q) add(vload(job.sums_at(panel, r) + q * kLanes<S>), H - panel * kLanes<S>);
    }
  });
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t unit = panel * kLanes<S>, units = H - unit;
    Vec<A> gates[4];
    for (int q = 0; q < 4; ++q) gates[q] = normalise(of_sums, vload(job.sums_at(panel, r) + q * kLanes<S>));
    if (p.normal) store_gates(gates, p.normal + position * 4 * H + unit, H, units);
    for (int q = 0; q < 4; ++q) gates[q] *= vload(p.norm_hh + q * H + unit, units);
    vstore(activate(job, r, position, unit, units, gates), job.row + panel * 2 * kLanes<S>);
    vstore(gates[3], job.row + (panel * 2 + 1) * kLanes<S>);
  }
  const Moments<A> of_c = moments<A>(H, [&](const auto& add) FASTSEQ_LAMBDA_INLINE {
    for (int64_t panel = 0; panel < panels; ++panel) add(vload(job.row + panel * 2 * kLanes<S>), H - panel * kLanes<S>);
  });
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t unit = panel * kLanes<S>, units = H - unit;
    const Vec<A> c = vload(job.row + panel * 2 * kLanes<S>), o = vload(job.row + (panel * 2 + 1) * kLanes<S>);
    const Vec<A> inner = fma(normalise(of_c, c), vload(p.norm_c + unit, units), vload(p.norm_c_bias + unit, units));
    finish_units(job, r, position, next, unit, units, c, o * vtanh(inner));
  }
  if (!p.statistics) return;
  A* const statistics = p.statistics + position * kStatistics;
  statistics[0] = of_sums.scale;
  statistics[1] = of_c.mean;
  statistics[2] = of_c.scale;
}

// Sets the states before the first step and clears rows past the end of every sequence.
template <class S>
void start_variant(const VariantForwardJob<S>& job) {
  const LstmVariantForwardParams<S>& p = job.p;
  const int64_t H = p.hidden, depth = padded_depth<S>(H);
  for (int64_t r = 0; r < job.block.rows(); ++r) {
    const int64_t b = job.block.sequence(r), length = job.block.length(r);
    const int64_t first = length > 0 ? job.block.position(r, 0) : -1;
    for (int64_t j = H; j < depth; ++j) job.operands[r * depth + j] = Operand<S>{};
    for (int64_t j = 0; j < H; j += kLanes<S>) {
      const Vec<Acc<S>> h = vload(p.h0 + b * H + j, H - j);
      vstore(h, job.h + r * H + j, H - j);
      vstore(vload(p.c0 + b * H + j, H - j), job.c + r * H + j, H - j);
      store_operand(job, r, first, j, H - j, h);
    }
    for (int64_t t = length; t < p.seq.steps; ++t) {
      const int64_t row = p.seq.offset[t] + b;
      fill_zero(p.output + row * H, H);
      if (p.cell_states) fill_zero(p.cell_states + row * H, H);
      if (p.operands) fill_zero(p.operands + row * H, H);
      if (p.normal) fill_zero(p.normal + row * 4 * H, 4 * H);
    }
  }
}

template <class S>
void lstm_variant_forward(const LstmVariantForwardParams<S>& p, int64_t block, void* scratch) {
  const FlushDenormals flush;
  const VariantForwardScratch<S> at(p);
  char* const bytes = static_cast<char*>(scratch);
  const VariantForwardJob<S> job{p,
                                 SequenceBlock{p.seq, p.reverse, block, p.blocks},
                                 reinterpret_cast<Acc<S>*>(bytes),
                                 reinterpret_cast<Acc<S>*>(bytes + at.c),
                                 reinterpret_cast<Acc<S>*>(bytes + at.sums),
                                 reinterpret_cast<Acc<S>*>(bytes + at.row),
                                 reinterpret_cast<Operand<S>*>(bytes + at.operands)};
  start_variant(job);
  int64_t running = job.block.rows();
  for (int64_t step = 0; (running = job.block.running(step, running)) > 0; ++step) {
    multiply_operands(job, running, step);
    for (int64_t r = 0; r < running; ++r) {
      const int64_t position = job.block.position(r, step);
      const int64_t next = step + 1 < job.block.length(r) ? job.block.position(r, step + 1) : -1;
      p.norm_hh ? normalised_row(job, r, position, next) : plain_row(job, r, position, next);
    }
  }
  for (int64_t r = 0; r < job.block.rows(); ++r) {
    const int64_t b = job.block.sequence(r), H = p.hidden;
    for (int64_t j = 0; j < H; j += kLanes<S>) {
      vstore(vload(job.h + r * H + j, H - j), p.h_n + b * H + j, H - j);
      vstore(vload(job.c + r * H + j, H - j), p.c_n + b * H + j, H - j);
    }
  }
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
