// Backpropagation through time of the LSTM variants over one block of sequences.
//
// Each step has two passes: row by row the gradients of the gates and of W_hh h, then the product of the latter with
// W_hh. The operator multiplies the gradient of W_hh over all steps.
#pragma once

#include <cstdint>

#include "cpu/isa/region.h"
#include "cpu/kernels/cell-inl.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/lstm_variant-inl.h"
#include "cpu/kernels/lstm_variant_params.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/vector-inl.h"
#include "cpu/runtime/sequences.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

template <class S>
struct VariantBackwardJob {
  const LstmVariantBackwardParams<S>& p;
  SequenceBlock block;
  Acc<S>*dh, *dc;        // (block rows, H)
  Acc<S>* sums;          // (block rows, 4 vectors)
  Acc<S>* row;           // (H rounded up to lanes, 5) of one row
  Operand<S>* operands;  // (block rows, depth of 4H) gradients of W_hh h; unless kDirect
};

// Offsets into the scratch memory of a block, in bytes.
template <class S>
struct VariantBackwardScratch {
  int64_t dc, sums, row, operands, end;

  explicit VariantBackwardScratch(const LstmVariantBackwardParams<S>& p) {
    const int64_t rows = SequenceBlock{p.seq, false, 0, p.blocks}.rows(), panels = panels_of<S>(p.hidden);
    const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    dc = aligned(rows * p.hidden * sizeof(Acc<S>));
    sums = dc + aligned(rows * p.hidden * sizeof(Acc<S>));
    row = sums + rows * 4 * kLanes<S> * sizeof(Acc<S>);
    operands = row + panels * 5 * kLanes<S> * sizeof(Acc<S>);
    end = operands + (kDirect<S> ? 0 : aligned(rows * padded_depth<S>(4 * p.hidden) * sizeof(Operand<S>)));
  }
};

template <class S>
int64_t variant_backward_bytes(const LstmVariantBackwardParams<S>& p) {
  return VariantBackwardScratch<S>(p).end;
}

// The states and gradients of kLanes units of a row before a step's backward. dh, dc: of the values before zoneout.
template <class S>
struct VariantUnits {
  Vec<Acc<S>> gates[4], c_prev, c, dh, dc;  // activations; c: before zoneout
};

// Loads the units of a row. Leaves in job.dh and in dc_kept the gradients that zoneout passes on to the old states.
template <class S>
FASTSEQ_INLINE VariantUnits<S> load_units(const VariantBackwardJob<S>& job,
                                          int64_t r,
                                          int64_t position,
                                          const Acc<S>* c_prev,  // (H,) after the step before, or null: c0
                                          int64_t unit,
                                          int64_t units,
                                          Vec<Acc<S>>& dc_kept) {
  const LstmVariantBackwardParams<S>& p = job.p;
  const int64_t H = p.hidden, at = position * H + unit;
  VariantUnits<S> u;
  load_gates(p.activations + position * 4 * H + unit, H, units, u.gates);
  u.c_prev = c_prev ? vload(c_prev + unit, units) : vload(p.c0 + job.block.sequence(r) * H + unit, units);
  u.c = fma(u.gates[1], u.c_prev, u.gates[0] * u.gates[2]);
  Acc<S>* const dh_state = job.dh + r * H + unit;
  Vec<Acc<S>> dh = vload(dh_state, units), dc = vload(job.dc + r * H + unit, units), dh_kept;
  if (p.grad_output) dh += vload(p.grad_output + at, units);
  if (p.grad_cell_states) dc += vload(p.grad_cell_states + at, units);
  u.dh = split_gradient(p.zoneout_h, at, units, dh, dh_kept);
  u.dc = split_gradient(p.zoneout_c, at, units, dc, dc_kept);
  vstore(dh_kept, dh_state, units);
  return u;
}

// Stores the gradients of W_hh h of a row, as operands of the product with W_hh.
template <class S>
FASTSEQ_INLINE void store_products(
    const VariantBackwardJob<S>& job, int64_t r, const Vec<Acc<S>> (&grads)[4], S* out, int64_t unit, int64_t units) {
  const int64_t H = job.p.hidden;
  store_gates(grads, out + unit, H, units);
  if constexpr (!kDirect<S>) {
    Operand<S>* const to = job.operands + r * padded_depth<S>(4 * H) + unit;
    for (int q = 0; q < 4; ++q) {
      if constexpr (sizeof(Operand<S>) == sizeof(S)) {
        vstore(grads[q], to + q * H, units);
      } else {
        vstore(vload(out + q * H + unit, units), to + q * H, units);  // rounded to S
      }
    }
  }
}

// A step's backward of one row without normalisation.
template <class S>
void plain_row_backward(const VariantBackwardJob<S>& job, int64_t r, int64_t position, const Acc<S>* c_prev) {
  const LstmVariantBackwardParams<S>& p = job.p;
  const int64_t H = p.hidden;
  for (int64_t unit = 0; unit < H; unit += kLanes<S>) {
    Vec<Acc<S>> dc_kept;
    VariantUnits<S> u = load_units(job, r, position, c_prev, unit, H - unit, dc_kept);
    cell_gradients<Acc<S>>(u.gates, u.c_prev, vtanh(u.c), u.dh, u.dc);
    vstore(u.dc + dc_kept, job.dc + r * H + unit, H - unit);
    store_products(job, r, u.gates, p.grad_gates + position * 4 * H, unit, H - unit);
  }
}

// Adds v to kLanes elements.
template <class A>
FASTSEQ_INLINE void add_to(A* sums, Vec<A> v, int64_t n) {
  vstore(vload(sums, n) + v, sums, n);
}

// Moments of c before zoneout. 16-bit activations give another c than the forward's, whose moments would not fit it: in
// a row of nearly equal c its gradient then has the wrong sign and grows from step to step.
template <class S>
Moments<Acc<S>> moments_of_c(const VariantBackwardJob<S>& job, int64_t r, int64_t position, const Acc<S>* c_prev) {
  using A = Acc<S>;
  const LstmVariantBackwardParams<S>& p = job.p;
  const int64_t H = p.hidden;
  const A* const statistics = p.statistics + position * kStatistics;
  if constexpr (sizeof(S) == sizeof(A)) return {statistics[1], statistics[2]};
  return moments<A>(H, [&](const auto& add) FASTSEQ_LAMBDA_INLINE {
    for (int64_t unit = 0; unit < H; unit += kLanes<S>) {
      const int64_t units = H - unit;
      Vec<A> gates[4];
      load_gates(p.activations + position * 4 * H + unit, H, units, gates);
      const Vec<A> before =
          c_prev ? vload(c_prev + unit, units) : vload(p.c0 + job.block.sequence(r) * H + unit, units);
      add(fma(gates[1], before, gates[0] * gates[2]), units);
    }
  });
}

// First pass of normalised_row_backward, through h = o tanh(LN(c) norm_c + norm_c_bias): stores per unit dL/d(LN(c)),
// dL/dc without it, the part of dL/dc that zoneout passes on, and dL/do before its sigmoid.
template <class S>
FASTSEQ_INLINE NormSums<Acc<S>> through_norm_c(const VariantBackwardJob<S>& job,
                                               int64_t r,
                                               int64_t position,
                                               const Acc<S>* c_prev,
                                               const Moments<Acc<S>>& of_c,
                                               Acc<S>* grad_norms) {
  using A = Acc<S>;
  const LstmVariantBackwardParams<S>& p = job.p;
  const int64_t H = p.hidden;
  const Vec<A> one = splat(A(1));
  NormSums<A> sums;
  for (int64_t unit = 0; unit < H; unit += kLanes<S>) {
    const int64_t units = H - unit;
    Vec<A> dc_kept;
    const VariantUnits<S> u = load_units(job, r, position, c_prev, unit, units, dc_kept);
    const Vec<A> gain = vload(p.norm_c + unit, units), normal = normalise(of_c, u.c), o = u.gates[3];
    const Vec<A> tanh_c = vtanh(fma(normal, gain, vload(p.norm_c_bias + unit, units)));
    const Vec<A> d_inner = u.dh * o * fnma(tanh_c, tanh_c, one);
    add_to(grad_norms + 4 * H + unit, d_inner * normal, units);
    add_to(grad_norms + 5 * H + unit, d_inner, units);
    sums.add(d_inner * gain, normal);
    A* const row = job.row + unit * 5;
    vstore(d_inner * gain, row);
    vstore(u.dc, row + kLanes<S>);
    vstore(dc_kept, row + 2 * kLanes<S>);
    vstore(u.dh * tanh_c * o * (one - o), row + 3 * kLanes<S>);
  }
  sums.divide(H);
  return sums;
}

// A step's backward of one row with both normalisations.
template <class S>
void normalised_row_backward(
    const VariantBackwardJob<S>& job, int64_t r, int64_t position, const Acc<S>* c_prev, Acc<S>* grad_norms) {
  using A = Acc<S>;
  const LstmVariantBackwardParams<S>& p = job.p;
  const int64_t H = p.hidden;
  const A* const statistics = p.statistics + position * kStatistics;
  const Moments<A> of_c = moments_of_c(job, r, position, c_prev);
  const NormSums<A> of_norm_c = through_norm_c(job, r, position, c_prev, of_c, grad_norms);
  const S* const normal_hh = p.normal + position * 4 * H;
  S* const grad_gates = p.grad_gates + position * 4 * H;
  const Vec<A> one = splat(A(1));
  NormSums<A> of_norm_hh;
  for (int64_t unit = 0; unit < H; unit += kLanes<S>) {
    const int64_t units = H - unit;
    A* const row = job.row + unit * 5;
    Vec<A> gates[4], normal[4];
    load_gates(p.activations + position * 4 * H + unit, H, units, gates);
    load_gates(normal_hh + unit, H, units, normal);
    const Vec<A> i = gates[0], f = gates[1], g = gates[2];
    const Vec<A> c_before =
        c_prev ? vload(c_prev + unit, units) : vload(p.c0 + job.block.sequence(r) * H + unit, units);
    const Vec<A> normal_c = normalise(of_c, fma(f, c_before, i * g));
    const Vec<A> dc = vload(row + kLanes<S>) + of_norm_c.before(of_c.scale, vload(row), normal_c);
    gates[0] = dc * g * i * (one - i);
    gates[1] = dc * c_before * f * (one - f);
    gates[2] = dc * i * fnma(g, g, one);
    gates[3] = vload(row + 3 * kLanes<S>);
    store_gates(gates, grad_gates + unit, H, units);
    vstore(fma(dc, f, vload(row + 2 * kLanes<S>)), job.dc + r * H + unit, units);
    for (int q = 0; q < 4; ++q) {
      add_to(grad_norms + q * H + unit, gates[q] * normal[q], units);
      gates[q] *= vload(p.norm_hh + q * H + unit, units);
      of_norm_hh.add(gates[q], normal[q]);
      vstore(gates[q], row + q * kLanes<S>);
    }
  }
  of_norm_hh.divide(4 * H);
  for (int64_t unit = 0; unit < H; unit += kLanes<S>) {
    Vec<A> grads[4], normal[4];
    load_gates(normal_hh + unit, H, H - unit, normal);
    for (int q = 0; q < 4; ++q) {
      grads[q] = of_norm_hh.before(statistics[0], vload(job.row + unit * 5 + q * kLanes<S>), normal[q]);
    }
    store_products(job, r, grads, p.grad_products + position * 4 * H, unit, H - unit);
  }
}

// Adds the gradient through W_hh, times the mask, to dh of the first `rows` rows.
template <class S>
void multiply_products(const VariantBackwardJob<S>& job, int64_t rows, int64_t step) {
  const LstmVariantBackwardParams<S>& p = job.p;
  constexpr int64_t kWidth = 4 * kLanes<S>;
  const int64_t H = p.hidden, depth = padded_depth<S>(4 * H), panels = (H + kWidth - 1) / kWidth;
  const Operand<S>* a[kBlockRows];
  for (int64_t r = 0; r < rows; ++r) {
    if constexpr (kDirect<S>) {
      a[r] = (p.grad_products ? p.grad_products : p.grad_gates) + job.block.position(r, step) * 4 * H;
    } else {
      a[r] = job.operands + r * depth;
    }
  }
  const auto panel_of = [&](int64_t k) { return step % 2 == 0 ? k : panels - 1 - k; };
  for (int64_t k = 0; k < panels; ++k) {
    const int64_t panel = panel_of(k), next = k + 1 < panels ? panel_of(k + 1) : panel;
    const auto finish = [&](int64_t first, int64_t count) FASTSEQ_NOINLINE {
      for (int64_t r = first; r < first + count; ++r) {
        for (int64_t j = 0, unit = panel * kWidth; j < kWidth && unit < H; j += kLanes<S>, unit += kLanes<S>) {
          Vec<Acc<S>> grad = vload(job.sums + r * kWidth + j);
          if (p.hidden_mask) grad *= vload(p.hidden_mask + job.block.sequence(r) * H + unit, H - unit);
          add_to(job.dh + r * H + unit, grad, H - unit);
        }
      }
    };
    multiply_block<S>(a, rows, panel_at<S>(p.packed_hh, panel, depth), depth, panel_at<S>(p.packed_hh, next, depth),
                      false, job.sums, finish);
  }
}

// Sets dh and dc after the last step, and clears the gradients past the end of every sequence.
template <class S>
void start_variant_backward(const VariantBackwardJob<S>& job) {
  const LstmVariantBackwardParams<S>& p = job.p;
  const int64_t H = p.hidden, depth = padded_depth<S>(4 * H);
  for (int64_t r = 0; r < job.block.rows(); ++r) {
    const int64_t b = job.block.sequence(r);
    for (int64_t j = 0; j < H; j += kLanes<S>) {
      const Vec<Acc<S>> zero{};
      vstore(p.grad_h_n ? vload(p.grad_h_n + b * H + j, H - j) : zero, job.dh + r * H + j, H - j);
      vstore(p.grad_c_n ? vload(p.grad_c_n + b * H + j, H - j) : zero, job.dc + r * H + j, H - j);
    }
    if constexpr (!kDirect<S>) {
      for (int64_t j = 4 * H; j < depth; ++j) job.operands[r * depth + j] = Operand<S>{};
    }
    for (int64_t t = job.block.length(r); t < p.seq.steps; ++t) {
      const int64_t row = (p.seq.offset[t] + b) * 4 * H;
      fill_zero(p.grad_gates + row, 4 * H);
      if (p.grad_products) fill_zero(p.grad_products + row, 4 * H);
    }
  }
}

template <class S>
void lstm_variant_backward(const LstmVariantBackwardParams<S>& p, int64_t block, void* scratch) {
  const FlushDenormals flush;
  const VariantBackwardScratch<S> at(p);
  char* const bytes = static_cast<char*>(scratch);
  const VariantBackwardJob<S> job{p,
                                  SequenceBlock{p.seq, p.reverse, block, p.blocks},
                                  reinterpret_cast<Acc<S>*>(bytes),
                                  reinterpret_cast<Acc<S>*>(bytes + at.dc),
                                  reinterpret_cast<Acc<S>*>(bytes + at.sums),
                                  reinterpret_cast<Acc<S>*>(bytes + at.row),
                                  reinterpret_cast<Operand<S>*>(bytes + at.operands)};
  const int64_t H = p.hidden, steps = job.block.rows() == 0 ? 0 : job.block.length(0);
  start_variant_backward(job);
  for (int64_t step = steps - 1; step >= 0; --step) {
    const int64_t running = job.block.running(step, job.block.rows());
    for (int64_t r = 0; r < running; ++r) {
      const int64_t position = job.block.position(r, step);
      const Acc<S>* const c_prev = step > 0 ? p.cell_states + job.block.position(r, step - 1) * H : nullptr;
      p.norm_hh ? normalised_row_backward(job, r, position, c_prev, p.grad_norms + block * 6 * H)
                : plain_row_backward(job, r, position, c_prev);
    }
    multiply_products(job, running, step);
  }
  for (int64_t r = 0; r < job.block.rows(); ++r) {
    const int64_t b = job.block.sequence(r);
    for (int64_t j = 0; j < H; j += kLanes<S>) {
      vstore(vload(job.dh + r * H + j, H - j), p.grad_h0 + b * H + j, H - j);
      vstore(vload(job.dc + r * H + j, H - j), p.grad_c0 + b * H + j, H - j);
    }
  }
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
