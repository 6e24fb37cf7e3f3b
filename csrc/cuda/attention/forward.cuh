// Attention forward for T > 1: scores, online softmax and context in one pass over keys and values. The 32 steps of a
// block share keys and values through shared memory. T = 1: forward_step.cuh. Drawing: docs/kernels/attention.md
#pragma once

#include "cuda/attention/softmax.cuh"
#include "cuda/attention/tanh.cuh"
#include "cuda/attention/tile.cuh"

namespace fastseq::cuda {

// Shared memory of attention_forward_kernel; its context sums follow. E: type of the tiles, float for the additive
// score.
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

// Returns the largest absolute value in this warp's part of a float tile.
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

// Applies Tanh::prepare to a float tile, in place. Each thread has the same elements as in largest_of().
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

// Adds the tanh scores of a tile in one formulation for all its elements.
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
    const TanhForm form = choose_tanh(largest[0], largest[1]);
    if (form == TanhForm::kAddition) return add_tanh<AdditionTanh>(sum, tiles, rows, depth);
    if (form == TanhForm::kExponential) return add_tanh<ExponentialTanh>(sum, tiles, rows, depth);
    RowProduct<float>::add<WeightedTanh<DirectTanh<float>>>(sum, tiles.x, tiles.y, rows, depth, tiles.weight);
  }
}

// Adds the bias to the tile of queries and loads the weights of its columns.
template <class T>
FASTSEQ_DEVICE void add_bias(const AttentionInputParams& in, int64_t a, int columns, ForwardTiles<float>& tiles) {
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

// Adds the unscaled scores of 32 steps and 64 positions to `sum`. Reads tiles.open. Ends with __syncthreads.
template <class T, int N, bool kAdditive>
FASTSEQ_DEVICE void add_scores(float (&sum)[4][4],
                               const AttentionInputParams& in,
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

// Advances the online softmax by one tile: four threads a row, 16 scores each. Writes the exponentials to `x`. Returns
// the factor of earlier sums.
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

// Work of a block of attention_forward_kernel: `rows` steps from `step` on, context columns from `column` on.
struct ForwardBlock {
  int64_t b, step, column;
  int rows, chunks;  // of 64 columns

  FASTSEQ_DEVICE ForwardBlock(const AttentionInputParams& in, int columns) {
    const int64_t blocks = divide_up(in.steps, kTileRows);
    b = blockIdx.x / blocks;
    step = blockIdx.x % blocks * kTileRows;
    column = static_cast<int64_t>(blockIdx.y) * columns;
    rows = in.steps - step < kTileRows ? static_cast<int>(in.steps - step) : kTileRows;
    chunks = static_cast<int>(divide_up(in.width - column < columns ? in.width - column : columns, 64));
  }
};

// Loads the unscaled scores of 32 steps and 64 positions from `scores` (rows, S). Reads tiles.open.
template <class Tile, class Tiles>
FASTSEQ_DEVICE void load_scores(
    float (&sum)[4][4], const AttentionInputParams& in, int64_t first, const float* scores, const Tiles& tiles) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int m = Tile::row(i / 4, i % 4), n = Tile::column(i / 4, i % 4);
    if (tiles.open[n] >> m & 1) sum[i / 4][i % 4] = scores[m * in.positions + first + n];
  }
}

// Writes scaled and masked scores to shared memory, and to `weights` (rows, S) unless it is null.
template <class Tile, class Tiles>
FASTSEQ_DEVICE void keep_scores(const float (&sum)[4][4],
                                const AttentionInputParams& in,
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

// sums = factor * sums + x * values, over `count` positions from `first` on. sums: (chunks, 16, threads); each thread
// accesses only its column.
template <class T, int N, class Tiles>
FASTSEQ_DEVICE void add_context(
    const ForwardBlock& block, const AttentionInputParams& in, int64_t first, int count, Tiles& tiles, float* sums) {
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

// Writes sums / divisors (kTileRows,) to the context.
template <class T, int N>
FASTSEQ_DEVICE void store_context(const ForwardBlock& block,
                                  const AttentionForwardParams& p,
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

// One block per 32 steps and `columns` context columns, a multiple of 64. The dot score's kernel reads p.scores instead
// of computing scores, if they are given.
template <class T, int N, bool kAdditive>
__global__ void __launch_bounds__(kTileThreads, 4) attention_forward_kernel(AttentionForwardParams p, int columns) {
  FASTSEQ_DYNAMIC_SHARED(memory);
  auto& tiles = *reinterpret_cast<ForwardTilesOf<T, kAdditive>*>(memory);
  float* sums = reinterpret_cast<float*>(memory + sizeof tiles);
  const AttentionInputParams& in = p.in;
  const ForwardBlock block(in, columns);
  const int64_t limit = position_limit(in, block.b);
  const int row = threadIdx.x / 4;  // of the softmax of this thread
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
    using Tile = RowProduct<std::conditional_t<kAdditive, float, T>>;
    if (!kAdditive && p.scores)
      load_scores<Tile>(sum, in, first, p.scores + (block.b * in.steps + block.step) * in.positions, tiles);
    else
      add_scores<T, N, kAdditive>(sum, in, block.b, block.step, first, block.rows, tiles);
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
    float* row_weights = weights + m * in.positions;
    finish_weights(row_weights, in.positions, limit, tiles.base[m], tiles.factor[m], lane_id(), 32);
  }
  store_context<T, N>(block, p, tiles.factor, sums);
}

}  // namespace fastseq::cuda
