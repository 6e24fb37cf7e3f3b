// The maths of one LSTM cell element, in float or double: no memory access, no threads. Shared by CPU and CUDA kernels.
//
//   i, f, o = sigmoid(pre_i, pre_f, pre_o)    g = tanh(pre_g)    c' = f * c + i * g    h = o * tanh(c')
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTSEQ_INLINE __host__ __device__ __forceinline__
#else
#define FASTSEQ_INLINE inline __attribute__((always_inline))
#endif

namespace fastseq {

// e^x = scale * (1 + fraction), split so that e^x - 1 loses no digits near 0.
struct SplitExp {
  float scale;     // 2^n
  float fraction;  // expm1(x - n ln 2), |x - n ln 2| <= ln(2) / 2
};

// Branch-free, so that compilers vectorise loops around it. Clamps x to +-87, where e^x is still a normal float32.
// The polynomial is a Chebyshev fit of (expm1(r) - r) / r^2; its error is below 2e-10.
FASTSEQ_INLINE SplitExp split_exp(float x) {
  constexpr float kLimit = 87.0f;
  x = x < -kLimit ? -kLimit : x;  // written so that NaN passes through
  x = x > kLimit ? kLimit : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0x1.62ep-1f;  // ln 2 in two parts; the first has 12 bits, so n times it is exact
  r = r - n * 0x1.0bfbe8p-15f;
  float p = 0x1.a1256cp-13f;
  p = p * r + 0x1.6d43bp-10f;
  p = p * r + 0x1.1110ep-7f;
  p = p * r + 0x1.5554e8p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = p * (r * r) + r;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // n + 127 in the exponent field
  SplitExp result;
  std::memcpy(&result.scale, &bits, sizeof bits);
  result.fraction = p;
  return result;
}

FASTSEQ_INLINE float sigmoid(float x) {
  const SplitExp e = split_exp(-x);
  return 1.0f / (1.0f + (e.scale + e.scale * e.fraction));
}

// tanh(x) = expm1(2x) / (expm1(2x) + 2): exact to about 2 ulp everywhere, no cancellation near 0, no overflow.
FASTSEQ_INLINE float tanh(float x) {
  constexpr float kSaturated = 9.02f;  // beyond it tanh rounds to +-1 in float32
  x = x < -kSaturated ? -kSaturated : x;
  x = x > kSaturated ? kSaturated : x;
  const SplitExp e = split_exp(x + x);
  const float expm1 = e.scale * e.fraction + (e.scale - 1.0f);
  return expm1 / (expm1 + 2.0f);
}

FASTSEQ_INLINE double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

FASTSEQ_INLINE double tanh(double x) { return std::tanh(x); }

// Forward: replaces the four pre-activations by their activations and c by c'. Returns h.
template <class A>
FASTSEQ_INLINE A lstm_cell_forward(A& i, A& f, A& g, A& o, A& c) {
  i = sigmoid(i);
  f = sigmoid(f);
  g = tanh(g);
  o = sigmoid(o);
  c = f * c + i * g;
  return o * tanh(c);
}

template <class A>
struct CellGradient {
  A i, f, g, o;  // gradients of the four pre-activations
  A c;           // gradient of the cell state before the step
};

// Backward. i, f, g, o: activations; c_prev, c: cell state before and after the step; dh, dc: gradients of h and of c.
template <class A>
FASTSEQ_INLINE CellGradient<A> lstm_cell_backward_at(A i, A f, A g, A o, A c_prev, A tanh_c, A dh, A dc) {
  const A one = 1;
  const A d = dc + dh * o * (one - tanh_c * tanh_c);
  CellGradient<A> gradient;
  gradient.i = d * g * i * (one - i);
  gradient.f = d * c_prev * f * (one - f);
  gradient.g = d * i * (one - g * g);
  gradient.o = dh * tanh_c * o * (one - o);
  gradient.c = d * f;
  return gradient;
}

template <class A>
FASTSEQ_INLINE CellGradient<A> lstm_cell_backward(A i, A f, A g, A o, A c_prev, A c, A dh, A dc) {
  return lstm_cell_backward_at(i, f, g, o, c_prev, tanh(c), dh, dc);
}

}  // namespace fastseq
