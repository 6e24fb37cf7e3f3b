// Attention forward for T = 1 (decoding), memory-bound: each warp reads its keys from global memory into registers. For
// small batches, blocks split the positions; attention_combine_kernel merges them. Drawing: docs/kernels/attention.md
#pragma once

#include "cuda/attention/softmax.cuh"
#include "cuda/attention/tanh.cuh"
#include "cuda/attention/tile.cuh"

namespace fastseq::cuda {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / 32;
constexpr int kWarpKeys = kStepKeys / kStepWarps;  // keys of a warp; their loads are in flight together

// Computes the unscaled scores of a warp's keys. keys[j]: row j.
template <class T, int N, bool kAdditive>
FASTSEQ_DEVICE void step_scores(const AttentionInputParams& in,
                                const T* query,                     // (A,)
                                const T* const (&keys)[kWarpKeys],  // each (A,)
                                float (&score)[kWarpKeys]) {
  const T* weight = static_cast<const T*>(in.weight);
  const T* bias = static_cast<const T*>(in.bias);
#pragma unroll
  for (int j = 0; j < kWarpKeys; ++j) score[j] = 0;
  for (int64_t a = lane_id() * N; a < in.size; a += 32 * N) {
    float q[N], w[N] = {}, add[N] = {};
    load_vector(q, query + a);
    if constexpr (kAdditive) load_vector(w, weight + a);
    if (kAdditive && bias) load_vector(add, bias + a);
#pragma unroll
    for (int j = 0; j < kWarpKeys; ++j) {
      float k[N];
      load_vector(k, keys[j] + a);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        using Form = std::conditional_t<kAdditive, WeightedTanh<DirectTanh<T>>, Multiply>;
        score[j] = Form::add(score[j], w[e], q[e] + add[e], k[e]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kWarpKeys; ++j) score[j] = warp_sum(score[j]);
}

// Computes the scores of kStepKeys positions from `first` on; -infinity where masked, and from `end` on. given (S,):
// unscaled scores that the dot score's kernel takes instead, or null.
template <class T, int N, bool kAdditive>
FASTSEQ_DEVICE void step_tile(
    const AttentionInputParams& in, int64_t b, int64_t first, int64_t end, const float* given, float* scores) {
  const T* query = row_of<T>(in.query, b, 0);
  const int warp_key = static_cast<int>(threadIdx.x) / 32 * kWarpKeys;
  const T* keys[kWarpKeys];
  float score[kWarpKeys];
  unsigned open = 0;
#pragma unroll
  for (int j = 0; j < kWarpKeys; ++j) {
    const bool attended = attends(in, b, first + warp_key + j, end);
    open |= static_cast<unsigned>(attended) << j;
    keys[j] = attended ? row_of<T>(in.keys, b, first + warp_key + j) : query;  // masked keys are not read
  }
  if (!kAdditive && given) {
#pragma unroll
    for (int j = 0; j < kWarpKeys; ++j) {
      if (open >> j & 1) score[j] = given[first + warp_key + j];
    }
  } else if (open) {
    step_scores<T, N, kAdditive>(in, query, keys, score);
  }
#pragma unroll
  for (int j = 0; j < kWarpKeys; ++j) {
    if (lane_id() == j) scores[warp_key + j] = open >> j & 1 ? in.scale * score[j] : -INFINITY;
  }
}

// Replaces scores (kStepKeys,) by exponentials. Every warp computes the same state. Returns the factor of earlier sums.
FASTSEQ_DEVICE float step_softmax(SoftmaxState& state, const float* scores, float* probabilities) {
  const float upper = scores[lane_id()], lower = scores[lane_id() + 32];
  const float factor = state.raise(warp_max(fmaxf(upper, lower)));
  const float p_upper = exp_fast(upper - state.base()), p_lower = exp_fast(lower - state.base());
  state.total += warp_sum(p_upper + p_lower);
  if (threadIdx.x < 32) {
    probabilities[lane_id()] = p_upper;
    probabilities[lane_id() + 32] = p_lower;
  }
  return factor;
}

// sums (groups, columns) = factor * sums + probabilities (kStepKeys,) * values. Group g adds keys g, g + groups, ...;
// one item is N columns of a group.
template <class T, int N>
FASTSEQ_DEVICE void step_context(const AttentionInputParams& in,
                                 int64_t b,
                                 int64_t first,               // position
                                 const float* probabilities,  // (kStepKeys,); values of probability 0 are not read
                                 float factor,                // of earlier sums
                                 int64_t column,              // the first one
                                 int columns,
                                 int groups,
                                 float* sums) {
  const int vectors = columns / N;
  for (int item = threadIdx.x; item < groups * vectors; item += kStepThreads) {
    const int group = item / vectors, c = item % vectors * N;
    float sum[N];
    load_wide(sum, sums + item * N);
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] *= factor;
#pragma unroll 4
    for (int j = group; j < kStepKeys; j += groups) {
      const float p = probabilities[j];
      float v[N] = {};
      if (p != 0) load_vector(v, row_of<T>(in.values, b, first + j) + column + c);
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] += p * v[e];
    }
    store_wide(sums + item * N, sum);
  }
}

// Writes the context, or the partial sums of one split, from sums (groups, columns).
template <class T>
FASTSEQ_DEVICE void finish_step(const AttentionForwardParams& p,
                                int64_t b,
                                int64_t split,
                                int64_t column,
                                int columns,
                                int groups,
                                const SoftmaxState& state,
                                const float* sums) {
  T* context = static_cast<T*>(p.context) + b * p.in.width + column;
  float* partial = p.sums + (b * p.splits + split) * p.in.width + column;
  for (int c = threadIdx.x; c < columns; c += kStepThreads) {
    float sum = 0;
    for (int g = 0; g < groups; ++g) sum += sums[g * columns + c];
    if (p.splits == 1)
      from_float(sum / state.divisor(), context + c);
    else
      partial[c] = sum;
  }
  if (p.splits == 1 || threadIdx.x != 0 || column != 0) return;
  p.states[(b * p.splits + split) * 2] = state.largest;
  p.states[(b * p.splits + split) * 2 + 1] = state.total;
}

// T = 1. One block per sentence, split of its positions, and kStepColumns context columns.
template <class T, int N, bool kAdditive>
__global__ void __launch_bounds__(kStepThreads, 2) attention_step_kernel(AttentionForwardParams p) {
  FASTSEQ_SHARED(float, sums, kStepColumns);
  FASTSEQ_SHARED(float, scores, kStepKeys);
  FASTSEQ_SHARED(float, probabilities, kStepKeys);
  const AttentionInputParams& in = p.in;
  const int64_t b = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const int64_t column = blockIdx.y * kStepColumns;
  const int columns = static_cast<int>(in.width - column < kStepColumns ? in.width - column : kStepColumns);
  const int groups = columns > 0 && columns < kStepThreads * N ? kStepThreads * N / columns : 1;
  const int64_t part = divide_up(divide_up(in.positions, kStepKeys), p.splits) * kStepKeys;
  const int64_t limit = position_limit(in, b), begin = split * part;
  const int64_t end = limit - begin < part ? limit : begin + part;
  float* weights = p.weights && column == 0 ? p.weights + b * in.positions : nullptr;
  const float* given = p.scores ? p.scores + b * in.positions : nullptr;
  for (int i = threadIdx.x; i < kStepColumns; i += kStepThreads) sums[i] = 0;

  SoftmaxState state;
  for (int64_t first = begin; first < end; first += kStepKeys) {
    step_tile<T, N, kAdditive>(in, b, first, end, given, scores);
    __syncthreads();
    const float factor = step_softmax(state, scores, probabilities);
    const int64_t s = first + threadIdx.x;
    if (weights && threadIdx.x < kStepKeys && s < end) weights[s] = scores[threadIdx.x];
    __syncthreads();
    step_context<T, N>(in, b, first, probabilities, factor, column, columns, groups, sums);
  }
  __syncthreads();
  finish_step<T>(p, b, split, column, columns, groups, state, sums);
  if (!weights || p.splits > 1) return;
  finish_weights(weights, in.positions, limit, state.base(), state.divisor(), threadIdx.x, kStepThreads);
}

// Combines the split-S partials of attention_step_kernel. One thread per context column and per position.
template <class T>
__global__ void __launch_bounds__(kStepThreads) attention_combine_kernel(AttentionForwardParams p, int64_t chunks) {
  const AttentionInputParams& in = p.in;
  const int64_t b = blockIdx.x / chunks, index = blockIdx.x % chunks * kStepThreads + threadIdx.x;
  const float* states = p.states + b * p.splits * 2;
  SoftmaxState all;
  for (int64_t i = 0; i < p.splits; ++i) all.largest = fmaxf(all.largest, states[2 * i]);
  float sum = 0;
  for (int64_t i = 0; i < p.splits; ++i) {
    const float factor = exp_fast(states[2 * i] - all.base());
    all.total += factor * states[2 * i + 1];
    if (index < in.width) sum += factor * p.sums[(b * p.splits + i) * in.width + index];
  }
  if (index < in.width) from_float(sum / all.divisor(), static_cast<T*>(p.context) + b * in.width + index);
  if (!p.weights || index >= in.positions) return;
  float* weight = p.weights + b * in.positions + index;
  *weight = index < position_limit(in, b) ? exp_fast(*weight - all.base()) / all.divisor() : 0.0f;
}

}  // namespace fastseq::cuda
