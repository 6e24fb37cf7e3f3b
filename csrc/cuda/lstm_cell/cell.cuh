// The pointwise LSTM cell, forward and backward: one thread per N adjacent hidden units of one sequence. Memory-bound:
// forward moves 7 elements and 4 activations a unit, in 16-byte loads and stores.
#pragma once

#include "cuda/common/device.cuh"

namespace fastseq::cuda {

template <class T, int N>
__global__ void __launch_bounds__(256, 3) lstm_cell_forward_kernel(int64_t batch,
                                                                   int64_t hidden,
                                                                   const T* __restrict__ gates,         // (B, 4H)
                                                                   const T* __restrict__ c,             // (B, H)
                                                                   T* __restrict__ h,                   // (B, H)
                                                                   T* __restrict__ c_n,                 // (B, H)
                                                                   Acc<T>* __restrict__ activations) {  // (B, 4H)
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t groups = hidden / N;
  if (index >= batch * groups) return;
  const int64_t row = index / groups, unit = index % groups * N;
  const int64_t at_gates = row * 4 * hidden + unit, at = row * hidden + unit;

  Acc<T> i[N], f[N], g[N], o[N], state[N], output[N];
  load_vector(i, gates + at_gates);
  load_vector(f, gates + at_gates + hidden);
  load_vector(g, gates + at_gates + 2 * hidden);
  load_vector(o, gates + at_gates + 3 * hidden);
  load_vector(state, c + at);
#pragma unroll
  for (int k = 0; k < N; ++k) output[k] = lstm_cell_forward(i[k], f[k], g[k], o[k], state[k]);
  store_vector(h + at, output);
  store_vector(c_n + at, state);
  store_wide(activations + at_gates, i);
  store_wide(activations + at_gates + hidden, f);
  store_wide(activations + at_gates + 2 * hidden, g);
  store_wide(activations + at_gates + 3 * hidden, o);
}

// A null grad_h or grad_c_n is zero.
template <class T, int N>
__global__ void __launch_bounds__(256) lstm_cell_backward_kernel(int64_t batch,
                                                                 int64_t hidden,
                                                                 const Acc<T>* __restrict__ activations,  // (B, 4H)
                                                                 const T* __restrict__ c,                 // (B, H)
                                                                 const T* __restrict__ c_n,               // (B, H)
                                                                 const T* __restrict__ grad_h,            // (B, H)
                                                                 const T* __restrict__ grad_c_n,          // (B, H)
                                                                 T* __restrict__ grad_gates,              // (B, 4H)
                                                                 T* __restrict__ grad_c) {                // (B, H)
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t groups = hidden / N;
  if (index >= batch * groups) return;
  const int64_t row = index / groups, unit = index % groups * N;
  const int64_t at_gates = row * 4 * hidden + unit, at = row * hidden + unit;

  Acc<T> i[N], f[N], g[N], o[N], before[N], after[N], dh[N] = {}, dc[N] = {};
  load_wide(i, activations + at_gates);
  load_wide(f, activations + at_gates + hidden);
  load_wide(g, activations + at_gates + 2 * hidden);
  load_wide(o, activations + at_gates + 3 * hidden);
  load_vector(before, c + at);
  load_vector(after, c_n + at);
  if (grad_h) load_vector(dh, grad_h + at);
  if (grad_c_n) load_vector(dc, grad_c_n + at);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const auto grad = lstm_cell_backward(i[k], f[k], g[k], o[k], before[k], after[k], dh[k], dc[k]);
    i[k] = grad.i;
    f[k] = grad.f;
    g[k] = grad.g;
    o[k] = grad.o;
    dc[k] = grad.c;
  }
  store_vector(grad_gates + at_gates, i);
  store_vector(grad_gates + at_gates + hidden, f);
  store_vector(grad_gates + at_gates + 2 * hidden, g);
  store_vector(grad_gates + at_gates + 3 * hidden, o);
  store_vector(grad_c + at, dc);
}

}  // namespace fastseq::cuda
