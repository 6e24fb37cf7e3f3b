// Kernels of one LSTM step: the pointwise cell, forward and backward, and the whole step with its products.
#pragma once

#include <cstdint>

#include "cpu/isa/region.h"
#include "cpu/kernels/cell-inl.h"
#include "cpu/kernels/dot-inl.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/lstm_cell_params.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Rows [begin, end) of the batch.
template <class S>
void cell_forward(const LstmCellForwardParams<S>& p, int64_t begin, int64_t end) {
  const int64_t H = p.hidden;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t j = 0, n = H; j < H; j += kLanes<S>, n -= kLanes<S>) {
      Vec<Acc<S>> gates[4], c = vload(p.c + b * H + j, n);
      load_gates(p.gates + b * 4 * H + j, H, n, gates);
      const Vec<Acc<S>> h = cell_update<Acc<S>>(gates, c);
      vstore(c, p.c_n + b * H + j, n);
      vstore(h, p.h + b * H + j, n);
      store_gates(gates, p.activations + b * 4 * H + j, H, n);
    }
  }
}

// Rows [begin, end) of the batch.
template <class S>
void cell_backward(const LstmCellBackwardParams<S>& p, int64_t begin, int64_t end) {
  using V = Vec<Acc<S>>;
  const int64_t H = p.hidden;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t j = 0, n = H, at = b * H; j < H; j += kLanes<S>, n -= kLanes<S>, at += kLanes<S>) {
      V gates[4], dc = p.grad_c_n ? vload(p.grad_c_n + at, n) : V{};
      load_gates(p.activations + b * 4 * H + j, H, n, gates);
      const V dh = p.grad_h ? vload(p.grad_h + at, n) : V{};
      cell_gradients<Acc<S>>(gates, vload(p.c + at, n), vtanh(vload(p.c_n + at, n)), dh, dc);
      store_gates(gates, p.grad_gates + b * 4 * H + j, H, n);
      vstore(dc, p.grad_c + at, n);
    }
  }
}

// The step of ROWS rows from `first` on, for the hidden units of one panel. x, h: (B) rows of operands.
template <class S, int ROWS, class W>
FASTSEQ_INLINE void step_tile(
    const LstmStepParams<S>& p, const Operand<S>* const* x, const Operand<S>* const* h, int64_t first, int64_t panel) {
  const int64_t H = p.hidden, unit = panel * kLanes<S>, n = H - unit < kLanes<S> ? H - unit : kLanes<S>;
  Vec<Acc<S>> gates[ROWS][4] = {}, recurrent[ROWS][4] = {};
  multiply_rows<S, ROWS>(x + first, static_cast<const W*>(p.weight_ih), H, p.input_size, unit, n, gates);
  multiply_rows<S, ROWS>(h + first, static_cast<const W*>(p.weight_hh), H, H, unit, n, recurrent);
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t q = 0; q < 4; ++q) {
      if (p.bias_ih) gates[r][q] += vload(p.bias_ih + (first + r) * p.bias_stride + q * H + unit, n);
      if (p.bias_hh) recurrent[r][q] += vload(p.bias_hh + q * H + unit, n);
      gates[r][q] += recurrent[r][q];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const int64_t at = (first + r) * H + unit;
    Vec<Acc<S>> c = vload(p.c + at, n);
    const Vec<Acc<S>> h = cell_update<Acc<S>>(gates[r], c);
    vstore(c, p.c_n + at, n);
    vstore(h, p.h_n + at, n);
  }
}

template <class S, class W>
FASTSEQ_INLINE void step_panels(const LstmStepParams<S>& p, const Operand<S>* const* rows, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    for_each_tile<kDotRows>(p.batch, [&](auto height, int64_t first) FASTSEQ_NOINLINE {
      step_tile<S, decltype(height)::count, W>(p, rows, rows + p.batch, first, panel);
    });
  }
}

// Panels [begin, end) of kLanes hidden units. pointers: (2B,) scratch for the rows of input and h. scratch: (B, depth
// of I) and (B, depth of H) operands, used if tensors cannot be read in place.
template <class S>
void cell_step(const LstmStepParams<S>& p, int64_t begin, int64_t end, const void** pointers, void* scratch) {
  const FlushDenormals flush;
  const auto rows = reinterpret_cast<const Operand<S>**>(pointers);
  auto* next = static_cast<Operand<S>*>(scratch);
  for (int64_t i = 0; i < 2 * p.batch; ++i) {
    const int64_t b = i % p.batch, width = i < p.batch ? p.input_size : p.hidden;
    const S* const row = (i < p.batch ? p.input : p.h) + b * width;
    if constexpr (kDirect<S>) {
      rows[i] = row;
    } else {
      const int64_t depth = padded_depth<S>(width);
      convert_row(row, width, depth, next);
      rows[i] = next;
      next += depth;
    }
  }
  if constexpr (sizeof(S) == sizeof(float)) {
    if (p.narrow) return step_panels<S, BFloat16>(p, rows, begin, end);
  }
  step_panels<S, S>(p, rows, begin, end);
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
