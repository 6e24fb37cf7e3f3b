// Three formulations of the additive score's tanh(q + k). The first two combine a function of q and a function of k,
// which cost T + S evaluations (`prepare`) instead of T * S:
//
//     |q| or |k| small, the other not large:   (tanh q + tanh k) / (1 + tanh q tanh k)
//     |q| and |k| moderate:                    (e - 1) / (e + 1),  e = e^2q e^2k
//     else:                                    tanh(q + k) directly
//
// Each pair (q, k) then costs one special-function instruction and four others; a tanh accurate to float costs 40.
// 16-bit types always compute tanh(q + k) directly, with one or two special-function instructions.
// docs/kernels/attention.md
#pragma once

#include "cuda/common/device.cuh"

namespace fastseq::cuda {

template <class T>
struct DirectTanh {
  static FASTSEQ_DEVICE float prepare(float x) { return x; }
  static FASTSEQ_DEVICE float of(float q, float k) {
    if constexpr (std::is_same_v<T, bf16>)
      return tanh_fast(q + k);
    else
      return tanh_for<T>(q + k);
  }
};

struct AdditionTanh {
  static FASTSEQ_DEVICE float prepare(float x) { return tanh(x); }
  static FASTSEQ_DEVICE float of(float q, float k) { return (q + k) * reciprocal_fast(q * k + 1.0f); }
};

struct ExponentialTanh {
  static FASTSEQ_DEVICE float prepare(float x) {
    const SplitExp e = split_exp(x + x);
    return e.scale + e.scale * e.fraction;
  }
  static FASTSEQ_DEVICE float of(float q, float k) { return (q * k - 1.0f) * reciprocal_fast(q * k + 1.0f); }
};

// Adds one summand of the additive score.
template <class Tanh>
struct WeightedTanh {
  static FASTSEQ_DEVICE float add(float sum, float w, float q, float k) { return sum + w * Tanh::of(q, k); }
};

enum class TanhForm { kDirect, kAddition, kExponential };

// Chooses a formulation. query, key: largest |q| and |k|.
FASTSEQ_DEVICE TanhForm choose_tanh(float query, float key) {
  constexpr float kSmall = 0.5f;      // addition amplifies rounding errors by up to e^(2 kSmall)
  constexpr float kNotLarge = 4.0f;   // above, 1 - tanh^2 cancels because tanh is close to +-1
  constexpr float kModerate = 20.0f;  // no overflow: e^(4 kModerate) < 1e38
  if (fminf(query, key) <= kSmall && fmaxf(query, key) <= kNotLarge) return TanhForm::kAddition;
  return fmaxf(query, key) <= kModerate ? TanhForm::kExponential : TanhForm::kDirect;
}

}  // namespace fastseq::cuda
