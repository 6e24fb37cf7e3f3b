// Gradients of weights and inputs from the gate gradients: products over all steps of all sequences.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/vector-inl.h"
#include "cpu/runtime/sequences.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Depth of one chunk: the sums in memory are read and written once for each.
template <class S>
constexpr int64_t kDepthChunk = kGradientChunk * kPair<S>;

// Rows of a weight gradient that are computed with one panel before the next is read.
constexpr int64_t kGradientRows = 48;

// One vector of gate gradients at depth k, with paired depths in one lane. Reads up to 64 bytes, for which rows of the
// gates have room.
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> load_depth(const Operand<S>* gates, int64_t stride, const int64_t* position, bool paired) {
  if constexpr (kPair<S> == 1) {
    return vload(gates + position[0] * stride);
  } else {
    const VWord first = __builtin_convertvector(load_bytes<VShort>(gates + position[0] * stride), VWord);
    if (!paired) return (Vec<Acc<S>>)first;
    const VWord second = __builtin_convertvector(load_bytes<VShort>(gates + position[1] * stride), VWord);
    return (Vec<Acc<S>>)(first | (second << 16));
  }
}

// Sum of the depths in one vector of load_depth.
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> add_pair(Vec<Acc<S>> lanes) {
  if constexpr (kPair<S> == 1) {
    return lanes;
  } else {
    return (VFloat)((VWord)lanes << 16) + (VFloat)((VWord)lanes & 0xffff0000u);
  }
}

// Transposes `count` columns of the gate gradients: row r of `out` holds column r at all K depths, padded with zeros to
// whole vectors. Also adds them to bias, in sums short enough to lose no digits.
template <class S>
void transpose_gates(const Operand<S>* gates,  // (any, stride), at the first column
                     int64_t stride,
                     const int64_t* position,  // (K,) rows of gates
                     int64_t K,
                     int64_t count,
                     Operand<S>* out,  // (count, kDepthChunk)
                     Acc<S>* bias) {   // (count,)
  constexpr int64_t kStep = kLanes<S> * kPair<S>;
  for (int64_t column = 0; column < count; column += kLanes<S>) {
    const int64_t columns = count - column < kLanes<S> ? count - column : kLanes<S>;
    Vec<Acc<S>> total{};
    for (int64_t begin = 0; begin < K; begin += kStep) {
      Vec<Acc<S>> square[kLanes<S>], sum{};
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<S>; ++i) {
        const int64_t k = begin + i * kPair<S>;
        square[i] = k < K ? load_depth<S>(gates + column, stride, position + k, k + 1 < K) : Vec<Acc<S>>{};
        sum += add_pair<S>(square[i]);
      }
      total += sum;
      transpose<kLanes<S> / 2>(square);
      for (int64_t r = 0; r < columns; ++r) {
        std::memcpy(out + (column + r) * kDepthChunk<S> + begin, &square[r], sizeof square[r]);
      }
    }
    vstore(vload(bias + column, columns) + total, bias + column, columns);
  }
}

// One factor of a weight gradient: a matrix (inputs, hidden states or o tanh(c)), and the gradient of the weight it
// multiplied, with N rows: 4H, or P of the projection.
template <class S, class T>
struct Factor {
  const T* rows;         // (any, columns)
  const int64_t* index;  // (depth,) row of each depth
  int64_t columns;
  S* grad;       // (N, columns)
  Acc<S>* sums;  // (N, columns) of all chunks but the last: wider than grad, or grad itself

  int64_t panels() const { return (columns + 4 * kLanes<S> - 1) / (4 * kLanes<S>); }
};

// Packs depths [begin, begin + K) of all panels of a factor. Returns the end of the panels.
template <class S, class T>
FASTSEQ_INLINE Operand<S>* pack_factor(const Factor<S, T>& f, int64_t begin, int64_t K, Operand<S>* out) {
  const auto row = [&](int64_t k) { return f.rows + f.index[begin + k] * f.columns; };
  for (int64_t panel = 0; panel < f.panels(); ++panel, out += 4 * kLanes<S> * padded_depth<S>(K)) {
    pack_columns<S>(row, K, f.columns, panel, out);
  }
  return out;
}

// Rows [gate, gate + count) of the gradient of one weight (+)= gates times the panels of its factor, rounded once,
// after the last chunk. Returns the end of the panels.
template <class S, class T>
FASTSEQ_INLINE const Operand<S>* gradient_rows(const Factor<S, T>& f,
                                               const Operand<S>* const* gates,  // (count) rows of K elements
                                               int64_t gate,
                                               int64_t count,
                                               const Operand<S>* panels,
                                               int64_t K,  // padded
                                               bool add,   // to the sums of the chunks before
                                               bool last) {
  constexpr int64_t kWidth = 4 * kLanes<S>;
  alignas(64) Acc<S> sums[kGradientRows * kWidth];
  for (int64_t column = 0; column < f.columns; column += kWidth, panels += kWidth * K) {
    const auto finish = [&](int64_t first, int64_t rows) FASTSEQ_NOINLINE {
      for (int64_t r = first; r < first + rows; ++r) {
        for (int64_t j = 0; j < kWidth && column + j < f.columns; j += kLanes<S>) {
          const int64_t at = (gate + r) * f.columns + column + j, n = f.columns - column - j;
          Vec<Acc<S>> sum = vload(sums + r * kWidth + j);
          if (add) sum += vload(f.sums + at, n);
          last ? vstore(sum, f.grad + at, n) : vstore(sum, f.sums + at, n);
        }
      }
    };
    multiply_block<S>(gates, count, panels, K, panels + kWidth * K, false, sums, finish);
  }
  return panels;
}

// Offsets into the scratch memory of lstm_weight_gradients and lstm_projection_gradients, in bytes.
template <class S>
struct GradientScratch {
  int64_t bias, panels, end;

  explicit GradientScratch(const LstmBackwardParams<S>& p) {
    const int64_t width = 4 * kLanes<S>, depth = kDepthChunk<S> < p.seq.rows ? kDepthChunk<S> : p.seq.rows;
    const int64_t gates = 4 * p.hidden, rows = gates > p.outputs ? gates : p.outputs;
    const int64_t inputs = p.input_size + p.outputs, factors = inputs > p.hidden ? inputs : p.hidden;
    const int64_t columns = factors + 2 * width;  // each factor ends with a whole panel
    bias = kGradientRows * kDepthChunk<S> * sizeof(Operand<S>);
    panels = bias + (rows * sizeof(Acc<S>) + 63) / 64 * 64;
    end = panels + columns * padded_depth<S>(depth) * sizeof(Operand<S>);
  }
};

template <class S>
int64_t weight_gradient_bytes(const LstmBackwardParams<S>& p) {
  return GradientScratch<S>(p).end;
}

// Rows [begin, end) of the gradients of the weights that multiplied `factors`. Returns the sums of the columns of the
// gradients, which `scratch` holds: the gradient of the bias.
template <class S, class... F>
FASTSEQ_INLINE const Acc<S>* multiply_factors(const LstmBackwardParams<S>& p,
                                              const void* gradients,  // (any, stride) of the products' results
                                              int64_t stride,
                                              const ValidRows& valid,
                                              int64_t begin,
                                              int64_t end,
                                              void* scratch,  // weight_gradient_bytes
                                              const F&... factors) {
  const GradientScratch<S> at(p);
  auto* const transposed = static_cast<Operand<S>*>(scratch);
  auto* const bias = reinterpret_cast<Acc<S>*>(static_cast<char*>(scratch) + at.bias);
  auto* const panels = reinterpret_cast<Operand<S>*>(static_cast<char*>(scratch) + at.panels);
  const Operand<S>* rows[kGradientRows];
  for (int64_t r = 0; r < kGradientRows; ++r) rows[r] = transposed + r * kDepthChunk<S>;
  for (int64_t gate = begin; gate < end; ++gate) bias[gate] = 0;
  int64_t k = 0;
  do {  // runs once even without valid rows, to set the gradients to 0
    const int64_t K = valid.count - k < kDepthChunk<S> ? valid.count - k : kDepthChunk<S>, depth = padded_depth<S>(K);
    const bool add = k > 0, last = k + K == valid.count;
    Operand<S>* packed = panels;
    ((packed = pack_factor(factors, k, K, packed)), ...);
    for (int64_t gate = begin; gate < end; gate += kGradientRows) {
      const int64_t count = end - gate < kGradientRows ? end - gate : kGradientRows;
      transpose_gates<S>(static_cast<const Operand<S>*>(gradients) + gate, stride, valid.position + k, K, count,
                         transposed, bias + gate);
      const Operand<S>* next = panels;
      ((next = gradient_rows(factors, rows, gate, count, next, depth, add, last)), ...);
    }
    k += kDepthChunk<S>;
  } while (k < valid.count);
  return bias;
}

// Rows [begin, end), of 4H, of the gradients of W_ih, W_hh and the bias of one direction.
template <class S>
void lstm_weight_gradients(const LstmBackwardParams<S>& p,
                           int64_t direction,
                           const ValidRows& valid,
                           int64_t begin,
                           int64_t end,
                           void* scratch) {  // weight_gradient_bytes
  const FlushDenormals flush;
  const LstmBackwardDirection<S>& d = p.direction[direction];
  const Factor<S, S> inputs{p.input, valid.position, p.input_size, d.grad_ih, d.sums_ih};
  const Factor<S, Operand<S>> states{static_cast<const Operand<S>*>(d.hidden_states), valid.previous[direction],
                                     p.outputs, d.grad_hh, d.sums_hh};
  const Acc<S>* const bias =
      multiply_factors(p, d.grad_gates, p.gates_stride, valid, begin, end, scratch, inputs, states);
  for (int64_t gate = begin; gate < end; ++gate) store(bias[gate], d.grad_bias + gate);
}

// Rows [begin, end), of P, of the gradient of W_hr of one direction.
template <class S>
void lstm_projection_gradients(const LstmBackwardParams<S>& p,
                               int64_t direction,
                               const ValidRows& valid,
                               int64_t begin,
                               int64_t end,
                               void* scratch) {  // weight_gradient_bytes
  const FlushDenormals flush;
  const LstmBackwardDirection<S>& d = p.direction[direction];
  const Factor<S, Operand<S>> cells{static_cast<const Operand<S>*>(d.unprojected), valid.position, p.hidden, d.grad_hr,
                                    d.sums_hr};
  multiply_factors(p, d.grad_hidden, p.hidden_stride, valid, begin, end, scratch, cells);
}

// Sum of products over depths [0, K).
template <class S>
FASTSEQ_INLINE S dot_lanes(const S* a, const S* b, int64_t K) {
  Vec<S> sum{}, second{};
  int64_t k = 0;
  for (; k + 2 * kLanes<S> <= K; k += 2 * kLanes<S>) {
    sum = fma(vload(a + k), vload(b + k), sum);
    second = fma(vload(a + k + kLanes<S>), vload(b + k + kLanes<S>), second);
  }
  for (; k < K; k += kLanes<S>) sum = fma(vload(a + k, K - k), vload(b + k, K - k), sum);
  return sum_lanes(Vec<S>(sum + second));
}

// lstm_input_gradients where W_ih is_one_row: a panel would compute 4 * lanes columns of which one exists, and round a
// single sum 4H times.
template <class S>
FASTSEQ_INLINE void one_column_gradients(const LstmBackwardParams<S>& p,
                                         const ValidRows& valid,
                                         int64_t begin,
                                         int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    S sum = 0;
    for (int64_t direction = 0; direction < p.directions; ++direction) {
      const LstmBackwardDirection<S>& d = p.direction[direction];
      const auto* const gates = static_cast<const S*>(d.grad_gates) + valid.position[r] * p.gates_stride;
      sum += dot_lanes(gates, d.weight_ih, 4 * p.hidden);
    }
    p.grad_input[valid.position[r]] = sum;
  }
}

// grad_input = gate gradients of all directions times W_ih, for valid rows [begin, end) and one panel of columns.
template <class S>
void lstm_input_gradients(
    const LstmBackwardParams<S>& p, const ValidRows& valid, int64_t panel, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  if constexpr (kIsSummedInPlace<S>) {
    if (is_one_row<S>(p.input_size)) return one_column_gradients(p, valid, begin, end);
  }
  const int64_t I = p.input_size, depth = padded_depth<S>(4 * p.hidden), column = panel * 4 * kLanes<S>;
  const int64_t panels = (I + 4 * kLanes<S> - 1) / (4 * kLanes<S>);
  alignas(64) Acc<S> sums[kInputGradientRows * 4 * kLanes<S>];
  const Operand<S>* rows[kInputGradientRows];
  for (int64_t direction = 0; direction < p.directions; ++direction) {
    const LstmBackwardDirection<S>& d = p.direction[direction];
    const auto* gates = static_cast<const Operand<S>*>(d.grad_gates);
    for (int64_t r = begin; r < end; ++r) rows[r - begin] = gates + valid.position[r] * p.gates_stride;
    multiply_block<S>(rows, end - begin, panel_at<S>(d.packed_ih, panel, depth), depth,
                      panel_at<S>(d.packed_ih, (panel + 1) % panels, depth), direction > 0, sums);
  }
  for (int64_t r = begin; r < end; ++r) {
    const Acc<S>* const from = sums + (r - begin) * 4 * kLanes<S>;
    S* const to = p.grad_input + valid.position[r] * I + column;
    for (int64_t j = 0; j < 4 * kLanes<S> && column + j < I; j += kLanes<S>) {
      vstore(vload(from + j), to + j, I - column - j);
    }
  }
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
