// The cell of the backward grid recurrence: reads and writes of one unit of one row in a step.
#pragma once

#include "cuda/lstm/grid_backward_exchange.cuh"

namespace fastseq::cuda::grid_backward {

// Inputs of the cell's backward for one unit of one row, not converted yet: a conversion waits for its load.
template <class T>
struct CellInputs {
  bool valid;   // the step exists and is within the row's length
  bool narrow;  // the cell state before the step is in c0, not converted, and not in c_prev
  T gates[4], c0, dh, dc;
  float c_prev, c;
};

// Loads lengths, and the gradients of the final states into `carry`.
template <class Product, int R>
FASTSEQ_DEVICE void load_states(const Block<Product, R>& block) {
  using T = typename Product::Element;
  constexpr int kBlockUnits = Block<Product, R>::kBlockUnits;
  const LstmBackwardParams& p = block.p;
  for (int row = threadIdx.x; row < block.rows; row += blockDim.x) {
    const int64_t* all = p.shape.lengths;
    block.lengths[row] = static_cast<int>(all ? min(all[block.first_row + row], p.shape.steps) : p.shape.steps);
  }
  for (int item = threadIdx.x; item < block.tiles * kTileRows * kBlockUnits; item += blockDim.x) {
    const int row = item / kBlockUnits, unit = item % kBlockUnits;
    if (!block.exists(row, unit)) continue;
    const int64_t at = block.state_at(row, unit);
    const bool wide = p.shape.wide_states;
    block.carry[item] = {p.grad_h_n ? load_state<T>(p.grad_h_n, at, wide) : 0.0f,
                         p.grad_c_n ? load_state<T>(p.grad_c_n, at, wide) : 0.0f};
  }
}

template <class Product, int R>
FASTSEQ_DEVICE CellInputs<typename Product::Element> read_cell(const Block<Product, R>& block,
                                                               int row,
                                                               int unit,
                                                               int step) {
  using T = typename Product::Element;
  const LstmBackwardParams& p = block.p;
  CellInputs<T> x{};
  const int time = block.time_of(step);
  x.valid = step < p.shape.steps && block.exists(row, unit) && time < block.lengths[row];
  if (!x.valid) return x;
  const int64_t H = p.shape.hidden, at = block.step_at(time, row, unit);
  const T* activations = static_cast<const T*>(p.activations) + at * 4 - 3 * (block.first_unit + unit);
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) x.gates[gate] = activations[gate * H];
  x.c = p.cell_states[at];
  const bool first = time == (block.backwards ? block.lengths[row] - 1 : 0);
  x.narrow = first && sizeof(T) == 2 && !p.shape.wide_states;
  if (x.narrow) {
    x.c0 = static_cast<const T*>(p.c0)[block.state_at(row, unit)];
  } else if (first) {
    x.c_prev = static_cast<const float*>(p.c0)[block.state_at(row, unit)];
  } else {
    x.c_prev = p.cell_states[block.step_at(time + (block.backwards ? 1 : -1), row, unit)];
  }
  if (p.grad_output) x.dh = static_cast<const T*>(p.grad_output)[at];
  if (p.grad_cell_states) x.dc = static_cast<const T*>(p.grad_cell_states)[at];
  return x;
}

// Computes the dgates of one unit of one row and stores them in the exchange for the next step. dh: the product,
// dL/dh_t through later steps.
template <class Product, int R>
FASTSEQ_DEVICE Vector<typename Product::Element, 4> step_cell(const Block<Product, R>& block,
                                                              int row,
                                                              int unit,
                                                              int step,
                                                              const CellInputs<typename Product::Element>& x,
                                                              float dh) {
  using T = typename Product::Element;
  float2& kept = block.carry[row * Block<Product, R>::kBlockUnits + unit];
  CellGradient<float> grad{};
  dh += kept.x;
  if (x.valid) {
    const float c_prev = x.narrow ? to_float(opaque(x.c0)) : opaque(x.c_prev);
    grad = lstm_cell_backward_for<T>(to_float(opaque(x.gates[0])), to_float(opaque(x.gates[1])),
                                     to_float(opaque(x.gates[2])), to_float(opaque(x.gates[3])), c_prev, opaque(x.c),
                                     dh + to_float(opaque(x.dh)), kept.y + to_float(opaque(x.dc)));
  }
  kept = x.valid ? float2{0.0f, grad.c} : float2{dh, kept.y};

  Vector<T, 4> dgates;
  const float exact[4] = {grad.i, grad.f, grad.g, grad.o};
#pragma unroll
  for (int k = 0; k < 4; ++k) from_float(exact[k], &dgates.element[k]);
  send(block, row, unit, step, dgates, exact);
  return dgates;
}

template <class Product, int R>
FASTSEQ_DEVICE void write_dgates(
    const Block<Product, R>& block, int row, int unit, int step, const Vector<typename Product::Element, 4>& dgates) {
  const int64_t H = block.p.shape.hidden;
  typename Product::Element* to = static_cast<typename Product::Element*>(block.p.grad_gates) +
                                  block.step_at(block.time_of(step), row, unit) * 4 - 3 * (block.first_unit + unit);
#pragma unroll
  for (int k = 0; k < 4; ++k) to[k * H] = dgates.element[k];
}

// Writes grad_h0 and grad_c0. dh: the product after the last step.
template <class Product, int R>
FASTSEQ_DEVICE void write_states(const Block<Product, R>& block, int row, int unit, float dh) {
  using T = typename Product::Element;
  const float2 kept = block.carry[row * Block<Product, R>::kBlockUnits + unit];
  const bool wide = block.p.shape.wide_states;
  store_state<T>(kept.x + dh, block.p.grad_h0, block.state_at(row, unit), wide);
  store_state<T>(kept.y, block.p.grad_c0, block.state_at(row, unit), wide);
}

}  // namespace fastseq::cuda::grid_backward
