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

// Depth that is packed in one chunk: a strip of gate gradients and a panel of inputs stay in the L1 and L2 cache.
template <class S>
constexpr int64_t kDepthChunk = 256 * kPair<S>;

typedef uint32_t EightWords __attribute__((vector_size(32), may_alias));
FASTSEQ_INLINE EightWords eight_halves(const void* p) {
  typedef uint16_t Eight __attribute__((vector_size(16)));
  return __builtin_convertvector(load_bytes<Eight>(static_cast<const char*>(p)), EightWords);
}

// Packs ROWS columns of the gate gradients as a strip (K, ROWS), with paired depths in one lane. Also adds them to
// bias, unless it is null, in chunks short enough to lose no digits. Reads and writes up to eight columns, for which
// rows and strip have room.
template <class S, int ROWS>
FASTSEQ_INLINE void pack_strip(const Operand<S>* gates,  // (rows, stride), at the first of the columns
                               int64_t stride,
                               const int64_t* position,  // (K,) rows of gates
                               int64_t K,
                               Operand<S>* out,
                               Acc<S>* bias) {
  constexpr int64_t kBiasChunk = 16;
  typedef Acc<S> Eight __attribute__((vector_size(8 * sizeof(Acc<S>)), may_alias));
  for (int64_t begin = 0; begin < K; begin += kBiasChunk) {
    const int64_t end = K - begin < kBiasChunk ? K : begin + kBiasChunk;
    Eight sum{};
    for (int64_t k = begin; k < end; k += kPair<S>) {
      const Operand<S>* const row = gates + position[k] * stride;
      if constexpr (kPair<S> == 1) {
        const Eight columns = load_bytes<Eight>(row);
        std::memcpy(out + k * ROWS, &columns, sizeof columns);
        sum += columns;
      } else {
        const EightWords first = eight_halves(row);
        const EightWords second = k + 1 < K ? eight_halves(gates + position[k + 1] * stride) : EightWords{};
        const EightWords columns = first | (second << 16);
        std::memcpy(out + k * ROWS, &columns, sizeof columns);
        sum += (Eight)(first << 16) + (Eight)(second << 16);
      }
    }
    for (int r = 0; r < ROWS && bias; ++r) bias[r] += sum[r];
  }
}

// One tile of a weight gradient: sums (ROWS, 4 vectors) (+)= strip^T times one panel of columns.
template <class S, int ROWS>
FASTSEQ_INLINE void gradient_tile(const Operand<S>* strip,  // (K, ROWS)
                                  const Operand<S>* panel,  // (K, 4 vectors)
                                  int64_t K,                // padded, at most kDepthChunk<S>
                                  bool first,               // overwrite sums instead of adding
                                  Acc<S>* sums,
                                  int64_t stride,
                                  int64_t columns) {
  constexpr int64_t kWidth = 4 * kLanes<S> * kPair<S>;
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < 4; ++v) __builtin_prefetch(sums + r * stride + v * kLanes<S>, 1);
  }
  Vec<Acc<S>> total[ROWS][4] = {};
  for (int64_t begin = 0; begin < K; begin += kAccumulationChunk * kPair<S>) {
    const int64_t end = K - begin > kAccumulationChunk * kPair<S> ? begin + kAccumulationChunk * kPair<S> : K;
    Vec<Acc<S>> sum[ROWS][4] = {};
    for (int64_t k = begin; k < end; k += kPair<S>, panel += kWidth) {
      Vec<Acc<S>> w[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) w[v] = load_bytes<Vec<Acc<S>>>(panel + v * (kWidth / 4));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) multiply_add<S>(strip + k * ROWS + r * kPair<S>, w[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) total[r][v] += sum[r][v];
    }
  }
#pragma GCC unroll 1
  for (int r = 0; r < ROWS; ++r) {
    for (int64_t v = 0; v < 4 && v * kLanes<S> < columns; ++v) {
      Acc<S>* const at = sums + r * stride + v * kLanes<S>;
      const int64_t n = columns - v * kLanes<S>;
      vstore(first ? total[r][v] : vload(at, n) + total[r][v], at, n);
    }
  }
}

// One factor of a weight gradient: a matrix (inputs or hidden states), and the gradient of the weight it multiplied.
template <class S, class T>
struct Factor {
  const T* rows;         // (any, columns)
  const int64_t* index;  // (depth,) row of each depth
  int64_t columns;
  Acc<S>* sums;  // (4H, columns)

  int64_t panels() const { return (columns + 4 * kLanes<S> - 1) / (4 * kLanes<S>); }
};

template <class S>
constexpr int64_t kStripBytes = kDepthChunk<S> * kTileRows * sizeof(Operand<S>) + 64;

// Panels of inputs and states that all strips are multiplied with before the next are packed: half of a small L2 cache.
constexpr int64_t kPanelsPerPass = 8;

// Panels [begin, end) of a factor.
struct PanelRange {
  int64_t begin, end;

  // The panels of a pass that starts `first` panels into a factor of `panels` panels. first may be negative.
  static PanelRange part(int64_t first, int64_t panels) {
    const int64_t last = first + kPanelsPerPass;
    return {first < 0 ? 0 : first, last < panels ? last : panels};
  }
};

template <class S, class T>
FASTSEQ_INLINE Operand<S>* pack_factor(
    const Factor<S, T>& f, PanelRange range, int64_t begin, int64_t K, Operand<S>* out) {
  const auto row = [&](int64_t k) { return f.rows + f.index[begin + k] * f.columns; };
  for (int64_t panel = range.begin; panel < range.end; ++panel, out += 4 * kLanes<S> * padded_depth<S>(K)) {
    pack_columns<S>(row, K, f.columns, panel, out);
  }
  return out;
}

template <class S, int ROWS, class T>
FASTSEQ_INLINE const Operand<S>* gradient_row(const Factor<S, T>& f,
                                              PanelRange range,
                                              const Operand<S>* strip,
                                              const Operand<S>* panel,
                                              int64_t K,
                                              bool first,
                                              int64_t gate) {
  for (int64_t p = range.begin; p < range.end; ++p, panel += 4 * kLanes<S> * K) {
    const int64_t column = p * 4 * kLanes<S>;
    gradient_tile<S, ROWS>(strip, panel, K, first, f.sums + gate * f.columns + column, f.columns, f.columns - column);
  }
  return panel;
}

template <class S>
int64_t weight_gradient_bytes(const LstmBackwardParams<S>& p) {
  const int64_t panels = kPanelsPerPass * 4 * kLanes<S> * kDepthChunk<S> * sizeof(Operand<S>);
  return kStripBytes<S> + 4 * p.hidden * sizeof(Acc<S>) + panels;
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
  const Factor<S, S> inputs{p.input, valid.position, p.input_size, d.sums_ih};
  const Factor<S, Operand<S>> states{static_cast<const Operand<S>*>(d.hidden_states), valid.previous[direction],
                                     p.hidden, d.sums_hh};
  auto* const strip = static_cast<Operand<S>*>(scratch);
  auto* const bias = reinterpret_cast<Acc<S>*>(static_cast<char*>(scratch) + kStripBytes<S>);
  auto* const panels = reinterpret_cast<Operand<S>*>(bias + 4 * p.hidden);
  for (int64_t gate = begin; gate < end; ++gate) bias[gate] = 0;
  int64_t k = 0;
  do {  // runs once even without valid rows, to set the gradients to 0
    const int64_t K = valid.count - k < kDepthChunk<S> ? valid.count - k : kDepthChunk<S>, depth = padded_depth<S>(K);
    for (int64_t pass = 0; pass < inputs.panels() + states.panels(); pass += kPanelsPerPass) {
      const PanelRange input_panels = PanelRange::part(pass, inputs.panels());
      const PanelRange state_panels = PanelRange::part(pass - inputs.panels(), states.panels());
      pack_factor(states, state_panels, k, K, pack_factor(inputs, input_panels, k, K, panels));
      const auto tile = [&](auto height, int64_t first) FASTSEQ_NOINLINE {
        constexpr int ROWS = decltype(height)::count;
        const int64_t gate = begin + first;
        pack_strip<S, ROWS>(static_cast<const Operand<S>*>(d.grad_gates) + gate, p.gates_stride, valid.position + k, K,
                            strip, pass == 0 ? bias + gate : nullptr);
        const auto* next = gradient_row<S, ROWS>(inputs, input_panels, strip, panels, depth, k == 0, gate);
        gradient_row<S, ROWS>(states, state_panels, strip, next, depth, k == 0, gate);
      };
      for_each_tile(end - begin, tile);
    }
    k += kDepthChunk<S>;
  } while (k < valid.count);
  for (int64_t gate = begin; gate < end; ++gate) store(bias[gate], d.grad_bias + gate);
}

// grad_input = gate gradients of all directions times W_ih, for valid rows [begin, end) and one panel of columns.
template <class S>
void lstm_input_gradients(
    const LstmBackwardParams<S>& p, const ValidRows& valid, int64_t panel, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t I = p.input_size, depth = padded_depth<S>(4 * p.hidden), column = panel * 4 * kLanes<S>;
  const int64_t panels = (I + 4 * kLanes<S> - 1) / (4 * kLanes<S>);
  Acc<S> sums[kInputGradientRows * 4 * kLanes<S>];
  const Operand<S>* rows[kInputGradientRows];
  for (int64_t direction = 0; direction < p.directions; ++direction) {
    const LstmBackwardDirection<S>& d = p.direction[direction];
    const auto* gates = static_cast<const Operand<S>*>(d.grad_gates);
    for (int64_t r = begin; r < end; ++r) rows[r - begin] = gates + valid.position[r] * p.gates_stride;
    const Operand<S>* const next = panel_at<S>(d.packed_ih, (panel + 1) % panels, depth);
    multiply_deep<S>(rows, end - begin, panel_at<S>(d.packed_ih, panel, depth), depth, next, direction > 0, sums);
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
