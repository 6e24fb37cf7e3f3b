// The additive score with coverage: tanh(q + k + b + c w), c one number per step and position, w (A,).
//
// The formulations of tanh.cuh combine a function of q and one of k. c w belongs to the pair, so every tanh is
// evaluated directly. Forward: attention_coverage_score_kernel writes the scores, which the kernels of the dot score
// then read. Backward: two kernels in place of attention_tanh_kernel.
#pragma once

#include "cuda/attention/backward.cuh"

namespace fastseq::cuda {

constexpr int kScoreThreads = 256;
constexpr int kScoreKeys = 8;  // positions of a warp; their loads are in flight together
constexpr int kScorePositions = kScoreThreads / 32 * kScoreKeys;  // positions of a block
constexpr int kScoreSteps = 8;                                    // steps of a block, whose keys stay in L1

// Returns a bit mask: bit j is set if step t attends to position first + j.
template <int kCount>
FASTSEQ_DEVICE unsigned attended_keys(
    const AttentionInputParams& in, int64_t b, int64_t t, int64_t first, int64_t limit) {
  unsigned open = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int64_t s = first + j;
    const bool attended = s < limit && (!in.mask || in.mask[b * in.mask_batch + t * in.mask_row + s * in.mask_column]);
    open |= static_cast<unsigned>(attended) << j;
  }
  return open;
}

// Returns in lane 4 j the unscaled score of step t and position first + j, if its bit of `open` is set.
template <class T, int N>
FASTSEQ_DEVICE float covered_score(const AttentionInputParams& in, int64_t b, int64_t t, int64_t first, unsigned open) {
  const T *query = row_of<T>(in.query, b, t), *keys = row_of<T>(in.keys, b, first);
  const T *weight = static_cast<const T*>(in.weight), *bias = static_cast<const T*>(in.bias);
  const T *vector = static_cast<const T*>(in.coverage_weight), *row = row_of<T>(in.coverage, b, t) + first;
  float coverage[kScoreKeys], score[kScoreKeys] = {};
#pragma unroll
  for (int j = 0; j < kScoreKeys; ++j) coverage[j] = open >> j & 1 ? to_float(row[j]) : 0.0f;
  for (int64_t a = lane_id() * N; a < in.size; a += 32 * N) {
    float q[N], v[N], w[N];
    load_vector(q, query + a);
    if (bias) {
      float add[N];
      load_vector(add, bias + a);
#pragma unroll
      for (int e = 0; e < N; ++e) q[e] += add[e];
    }
    load_vector(v, weight + a);
    load_vector(w, vector + a);
#pragma unroll
    for (int j = 0; j < kScoreKeys; ++j) {
      float k[N] = {};
      if (open >> j & 1) load_vector(k, keys + j * in.keys.row + a);
#pragma unroll
      for (int e = 0; e < N; ++e) score[j] += v[e] * DirectTanh<T>::of(q[e] + coverage[j] * w[e], k[e]);
    }
  }
  return warp_sums<kScoreKeys>(score);
}

// One block per kScoreSteps steps and kScorePositions positions.
template <class T, int N>
__global__ void __launch_bounds__(kScoreThreads, 2) attention_coverage_score_kernel(AttentionForwardParams p) {
  const AttentionInputParams& in = p.in;
  const int64_t blocks = divide_up(in.steps, kScoreSteps), b = blockIdx.x / blocks, limit = position_limit(in, b);
  const int64_t begin = blockIdx.x % blocks * kScoreSteps, left = in.steps - begin;
  const int64_t end = begin + (left < kScoreSteps ? left : kScoreSteps);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kScorePositions + threadIdx.x / 32 * kScoreKeys;
  constexpr int kLanes = 32 / kScoreKeys;  // lanes that hold the same score
  const int j = lane_id() / kLanes;
  for (int64_t t = begin; t < end; ++t) {
    const unsigned open = attended_keys<kScoreKeys>(in, b, t, first, limit);
    if (!open) continue;
    const float score = covered_score<T, N>(in, b, t, first, open);
    if (lane_id() % kLanes == 0 && open >> j & 1) p.scores[(b * in.steps + t) * in.positions + first + j] = score;
  }
}

constexpr int kCoverageThreads = 512;
constexpr int kCoverageWarps = kCoverageThreads / 32;
constexpr int kCoverageKeys = kTanhPositions / kCoverageWarps;  // keys of a thread, in registers
constexpr int kCoverageSteps = 16;                              // steps in shared memory at once

struct CoverageTiles {
  float grads[kCoverageSteps][kTanhPositions];  // gradients of the scores
  float coverage[kCoverageSteps][kTanhPositions];
  float queries[kCoverageSteps][32];                  // query + bias
  float partial[kCoverageWarps][kCoverageSteps][32];  // grad_query over each warp's positions
  unsigned char open[kTanhPositions];                 // 1 if any step attends to the position
};

// Loads score gradients, coverage and queries of kCoverageSteps steps into shared memory.
template <class T>
FASTSEQ_DEVICE void load_covered_steps(const AttentionBackwardParams& p,
                                       int64_t b,
                                       int64_t step,
                                       int64_t first,  // position
                                       int64_t limit,
                                       int64_t a,
                                       CoverageTiles& tiles) {
  const AttentionInputParams& in = p.in;
  for (int t = threadIdx.x / 32; t < kCoverageSteps; t += kCoverageWarps) {
    const bool inside = step + t < in.steps;
    const float mean = inside ? mean_of(p, b, step + t) : 0.0f;
    for (int s = lane_id(); s < kTanhPositions; s += 32) {
      const float grad = inside && first + s < limit ? score_gradient(p, b, step + t, first + s, mean) : 0.0f;
      tiles.grads[t][s] = grad;
      // The coverage of padding may be NaN.
      tiles.coverage[t][s] = grad == 0 ? 0.0f : to_float(row_of<T>(in.coverage, b, step + t)[first + s]);
    }
    tiles.queries[t][lane_id()] = inside ? biased_query<T>(in, b, step + t, a) : 0.0f;
  }
}

// Sums of one thread, all without the factor weight[a], and its keys.
struct CoveredColumn {
  float keys[kCoverageKeys], grad_keys[kCoverageKeys] = {};
  float grad_weight = 0, grad_coverage_weight = 0;
};

// Adds one step. coverage_row: its coverage_parts from the first position of the warp on.
template <class T>
FASTSEQ_DEVICE void add_covered_step(CoveredColumn& sums,
                                     int t,
                                     float v,  // weight[a]
                                     float w,  // coverage_weight[a]
                                     int64_t count,
                                     float* coverage_row,  // (count,) out
                                     CoverageTiles& tiles) {
  const int warp = threadIdx.x / 32;
  const float query = tiles.queries[t][lane_id()], factor = v * w;
  float grad[kCoverageKeys], coverage[kCoverageKeys], product[kCoverageKeys], grad_query = 0;
  load_wide(grad, &tiles.grads[t][warp * kCoverageKeys]);
  load_wide(coverage, &tiles.coverage[t][warp * kCoverageKeys]);
#pragma unroll
  for (int j = 0; j < kCoverageKeys; ++j) {
    const float hidden = DirectTanh<T>::of(query + coverage[j] * w, sums.keys[j]), weighted = grad[j] * hidden;
    const float slope = grad[j] - weighted * hidden;
    sums.grad_weight += weighted;
    sums.grad_coverage_weight += coverage[j] * slope;
    sums.grad_keys[j] += slope;
    grad_query += slope;
    product[j] = slope * factor;
  }
  tiles.partial[warp][t][lane_id()] = grad_query;
  constexpr int kLanes = 32 / kCoverageKeys;  // lanes that hold the same sum
  const float sum = warp_sums<kCoverageKeys>(product);
  if (lane_id() % kLanes == 0 && lane_id() / kLanes < count) coverage_row[lane_id() / kLanes] = sum;
}

// Adds all steps. Writes query_parts without the factor weight[a], and coverage_parts.
template <class T>
FASTSEQ_DEVICE void add_covered_steps(const AttentionBackwardParams& p,
                                      int64_t b,
                                      int64_t part,
                                      int64_t a,
                                      float v,
                                      float w,
                                      CoveredColumn& sums,
                                      CoverageTiles& tiles) {
  const AttentionInputParams& in = p.in;
  const int64_t parts = divide_up(in.positions, kTanhPositions), limit = position_limit(in, b);
  const int warp = threadIdx.x / 32;
  const int64_t first = part * kTanhPositions + warp * kCoverageKeys;
  float* query_part = p.query_parts + (b * parts + part) * in.steps * in.size;
  float* coverage_part = p.coverage_parts + (blockIdx.y * in.batch + b) * in.steps * in.positions + first;
  for (int64_t step = 0; step < in.steps; step += kCoverageSteps) {
    const int steps = in.steps - step < kCoverageSteps ? static_cast<int>(in.steps - step) : kCoverageSteps;
    load_covered_steps<T>(p, b, step, part * kTanhPositions, limit, a, tiles);
    __syncthreads();
    for (int t = 0; t < steps; ++t) {
      add_covered_step<T>(sums, t, v, w, limit - first, coverage_part + (step + t) * in.positions, tiles);
    }
    __syncthreads();
    for (int t = warp; t < steps; t += kCoverageWarps) {
      float sum = 0;
      for (int i = 0; i < kCoverageWarps; ++i) sum += tiles.partial[i][t][lane_id()];
      if (a < in.size) query_part[(step + t) * in.size + a] = sum;
    }
  }
}

// One block per 128 positions and 32 columns, all steps. One thread per 8 positions of a column.
template <class T>
__global__ void __launch_bounds__(kCoverageThreads) attention_coverage_tanh_kernel(AttentionBackwardParams p) {
  FASTSEQ_DYNAMIC_SHARED(memory);
  auto& tiles = *reinterpret_cast<CoverageTiles*>(memory);
  const AttentionInputParams& in = p.in;
  const int64_t parts = divide_up(in.positions, kTanhPositions), b = blockIdx.x / parts, part = blockIdx.x % parts;
  const int64_t a = blockIdx.y * kTanhColumns + lane_id(), limit = position_limit(in, b);
  const int warp = threadIdx.x / 32;
  const int64_t first = part * kTanhPositions + warp * kCoverageKeys;
  if (threadIdx.x < kTanhPositions) {
    unsigned open = 0;
    for (int64_t t = 0; t < in.steps; t += 32) {
      open |= attending_steps(in, b, t, part * kTanhPositions + threadIdx.x, limit);
    }
    tiles.open[threadIdx.x] = open != 0;
  }
  __syncthreads();
  CoveredColumn sums;
#pragma unroll
  for (int j = 0; j < kCoverageKeys; ++j) {
    const bool exists = tiles.open[warp * kCoverageKeys + j] && a < in.size;
    sums.keys[j] = exists ? to_float(row_of<T>(in.keys, b, first + j)[a]) : 0.0f;
  }
  const float v = a < in.size ? to_float(static_cast<const T*>(in.weight)[a]) : 0.0f;
  const float w = a < in.size ? to_float(static_cast<const T*>(in.coverage_weight)[a]) : 0.0f;
  if (part * kTanhPositions < limit) add_covered_steps<T>(p, b, part, a, v, w, sums, tiles);
  __syncthreads();
  tiles.partial[0][warp][lane_id()] = sums.grad_weight;
  tiles.partial[1][warp][lane_id()] = sums.grad_coverage_weight;
  __syncthreads();
  if (a >= in.size) return;
#pragma unroll
  for (int j = 0; j < kCoverageKeys; ++j) {
    if (first + j >= in.positions) break;
    from_float(v * sums.grad_keys[j], static_cast<T*>(p.grad_keys) + (b * in.positions + first + j) * in.size + a);
  }
  if (warp != 0) return;
  float weight = 0, coverage_weight = 0;
  for (int i = 0; i < kCoverageWarps; ++i) {
    weight += tiles.partial[0][i][lane_id()];
    coverage_weight += tiles.partial[1][i][lane_id()];
  }
  p.weight_parts[(b * parts + part) * in.size + a] = weight;
  p.coverage_weight_parts[(b * parts + part) * in.size + a] = v * coverage_weight;
}

// grad_coverage = sum of coverage_parts, 0 past the lengths. One thread per element.
template <class T>
__global__ void __launch_bounds__(kTanhThreads) attention_coverage_sum_kernel(AttentionBackwardParams p) {
  const AttentionInputParams& in = p.in;
  const int64_t row = in.steps * in.positions, at = static_cast<int64_t>(blockIdx.x) * kTanhThreads + threadIdx.x;
  if (at >= in.batch * row) return;
  const int64_t parts = at % in.positions < position_limit(in, at / row) ? divide_up(in.size, kTanhColumns) : 0;
  float sum = 0;
  for (int64_t i = 0; i < parts; ++i) sum += p.coverage_parts[i * in.batch * row + at];
  from_float(sum, static_cast<T*>(p.grad_coverage) + at);
}

}  // namespace fastseq::cuda
