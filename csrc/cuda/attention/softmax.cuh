// Online softmax (Milakov & Gimelshein 2018) of the attention forward kernels.
#pragma once

#include "cuda/common/device.cuh"

namespace fastseq::cuda {

// Online softmax: running maximum of the scores and running sum of e^(score - maximum).
struct SoftmaxState {
  float largest = -INFINITY, total = 0;

  // Value to subtract from scores before exp. Finite even if every score is -infinity: all exponentials are then 0.
  FASTSEQ_DEVICE float base() const { return largest == -INFINITY ? 0.0f : largest; }
  FASTSEQ_DEVICE float divisor() const { return total == 0.0f ? 1.0f : total; }

  // Raises the maximum to at least `score`. Returns the factor that rescales sums over earlier scores.
  FASTSEQ_DEVICE float raise(float score) {
    const float before = largest;
    largest = fmaxf(largest, score);
    const float factor = exp_fast(before - base());
    total *= factor;
    return factor;
  }
};

// Replaces the scores of one row by weights, with `threads` threads; zero from `limit` on.
FASTSEQ_DEVICE void finish_weights(
    float* row, int64_t positions, int64_t limit, float base, float divisor, int thread, int threads) {
  for (int64_t s = thread; s < positions; s += threads) row[s] = s < limit ? exp_fast(row[s] - base) / divisor : 0.0f;
}

}  // namespace fastseq::cuda
