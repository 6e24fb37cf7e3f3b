// The cells of one step, one thread per hidden unit of a sequence.
#pragma once

#include "cuda/common/cell_math.cuh"
#include "cuda/lstm/params.h"

namespace fastseq::cuda {

constexpr int kCellThreads = 256;

// A unit of a row in step `time`.
struct CellPlace {
  int64_t state;  // index in (B, H)
  int64_t step;   // index in (T, B, H)
  int64_t gates;  // index in (T, B, 4H) of gate i; the others follow at distance H
  int64_t last;   // number of steps of the row
  bool exists, valid;

  FASTSEQ_DEVICE CellPlace(const LstmShape& s, int64_t time) {
    state = static_cast<int64_t>(blockIdx.x) * kCellThreads + threadIdx.x;
    exists = state < s.batch * s.hidden;
    const int64_t row = exists ? state / s.hidden : 0, unit = state - row * s.hidden;
    last = s.lengths ? min(s.lengths[row], s.steps) : s.steps;
    valid = exists && time >= 0 && time < last;
    step = time * s.batch * s.hidden + state;
    gates = (time * s.batch + row) * 4 * s.hidden + unit;
  }
};

template <class T>
__global__ void __launch_bounds__(kCellThreads)
    lstm_forward_step_kernel(LstmForwardParams p, int64_t time, const T* product, float* c) {
  const CellPlace at(p.shape, time);
  if (!at.exists) return;
  T* output = static_cast<T*>(p.output) + at.step;
  if (!at.valid) return from_float(0.0f, output);
  const int64_t H = p.shape.hidden, in_product = at.gates - time * p.shape.batch * 4 * H;
  const T* gates = static_cast<const T*>(p.gates) + at.gates;
  float gate[4], cell = c[at.state];
#pragma unroll
  for (int q = 0; q < 4; ++q) gate[q] = to_float(gates[q * H]) + to_float(product[in_product + q * H]);
  const float h = lstm_cell_for<T>(gate[0], gate[1], gate[2], gate[3], cell);
  from_float(h, output);
  from_float(h, static_cast<T*>(p.h_n) + at.state);
  store_state<T>(cell, p.c_n, at.state, p.shape.wide_states);
  c[at.state] = cell;
  if (p.cell_states) p.cell_states[at.step] = cell;
  if (!p.activations) return;
#pragma unroll
  for (int q = 0; q < 4; ++q) from_float(gate[q], static_cast<T*>(p.activations) + at.gates + q * H);
}

template <class T>
__global__ void __launch_bounds__(kCellThreads)
    lstm_backward_step_kernel(LstmBackwardParams p, int64_t time, const T* product, float* carry) {
  const LstmShape& s = p.shape;
  const CellPlace at(s, time);
  if (!at.exists) return;
  const int64_t H = s.hidden;
  float& kept_h = carry[at.state];
  float& kept_c = carry[s.batch * H + at.state];
  const float dh = kept_h + to_float(product[at.state]);
  if (time < 0 || time == s.steps) {
    store_state<T>(dh, p.grad_h0, at.state, s.wide_states);
    return store_state<T>(kept_c, p.grad_c0, at.state, s.wide_states);
  }
  CellGradient<float> grad{};
  if (at.valid) {
    const T* activations = static_cast<const T*>(p.activations) + at.gates;
    const bool first = time == (s.reverse ? at.last - 1 : 0);
    const int64_t before = at.step + (s.reverse ? 1 : -1) * s.batch * H;
    const float c_prev = first ? load_state<T>(p.c0, at.state, s.wide_states) : p.cell_states[before];
    const float dh_out = p.grad_output ? to_float(static_cast<const T*>(p.grad_output)[at.step]) : 0.0f;
    const float dc_out = p.grad_cell_states ? to_float(static_cast<const T*>(p.grad_cell_states)[at.step]) : 0.0f;
    grad =
        lstm_cell_backward(to_float(activations[0]), to_float(activations[H]), to_float(activations[2 * H]),
                           to_float(activations[3 * H]), c_prev, p.cell_states[at.step], dh + dh_out, kept_c + dc_out);
  }
  T* grad_gates = static_cast<T*>(p.grad_gates) + at.gates;
  from_float(grad.i, grad_gates);
  from_float(grad.f, grad_gates + H);
  from_float(grad.g, grad_gates + 2 * H);
  from_float(grad.o, grad_gates + 3 * H);
  kept_h = at.valid ? 0.0f : dh;
  if (at.valid) kept_c = grad.c;
}

}  // namespace fastseq::cuda
