// Three formulations of the additive score's tanh(q + k). The first two combine one function of q and one of k, each
// computed T + S times instead of T * S times:
//
//     |q| or |k| small, the other not large:   (tanh q + tanh k) / (1 + tanh q tanh k)
//     |q| and |k| moderate:                    (e - 1) / (e + 1),  e = e^2q e^2k
//     else:                                    tanh(q + k) directly
//
// That takes one special-function instruction and four others, instead of the 40 instructions of a tanh with all digits
// of float. 16-bit types need fewer digits: they compute it directly, by one or two special-function instructions.
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

// One summand of the additive score.
template <class Tanh>
struct WeightedTanh {
  static FASTSEQ_DEVICE float add(float sum, float w, float q, float k) { return sum + w * Tanh::of(q, k); }
};

enum class TanhWay { kDirect, kAddition, kExponential };

// Chooses a formulation. query, key: the largest |q| and |k|.
FASTSEQ_DEVICE TanhWay best_way(float query, float key) {
  constexpr float kSmall = 0.5f;      // addition magnifies rounding errors by up to e^(2 kSmall)
  constexpr float kNotLarge = 4.0f;   // and its 1 - tanh^2 cancels where tanh is close to +-1
  constexpr float kModerate = 20.0f;  // the exponential cannot overflow: e^(4 kModerate) < 1e38
  if (fminf(query, key) <= kSmall && fmaxf(query, key) <= kNotLarge) return TanhWay::kAddition;
  return fmaxf(query, key) <= kModerate ? TanhWay::kExponential : TanhWay::kDirect;
}

}  // namespace fastseq::cuda
