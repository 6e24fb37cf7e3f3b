// The LSTM cell on vectors: the formulas of lstm_math.h. Order of the gates: i, f, g, o.
#pragma once

#include <cstdint>

#include "cpu/isa/region.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Loads one vector of each gate. The gates of a row lie H elements apart.
template <class S>
FASTSEQ_INLINE void load_gates(const S* row, int64_t H, int64_t n, Vec<Acc<S>> (&gates)[4]) {
#pragma GCC unroll 4
  for (int64_t q = 0; q < 4; ++q) gates[q] = vload(row + q * H, n);
}
template <class S>
FASTSEQ_INLINE void store_gates(const Vec<Acc<S>> (&gates)[4], S* row, int64_t H, int64_t n) {
#pragma GCC unroll 4
  for (int64_t q = 0; q < 4; ++q) vstore(gates[q], row + q * H, n);
}

// Replaces pre-activations by activations and c by the cell state after the step. Returns h.
template <class A>
FASTSEQ_INLINE Vec<A> cell_update(Vec<A> (&gates)[4], Vec<A>& c) {
  Vec<A>&i = gates[0], &f = gates[1], &g = gates[2], &o = gates[3];
  i = vsigmoid(i);
  f = vsigmoid(f);
  g = vtanh(g);
  o = vsigmoid(o);
  c = fma(f, c, i * g);
  return o * vtanh(c);
}

// Replaces activations by the gradients of the pre-activations. dc: on entry dL/dc_t without the path through h_t; on
// return dL/dc_{t-1}. tanh_c: tanh(c_t); dh: dL/dh_t.
template <class A>
FASTSEQ_INLINE void cell_gradients(Vec<A> (&gates)[4], Vec<A> c_prev, Vec<A> tanh_c, Vec<A> dh, Vec<A>& dc) {
  const Vec<A> i = gates[0], f = gates[1], g = gates[2], o = gates[3], one = splat(A(1));
  dc = fma(dh * o, fnma(tanh_c, tanh_c, one), dc);
  gates[0] = dc * g * i * (one - i);
  gates[1] = dc * c_prev * f * (one - f);
  gates[2] = dc * i * fnma(g, g, one);
  gates[3] = dh * tanh_c * o * (one - o);
  dc = dc * f;
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
