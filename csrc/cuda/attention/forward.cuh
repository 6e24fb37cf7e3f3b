// Attention forward: scores, an online softmax (Milakov & Gimelshein 2018) and the context in one pass over the keys
// and values. One step (T = 1) is bound by memory: a warp reads a key at a time, from global memory into registers, and
// few sentences are split over the positions. Many steps share keys and values through shared memory, 32 steps a block.
#pragma once

#include "cuda/attention/tile.cuh"

namespace fastseq::cuda {

// A softmax so far: the largest score and the sum of e^(score - largest).
struct SoftmaxState {
  float largest = -INFINITY, total = 0;

  // What to subtract from scores: with nothing but -infinity so far all exponentials are 0, not NaN.
  FASTSEQ_DEVICE float base() const { return largest == -INFINITY ? 0.0f : largest; }
  FASTSEQ_DEVICE float divisor() const { return total == 0.0f ? 1.0f : total; }

  // Scores up to `score` come next: what sums over the earlier ones shrink by.
  FASTSEQ_DEVICE float raise(float score) {
    const float before = largest;
    largest = fmaxf(largest, score);
    const float factor = exp_fast(before - base());
    total *= factor;
    return factor;
  }
};

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / 32;
constexpr int kWarpKeys = kStepKeys / kStepWarps;  // whose loads are in flight together

// Scores of a warp's keys, not scaled. keys[j]: row j.
template <class T, int N, bool kAdditive>
FASTSEQ_DEVICE void step_scores(const AttentionInputs& in,
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

// Scores of kStepKeys positions from `first` on; -infinity where not attended to, and from `end` on.
template <class T, int N, bool kAdditive>
FASTSEQ_DEVICE void step_tile(const AttentionInputs& in, int64_t b, int64_t first, int64_t end, float* scores) {
  const T* query = row_of<T>(in.query, b, 0);
  const int own = static_cast<int>(threadIdx.x) / 32 * kWarpKeys;
  const T* keys[kWarpKeys];
  float score[kWarpKeys];
  unsigned open = 0;
#pragma unroll
  for (int j = 0; j < kWarpKeys; ++j) {
    const bool attended = attends(in, b, first + own + j, end);
    open |= static_cast<unsigned>(attended) << j;
    keys[j] = attended ? row_of<T>(in.keys, b, first + own + j) : query;  // the others may be anything
  }
  if (open) step_scores<T, N, kAdditive>(in, query, keys, score);
#pragma unroll
  for (int j = 0; j < kWarpKeys; ++j) {
    if (lane_id() == j) scores[own + j] = open >> j & 1 ? in.scale * score[j] : -INFINITY;
  }
}

// Scores (kStepKeys) to exponentials; every warp computes the same state. Returns what earlier sums shrink by.
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

// sums (groups, columns) += probabilities (kStepKeys) * values, group g taking keys g, g + groups, ...; N columns each.
template <class T, int N>
FASTSEQ_DEVICE void step_context(const AttentionInputs& in,
                                 int64_t b,
                                 int64_t first,               // position
                                 const float* probabilities,  // (kStepKeys), 0: not attended to, not read
                                 float factor,                // for what is in sums
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

// The weights of one row from its scores, in place, by `threads` threads. limit: zero from here on.
FASTSEQ_DEVICE void finish_weights(
    float* row, int64_t positions, int64_t limit, float base, float divisor, int thread, int threads) {
  for (int64_t s = thread; s < positions; s += threads) row[s] = s < limit ? exp_fast(row[s] - base) / divisor : 0.0f;
}

// The context, or what one part of the positions adds to it, from sums (groups, columns).
template <class T>
FASTSEQ_DEVICE void finish_step(const AttentionForward& p,
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

// T = 1. A block for a part of the positions of one sentence and kStepColumns columns of the context.
template <class T, int N, bool kAdditive>
__global__ void __launch_bounds__(kStepThreads, 2) attention_step_kernel(AttentionForward p) {
  FASTSEQ_SHARED(float, sums, kStepColumns);
  FASTSEQ_SHARED(float, scores, kStepKeys);
  FASTSEQ_SHARED(float, probabilities, kStepKeys);
  const AttentionInputs& in = p.in;
  const int64_t b = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const int64_t column = blockIdx.y * kStepColumns;
  const int columns = static_cast<int>(in.width - column < kStepColumns ? in.width - column : kStepColumns);
  const int groups = columns > 0 && columns < kStepThreads * N ? kStepThreads * N / columns : 1;
  const int64_t part = divide_up(divide_up(in.positions, kStepKeys), p.splits) * kStepKeys;
  const int64_t limit = position_limit(in, b), begin = split * part;
  const int64_t end = limit - begin < part ? limit : begin + part;
  float* weights = p.weights && column == 0 ? p.weights + b * in.positions : nullptr;
  for (int i = threadIdx.x; i < kStepColumns; i += kStepThreads) sums[i] = 0;

  SoftmaxState state;
  for (int64_t first = begin; first < end; first += kStepKeys) {
    step_tile<T, N, kAdditive>(in, b, first, end, scores);
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

// What the parts of attention_step_kernel come to: a thread for a column of the context and a position.
template <class T>
__global__ void __launch_bounds__(kStepThreads) attention_combine_kernel(AttentionForward p, int64_t chunks) {
  const AttentionInputs& in = p.in;
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

// Shared memory of attention_forward_kernel; behind it lie its sums. E: float, or 16 bits where no float tile is
// needed.
template <class E>
struct ForwardTiles {
  float scores[kTileRows * kTileStride<float>];
  E x[kTileRows * kTileStride<E>];
  E y[kTileColumns * kTileStride<E>];
  float weight[kTileDepth];
  float factor[kTileRows], base[kTileRows];
  float largest[2][kTileThreads / 32];
  unsigned open[kTileColumns];  // attending_steps() of each position
};

template <class T, bool kAdditive>
using ForwardTilesOf = ForwardTiles<std::conditional_t<kAdditive, float, T>>;

// The largest absolute value of a float tile, of the part that this warp sees.
template <int kRows>
FASTSEQ_DEVICE float largest_of(const float* tile) {
  float largest = 0;
  for_tile<kRows * 16>([&](int i) {
    float x[4];
    load_wide(x, tile + i / 16 * kTileStride<float> + i % 16 * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) largest = fmaxf(largest, fabsf(x[e]));
  });
  return warp_max(largest);
}

// In place; each thread the elements that it looked at in largest_of().
template <class Tanh, int kRows>
FASTSEQ_DEVICE void prepare_tile(float* tile) {
  for_tile<kRows * 16>([&](int i) {
    float x[4], *at = tile + i / 16 * kTileStride<float> + i % 16 * 4;
    load_wide(x, at);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = Tanh::prepare(x[e]);
    store_wide(at, x);
  });
}

// In one way for all of the tiles' columns that are there.
template <class Tanh>
FASTSEQ_DEVICE void add_tanh(float (&sum)[4][4], ForwardTiles<float>& tiles, int rows, int depth) {
  prepare_tile<Tanh, kTileRows>(tiles.x);
  prepare_tile<Tanh, kTileColumns>(tiles.y);
  __syncthreads();
  RowProduct<float>::add<WeightedTanh<Tanh>>(sum, tiles.x, tiles.y, rows, depth, tiles.weight);
}

template <class T>
FASTSEQ_DEVICE void add_tanh_scores(float (&sum)[4][4], ForwardTiles<float>& tiles, int rows, int depth) {
  if constexpr (sizeof(T) == 2) {
    RowProduct<float>::add<WeightedTanh<DirectTanh<T>>>(sum, tiles.x, tiles.y, rows, depth, tiles.weight);
  } else {
    const int warp = threadIdx.x / 32;
    const float query = largest_of<kTileRows>(tiles.x), key = largest_of<kTileColumns>(tiles.y);
    if (lane_id() == 0) {
      tiles.largest[0][warp] = query;
      tiles.largest[1][warp] = key;
    }
    __syncthreads();
    float largest[2] = {0, 0};
    for (int i = 0; i < kTileThreads / 32; ++i) {
      largest[0] = fmaxf(largest[0], tiles.largest[0][i]);
      largest[1] = fmaxf(largest[1], tiles.largest[1][i]);
    }
    const Way way = best_way(largest[0], largest[1]);
    if (way == Way::kAddition) return add_tanh<AdditionTanh>(sum, tiles, rows, depth);
    if (way == Way::kExponential) return add_tanh<ExponentialTanh>(sum, tiles, rows, depth);
    RowProduct<float>::add<WeightedTanh<DirectTanh<float>>>(sum, tiles.x, tiles.y, rows, depth, tiles.weight);
  }
}

// The bias to the rows of queries, and the part of the weight that belongs to these columns.
template <class T>
FASTSEQ_DEVICE void add_bias(const AttentionInputs& in, int64_t a, int columns, ForwardTiles<float>& tiles) {
  const T* bias = static_cast<const T*>(in.bias);
  const int c = threadIdx.x % kTileDepth;
  if (threadIdx.x < kTileDepth) {
    tiles.weight[c] = c < columns ? to_float(static_cast<const T*>(in.weight)[a + c]) : 0.0f;
  }
  if (!bias || c >= columns) return;
  const float x = to_float(bias[a + c]);
  for (int r = threadIdx.x / kTileDepth; r < kTileRows; r += kTileThreads / kTileDepth) {
    tiles.x[r * kTileStride<float> + c] += x;
  }
}

// sum[step][position] of 32 steps and 64 positions, not scaled; tiles.open is set. Ends with a barrier.
template <class T, int N, bool kAdditive>
FASTSEQ_DEVICE void add_scores(float (&sum)[4][4],
                               const AttentionInputs& in,
                               int64_t b,
                               int64_t step,
                               int64_t position,
                               int rows,
                               ForwardTilesOf<T, kAdditive>& tiles) {
  const T *queries = row_of<T>(in.query, b, step), *keys = row_of<T>(in.keys, b, position);
  for (int64_t a = 0; a < in.size; a += kTileDepth) {
    const int columns = in.size - a < kTileDepth ? static_cast<int>(in.size - a) : kTileDepth;
    load_tile<N, kTileRows>(tiles.x, queries + a, in.query.row, columns, [&](int r) { return r < rows; });
    load_tile<N, kTileColumns>(tiles.y, keys + a, in.keys.row, columns, [&](int r) { return tiles.open[r] != 0; });
    __syncthreads();
    if constexpr (kAdditive) {
      add_bias<T>(in, a, columns, tiles);
      __syncthreads();
      add_tanh_scores<T>(sum, tiles, rows, columns);
    } else {
      RowProduct<T>::add(sum, tiles.x, tiles.y, rows, columns);
    }
    __syncthreads();
  }
}

// The softmax over one tile: four threads a row, 16 scores each. Leaves the exponentials in `x`.
template <class T>
FASTSEQ_DEVICE float softmax_tile(SoftmaxState& state, const float* scores, T* x) {
  const int row = threadIdx.x / 4, part = threadIdx.x % 4;
  float score[16], largest = -INFINITY, total = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    score[i] = scores[row * kTileStride<float> + part + 4 * i];
    largest = fmaxf(largest, score[i]);
  }
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
  const float factor = state.raise(largest);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float p = exp_fast(score[i] - state.base());
    total += p;
    from_float(p, x + row * kTileStride<T> + part + 4 * i);
  }
  total += __shfl_xor_sync(kAllLanes, total, 1);
  state.total += total + __shfl_xor_sync(kAllLanes, total, 2);
  return factor;
}

// What a block of attention_forward_kernel works at: steps from `step` on, columns of the context from `column` on.
struct ForwardBlock {
  int64_t b, step, column;
  int rows, chunks;  // of 64 columns

  FASTSEQ_DEVICE ForwardBlock(const AttentionInputs& in, int columns) {
    const int64_t blocks = divide_up(in.steps, kTileRows);
    b = blockIdx.x / blocks;
    step = blockIdx.x % blocks * kTileRows;
    column = static_cast<int64_t>(blockIdx.y) * columns;
    rows = in.steps - step < kTileRows ? static_cast<int>(in.steps - step) : kTileRows;
    chunks = static_cast<int>(divide_up(in.width - column < columns ? in.width - column : columns, 64));
  }
};

// Scaled and masked scores to shared memory, and to `weights` (rows, S) unless it is null.
template <class Tile, class Tiles>
FASTSEQ_DEVICE void keep_scores(const float (&sum)[4][4],
                                const AttentionInputs& in,
                                int64_t first,
                                int rows,
                                int count,
                                Tiles& tiles,
                                float* weights) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int m = Tile::row(i / 4, i % 4), n = Tile::column(i / 4, i % 4);
    const float score = tiles.open[n] >> m & 1 ? in.scale * sum[i / 4][i % 4] : -INFINITY;
    tiles.scores[m * kTileStride<float> + n] = score;
    if (weights && m < rows && n < count) weights[m * in.positions + first + n] = score;
  }
}

// sums = factor * sums + x * values, `count` positions from `first` on; sums (chunks, 16, threads), each thread its
// own.
template <class T, int N, class Tiles>
FASTSEQ_DEVICE void add_context(
    const ForwardBlock& block, const AttentionInputs& in, int64_t first, int count, Tiles& tiles, float* sums) {
  T *x = reinterpret_cast<T*>(tiles.x), *y = reinterpret_cast<T*>(tiles.y);
  for (int chunk = 0; chunk < block.chunks; ++chunk, sums += 16 * kTileThreads) {
    const int64_t c = block.column + 64 * chunk;
    load_tile<N, kTileColumns>(y, row_of<T>(in.values, block.b, first) + c, in.values.row, in.width - c,
                               [&](int r) { return tiles.open[r] != 0; });
    __syncthreads();
    float sum[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float factor = tiles.factor[ColumnProduct<T>::row(i / 4, i % 4)];
      sum[i / 4][i % 4] = factor * sums[i * kTileThreads + threadIdx.x];
    }
    ColumnProduct<T>::add(sum, x, y, block.rows, count);
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i * kTileThreads + threadIdx.x] = sum[i / 4][i % 4];
    __syncthreads();
  }
}

// sums / divisors (kTileRows) to the context.
template <class T, int N>
FASTSEQ_DEVICE void store_context(const ForwardBlock& block,
                                  const AttentionForward& p,
                                  const float* divisors,
                                  const float* sums) {
  const int64_t width = p.in.width;
  T* context = static_cast<T*>(p.context) + (block.b * p.in.steps + block.step) * width + block.column;
  for (int chunk = 0; chunk < block.chunks; ++chunk, sums += 16 * kTileThreads) {
    float sum[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      sum[i / 4][i % 4] = sums[i * kTileThreads + threadIdx.x] / divisors[ColumnProduct<T>::row(i / 4, i % 4)];
    }
    store_tile<N>(sum, context + 64 * chunk, width, block.rows, width - block.column - 64 * chunk);
  }
}

// 32 steps and `columns` (whole tiles) columns of the context, a block.
template <class T, int N, bool kAdditive>
__global__ void __launch_bounds__(kTileThreads, 4) attention_forward_kernel(AttentionForward p, int columns) {
  FASTSEQ_DYNAMIC_SHARED(memory);
  auto& tiles = *reinterpret_cast<ForwardTilesOf<T, kAdditive>*>(memory);
  float* sums = reinterpret_cast<float*>(memory + sizeof tiles);
  const AttentionInputs& in = p.in;
  const ForwardBlock block(in, columns);
  const int64_t limit = position_limit(in, block.b);
  const int row = threadIdx.x / 4;  // whose softmax this thread works at
  float* weights =
      p.weights && block.column == 0 ? p.weights + (block.b * in.steps + block.step) * in.positions : nullptr;
  for (int i = 0; i < block.chunks * 16; ++i) sums[i * kTileThreads + threadIdx.x] = 0;

  SoftmaxState state;
  for (int64_t first = 0; first < limit; first += kTileColumns) {
    const int count = limit - first < kTileColumns ? static_cast<int>(limit - first) : kTileColumns;
    if (threadIdx.x < kTileColumns) {
      tiles.open[threadIdx.x] = attending_steps(in, block.b, block.step, first + threadIdx.x, limit);
    }
    __syncthreads();
    float sum[4][4];
    clear(sum);
    add_scores<T, N, kAdditive>(sum, in, block.b, block.step, first, block.rows, tiles);
    using Tile = RowProduct<std::conditional_t<kAdditive, float, T>>;
    keep_scores<Tile>(sum, in, first, block.rows, count, tiles, weights);
    __syncthreads();
    const float factor = softmax_tile(state, tiles.scores, reinterpret_cast<T*>(tiles.x));
    if (threadIdx.x % 4 == 0) tiles.factor[row] = factor;
    add_context<T, N>(block, in, first, count, tiles, sums);
  }
  if (threadIdx.x % 4 == 0) {
    tiles.factor[row] = state.divisor();
    tiles.base[row] = state.base();
  }
  __syncthreads();
  for (int m = threadIdx.x / 32; weights && m < block.rows; m += kTileThreads / 32) {
    float* own = weights + m * in.positions;
    finish_weights(own, in.positions, limit, tiles.base[m], tiles.factor[m], lane_id(), 32);
  }
  store_context<T, N>(block, p, tiles.factor, sums);
}

}  // namespace fastseq::cuda
