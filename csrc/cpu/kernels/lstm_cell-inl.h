// Kernels of one step: the pointwise LSTM cell, forward and backward, the whole cell with its products, and a linear
// layer.
#pragma once

#include <cstdint>

#include "cpu/isa/region.h"
#include "cpu/kernels/cell-inl.h"
#include "cpu/kernels/dot-inl.h"
#include "cpu/kernels/dot_int8-inl.h"
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

// One factor of a step: its rows (B), and the same quantised.
template <class S>
struct StepFactor {
  const Operand<S>* const* rows;
  IntegerRows integers;
};

// The step of ROWS rows from `first` on, for the hidden units of one panel.
template <class S, int ROWS>
FASTSEQ_INLINE void step_tile(
    const LstmStepParams<S>& p, const StepFactor<S>& x, const StepFactor<S>& h, int64_t first, int64_t panel) {
  const int64_t H = p.hidden, I = p.input_size;
  const int64_t unit = panel * kLanes<S>, n = H - unit < kLanes<S> ? H - unit : kLanes<S>;
  Vec<Acc<S>> gates[ROWS][4], recurrent[ROWS][4];
  multiply_gate_rows<S, ROWS>(x.rows + first, x.integers.from(first, I), p.weight_ih, H, I, unit, n, gates);
  multiply_gate_rows<S, ROWS>(h.rows + first, h.integers.from(first, H), p.weight_hh, H, H, unit, n, recurrent);
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

// Scratch bytes of cell_step: pointers to rows, operands, quantised rows and their scales.
template <class S>
int64_t cell_step_bytes(const LstmStepParams<S>& p) {
  const int64_t columns = padded_depth<S>(p.input_size) + padded_depth<S>(p.hidden);
  const int64_t operands = kDirect<S> ? 0 : columns * sizeof(Operand<S>);
  const int64_t integers = integer_stride(p.input_size) + integer_stride(p.hidden);
  return p.batch * (2 * sizeof(void*) + operands + 2 * sizeof(float) + integers * sizeof(int16_t));
}

// Panels [begin, end) of kLanes hidden units.
template <class S>
void cell_step(const LstmStepParams<S>& p, int64_t begin, int64_t end, void* scratch) {  // cell_step_bytes
  const FlushDenormals flush;
  const auto rows = static_cast<const Operand<S>**>(scratch);
  auto* next = reinterpret_cast<Operand<S>*>(rows + 2 * p.batch);
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
  auto* const scale = reinterpret_cast<float*>(next);
  auto* const integers = reinterpret_cast<int16_t*>(scale + 2 * p.batch);
  const StepFactor<S> x{rows, quantize_rows<S>(p.weight_ih, rows, p.batch, p.input_size, integers, scale)};
  const StepFactor<S> h{rows + p.batch,
                        quantize_rows<S>(p.weight_hh, rows + p.batch, p.batch, p.hidden,
                                         integers + p.batch * integer_stride(p.input_size), scale + p.batch)};
  for (int64_t panel = begin; panel < end; ++panel) {
    for_each_tile<kDotRows>(p.batch, [&](auto height, int64_t first) FASTSEQ_NOINLINE {
      step_tile<S, decltype(height)::count>(p, x, h, first, panel);
    });
  }
}

template <class S>
int64_t linear_bytes(const LinearParams<S>& p) {
  return p.batch * (sizeof(void*) + sizeof(float) + integer_stride(p.input_size) * sizeof(int16_t));
}

// Outputs of vectors [begin, end) of kLanes columns. For types whose tensors are read in place.
template <class S>
void linear_rows(const LinearParams<S>& p, int64_t begin, int64_t end, void* scratch) {  // linear_bytes
  if constexpr (kDirect<S>) {
    const FlushDenormals flush;
    const int64_t K = p.input_size, N = p.output_size;
    const auto rows = static_cast<const S**>(scratch);
    for (int64_t b = 0; b < p.batch; ++b) rows[b] = p.input + b * K;
    auto* const scale = reinterpret_cast<float*>(rows + p.batch);
    auto* const values = reinterpret_cast<int16_t*>(scale + p.batch);
    const IntegerRows integers = quantize_rows<S>(p.weight, rows, p.batch, K, values, scale);
    for (int64_t column = begin * kLanes<S>; column < end * kLanes<S> && column < N; column += kLanes<S>) {
      const int64_t n = N - column < kLanes<S> ? N - column : kLanes<S>;
      const Vec<Acc<S>> bias = p.bias ? vload(p.bias + column, n) : Vec<Acc<S>>{};
      for_each_tile<kDotRows>(p.batch, [&](auto height, int64_t first) FASTSEQ_NOINLINE {
        constexpr int ROWS = decltype(height)::count;
        Vec<Acc<S>> result[ROWS];
        multiply_weight<S, ROWS>(rows + first, integers.from(first, K), p.weight, K, column, n, result);
        for (int r = 0; r < ROWS; ++r) vstore(result[r] + bias, p.output + (first + r) * N + column, n);
      });
    }
  }
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
