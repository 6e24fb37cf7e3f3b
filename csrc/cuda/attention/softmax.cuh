// Online softmax (Milakov & Gimelshein 2018) of the attention forward kernels.
#pragma once

#include "cuda/common/device.cuh"

namespace fastseq::cuda {

// State of an online softmax: the largest score so far and the sum of e^(score - largest).
struct SoftmaxState {
  float largest = -INFINITY, total = 0;

  // Subtracted from scores before exp. If all scores so far are -infinity, all exponentials are 0, not NaN.
  FASTSEQ_DEVICE float base() const { return largest == -INFINITY ? 0.0f : largest; }
  FASTSEQ_DEVICE float divisor() const { return total == 0.0f ? 1.0f : total; }

  // Raises the largest score to at least `score`. Returns the factor that rescales sums over earlier scores.
  FASTSEQ_DEVICE float raise(float score) {
    const float before = largest;
    largest = fmaxf(largest, score);
    const float factor = exp_fast(before - base());
    total *= factor;
    return factor;
  }
};

// Turns the scores of one row into weights, in place, by `threads` threads; zero from `limit` on.
FASTSEQ_DEVICE void finish_weights(
    float* row, int64_t positions, int64_t limit, float base, float divisor, int thread, int threads) {
  for (int64_t s = thread; s < positions; s += threads) row[s] = s < limit ? exp_fast(row[s] - base) / divisor : 0.0f;
}

}  // namespace fastseq::cuda
