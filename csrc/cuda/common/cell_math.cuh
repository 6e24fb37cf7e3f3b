// The LSTM cell on the GPU, for results stored in T, and values of which the compiler knows nothing.
#pragma once

#include "cuda/common/device.cuh"

namespace fastseq::cuda {

// A number of a cell state, or of a gradient of a state: T, or float if `wide` (LstmShape::wide_states).
template <class T>
FASTSEQ_DEVICE float load_state(const void* from, int64_t index, bool wide) {
  return wide ? static_cast<const float*>(from)[index] : to_float(static_cast<const T*>(from)[index]);
}

template <class T>
FASTSEQ_DEVICE void store_state(float x, void* to, int64_t index, bool wide) {
  if (wide) {
    static_cast<float*>(to)[index] = x;
  } else {
    from_float(x, static_cast<T*>(to) + index);
  }
}

// Returns x, of which the compiler then knows nothing: it neither computes it anew at each use nor moves a conversion
// of it ahead of other instructions. For values loaded long before their use: converting one waits for the load.
FASTSEQ_DEVICE int opaque(int x) {
#ifndef FASTSEQ_HOST_DEVICE
  asm volatile("" : "+r"(x));
#endif
  return x;
}

FASTSEQ_DEVICE float opaque(float x) {
#ifndef FASTSEQ_HOST_DEVICE
  asm volatile("" : "+f"(x));
#endif
  return x;
}

template <class T, class = std::enable_if_t<sizeof(T) == 2>>
FASTSEQ_DEVICE T opaque(T x) {
#ifndef FASTSEQ_HOST_DEVICE
  uint16_t bits;
  memcpy(&bits, &x, sizeof bits);
  asm volatile("" : "+h"(bits));
  memcpy(&x, &bits, sizeof bits);
#endif
  return x;
}

// a / b with an error below 1 ulp, without the branches of an IEEE division. b and 1 / b must be normal numbers.
FASTSEQ_DEVICE float divide_normal(float a, float b) {
  const float r = reciprocal_fast(b), quotient = a * r;
  return fmaf(fmaf(-quotient, b, a), r, quotient);
}

// sigmoid and tanh of lstm_math.h, with divide_normal().
FASTSEQ_DEVICE float sigmoid_normal(float x) {
  const SplitExp e = split_exp(-x);
  return divide_normal(1.0f, 1.0f + (e.scale + e.scale * e.fraction));
}

FASTSEQ_DEVICE float tanh_normal(float x) {  // beyond 9.02 the quotient rounds to +-1; split_exp clamps
  const SplitExp e = split_exp(x + x);
  const float expm1 = e.scale * e.fraction + (e.scale - 1.0f);
  return divide_normal(expm1, expm1 + 2.0f);
}

template <class T>
FASTSEQ_DEVICE float cell_sigmoid(float x) {
  if constexpr (sizeof(T) == 2)
    return sigmoid_for<T>(x);
  else
    return sigmoid_normal(x);
}

template <class T>
FASTSEQ_DEVICE float cell_tanh(float x) {
  if constexpr (sizeof(T) == 2)
    return tanh_for<T>(x);
  else
    return tanh_normal(x);
}

// The LSTM cell for results stored in T, 16-bit or float. Replaces the pre-activations by activations and c_{t-1} by
// c_t. Returns h_t.
template <class T>
FASTSEQ_DEVICE float lstm_cell_for(float& i, float& f, float& g, float& o, float& c) {
  i = cell_sigmoid<T>(i);
  f = cell_sigmoid<T>(f);
  g = cell_tanh<T>(g);
  o = cell_sigmoid<T>(o);
  c = f * c + i * g;
  return o * cell_tanh<T>(c);
}

// lstm_cell_backward() for results stored in T, 16-bit or float.
template <class T>
FASTSEQ_DEVICE CellGradient<float> lstm_cell_backward_for(
    float i, float f, float g, float o, float c_prev, float c, float dh, float dc) {
  return lstm_cell_backward_at(i, f, g, o, c_prev, cell_tanh<T>(c), dh, dc);
}

}  // namespace fastseq::cuda
