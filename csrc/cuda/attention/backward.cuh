// Attention backward. Stores nothing of size (B, T, S, A). Every sum has a fixed order, so results repeat bit for bit.
// Derivation: docs/ops/attention.md
//
//   1. attention_grad_softmax_kernel    dL/dweights (B, T, S); partial sums of its mean under the weights
//   2. attention_product_kernel         grad_values; dot score: also grad_query and grad_keys
//   3. attention_tanh_kernel            additive score: grad_keys; partial sums of grad_query and grad_weight
//   4. attention_query_kernel           additive score: grad_query; partial sums of grad_bias
//   5. attention_sum_kernel             additive score: grad_weight, grad_bias, grad_coverage_weight
//
// With coverage, the kernels of coverage.cuh take the place of 3.
//
// The gradient of a score is computed where it is used: weight * (grad_softmax - mean) * scale, or 0 where the weight
// is 0, because grad_softmax may be NaN there.
#pragma once

#include "cuda/attention/tanh.cuh"
#include "cuda/attention/tile.cuh"

namespace fastseq::cuda {

// Returns the mean of dL/dweights under the weights, for one step.
FASTSEQ_DEVICE float mean_of(const AttentionBackwardParams& p, int64_t b, int64_t step) {
  const int64_t parts = divide_up(p.in.positions, kGradPositions);
  float mean = 0;
  for (int64_t i = 0; i < parts; ++i) mean += p.means[(b * p.in.steps + step) * parts + i];
  return mean;
}

FASTSEQ_DEVICE float score_gradient(const AttentionBackwardParams& p, int64_t b, int64_t step, int64_t s, float mean) {
  const int64_t at = (b * p.in.steps + step) * p.in.positions + s;
  const float weight = p.weights[at];
  return weight == 0 ? 0.0f : weight * (p.grad_softmax[at] - mean) * p.in.scale;
}

// In dynamic shared memory, because static arrays are limited to 48 KiB.
template <class E>
struct ProductTiles {
  E x[kTileRows * kTileStride<E>];
  E y[kTileColumns * kTileStride<E>];
  float row_value[kTileDepth];
  unsigned open[kTileColumns];
  float products[kTileRows * kTileStride<float>];
};

// One block per 32 steps and 64 positions.
template <class T, int N>
__global__ void __launch_bounds__(kTileThreads, 4) attention_grad_softmax_kernel(AttentionBackwardParams p) {
  FASTSEQ_DYNAMIC_SHARED(memory);
  auto& tiles = *reinterpret_cast<ProductTiles<T>*>(memory);
  using Tile = RowProduct<T>;
  const AttentionInputParams& in = p.in;
  const int64_t blocks = divide_up(in.steps, kTileRows), b = blockIdx.x / blocks;
  const int64_t step = blockIdx.x % blocks * kTileRows, first = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  const int rows = in.steps - step < kTileRows ? static_cast<int>(in.steps - step) : kTileRows;
  const int64_t left = position_limit(in, b) - first;
  const int count = left < 0 ? 0 : left < kTileColumns ? static_cast<int>(left) : kTileColumns;
  float sum[4][4];
  clear(sum);
  for (int64_t d = 0; count && d < in.width; d += kTileDepth) {
    const int depth = in.width - d < kTileDepth ? static_cast<int>(in.width - d) : kTileDepth;
    load_tile<N, kTileRows>(tiles.x, row_of<T>(p.grad_context, b, step) + d, p.grad_context.row, depth,
                            [&](int r) { return r < rows; });
    load_tile<N, kTileColumns>(tiles.y, row_of<T>(in.values, b, first) + d, in.values.row, depth,
                               [&](int r) { return r < count; });
    __syncthreads();
    Tile::add(sum, tiles.x, tiles.y, rows, depth);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int m = Tile::row(i / 4, i % 4), n = Tile::column(i / 4, i % 4);
    float product = 0;
    if (m < rows && n < count) {
      const int64_t at = (b * in.steps + step + m) * in.positions + first + n;
      float grad = sum[i / 4][i % 4];
      if (p.grad_weights.data) grad += to_float(row_of<T>(p.grad_weights, b, step + m)[first + n]);
      const float weight = p.weights[at];
      p.grad_softmax[at] = grad;
      product = weight == 0 ? 0.0f : weight * grad;
    }
    tiles.products[m * kTileStride<float> + n] = product;
  }
  __syncthreads();
  const int row = threadIdx.x / 4;
  float mean = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) mean += tiles.products[row * kTileStride<float> + threadIdx.x % 4 + 4 * i];
  mean += __shfl_xor_sync(kAllLanes, mean, 1);
  mean += __shfl_xor_sync(kAllLanes, mean, 2);
  if (threadIdx.x % 4 == 0 && row < rows) p.means[(b * in.steps + step + row) * gridDim.y + blockIdx.y] = mean;
}

// grad_values (S, D) = weights^T grad_context. For the dot score, with the gradients g (T, S) of the scores:
// grad_keys (S, A) = g^T query and grad_query (T, A) = g keys.
enum class Gradient { kValues, kKeys, kQuery };

// Loads the left factor: 32 rows of the result, kTileDepth of the reduced dimension.
template <class T, Gradient kGradient>
FASTSEQ_DEVICE void load_factor(const AttentionBackwardParams& p,
                                int64_t b,
                                int64_t row,
                                int64_t rows,
                                int64_t inner,
                                int64_t depth,
                                ProductTiles<T>& tiles) {
  for_tile<kTileRows * kTileDepth>([&](int i) {
    constexpr bool kSteps = kGradient == Gradient::kQuery;  // rows are steps
    const int m = kSteps ? i / kTileDepth : i % kTileRows, k = kSteps ? i % kTileDepth : i / kTileRows;
    const int64_t step = kSteps ? row + m : inner + k, s = kSteps ? inner + k : row + m;
    float x = 0;
    if (m < rows && k < depth) {
      if constexpr (kGradient == Gradient::kValues)
        x = p.weights[(b * p.in.steps + step) * p.in.positions + s];
      else
        x = score_gradient(p, b, step, s, tiles.row_value[kSteps ? m : k]);
    }
    from_float(x, tiles.x + m * kTileStride<T> + k);
  });
}

// One block per 32 rows and 64 columns.
template <class T, int N, Gradient kGradient>
__global__ void __launch_bounds__(kTileThreads, 4) attention_product_kernel(AttentionBackwardParams p) {
  FASTSEQ_DYNAMIC_SHARED(memory);
  auto& tiles = *reinterpret_cast<ProductTiles<T>*>(memory);
  constexpr bool kSteps = kGradient == Gradient::kQuery, kValues = kGradient == Gradient::kValues;
  const AttentionInputParams& in = p.in;
  const int64_t all_rows = kSteps ? in.steps : in.positions, width = kValues ? in.width : in.size;
  const int64_t blocks = divide_up(all_rows, kTileRows), b = blockIdx.x / blocks;
  const int64_t row = blockIdx.x % blocks * kTileRows, column = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  const int rows = all_rows - row < kTileRows ? static_cast<int>(all_rows - row) : kTileRows;
  const int64_t limit = position_limit(in, b);
  const int64_t inner = kSteps ? limit : row < limit ? in.steps : 0;
  const Rows& right = kSteps ? in.keys : kValues ? p.grad_context : in.query;
  if (kSteps && threadIdx.x < rows) tiles.row_value[threadIdx.x] = mean_of(p, b, row + threadIdx.x);
  float sum[4][4];
  clear(sum);
  for (int64_t k = 0; k < inner; k += kTileDepth) {
    const int depth = inner - k < kTileDepth ? static_cast<int>(inner - k) : kTileDepth;
    if (kSteps && threadIdx.x < kTileDepth) {
      tiles.open[threadIdx.x] = attending_steps(in, b, row, k + threadIdx.x, limit);
    }
    if (kGradient == Gradient::kKeys && threadIdx.x < depth) {
      tiles.row_value[threadIdx.x] = mean_of(p, b, k + threadIdx.x);
    }
    __syncthreads();
    load_factor<T, kGradient>(p, b, row, rows, k, depth, tiles);
    load_tile<N, kTileDepth>(tiles.y, row_of<T>(right, b, k) + column, right.row, width - column,
                             [&](int r) { return r < depth && (!kSteps || tiles.open[r] != 0); });
    __syncthreads();
    ColumnProduct<T>::add(sum, tiles.x, tiles.y, rows, depth);
    __syncthreads();  // not needed, but without it loads move up: 80 registers instead of 72 on sm_90
  }
  T* out = static_cast<T*>(kSteps ? p.grad_query : kValues ? p.grad_values : p.grad_keys);
  store_tile<N>(sum, out + (b * all_rows + row) * width + column, width, rows, width - column);
}

constexpr int kTanhThreads = 256;
constexpr int kTanhWarps = kTanhThreads / 32;
constexpr int kTanhKeys = kTanhPositions / kTanhWarps;  // keys of a thread, in registers
constexpr int kTanhSteps = 16;                          // steps in shared memory at once

struct TanhTiles {
  float grads[kTanhSteps][kTanhPositions];    // gradients of the scores
  float queries[kTanhSteps][32];              // query + bias, prepared
  float partial[kTanhWarps][kTanhSteps][32];  // grad_query over each warp's positions
  float largest[2][kTanhWarps];
  unsigned char open[kTanhPositions];  // 1 if any step attends to the position
};

// Returns query + bias of one step and column `a`; 0 past the last column.
template <class T>
FASTSEQ_DEVICE float biased_query(const AttentionInputParams& in, int64_t b, int64_t step, int64_t a) {
  if (a >= in.size) return 0;
  const float q = to_float(row_of<T>(in.query, b, step)[a]);
  return in.bias ? q + to_float(static_cast<const T*>(in.bias)[a]) : q;
}

// Chooses one tanh formulation for all queries and for the keys of the block.
template <class T>
FASTSEQ_DEVICE TanhForm choose_block_tanh(
    const AttentionInputParams& in, int64_t b, int64_t a, const float (&keys)[kTanhKeys], TanhTiles& tiles) {
  const int warp = threadIdx.x / 32;
  float query = 0, key = 0;
  for (int64_t t = warp; t < in.steps; t += kTanhWarps) query = fmaxf(query, fabsf(biased_query<T>(in, b, t, a)));
#pragma unroll
  for (int j = 0; j < kTanhKeys; ++j) key = fmaxf(key, fabsf(keys[j]));
  query = warp_max(query);
  key = warp_max(key);
  if (lane_id() == 0) {
    tiles.largest[0][warp] = query;
    tiles.largest[1][warp] = key;
  }
  __syncthreads();
  for (int i = 0; i < kTanhWarps; ++i) {
    query = fmaxf(query, tiles.largest[0][i]);
    key = fmaxf(key, tiles.largest[1][i]);
  }
  return choose_tanh(query, key);
}

// Loads score gradients and queries of kTanhSteps steps into shared memory.
template <class T, class Tanh>
FASTSEQ_DEVICE void load_steps(const AttentionBackwardParams& p,
                               int64_t b,
                               int64_t step,
                               int64_t first,
                               int64_t limit,
                               int64_t a,
                               TanhTiles& tiles) {
  const AttentionInputParams& in = p.in;
  for (int t = threadIdx.x / 32; t < kTanhSteps; t += kTanhWarps) {
    const bool inside = step + t < in.steps;
    const float mean = inside ? mean_of(p, b, step + t) : 0.0f;
    for (int s = lane_id(); s < kTanhPositions; s += 32) {
      tiles.grads[t][s] = inside && first + s < limit ? score_gradient(p, b, step + t, first + s, mean) : 0.0f;
    }
    tiles.queries[t][lane_id()] = inside ? Tanh::prepare(biased_query<T>(in, b, step + t, a)) : 0.0f;
  }
}

// Accumulates grad_keys and query_parts, both without the factor weight[a]. Returns the gradient of weight[a].
template <class T, class Tanh>
FASTSEQ_DEVICE float tanh_gradients(const AttentionBackwardParams& p,
                                    int64_t b,
                                    int64_t part,
                                    int64_t a,
                                    float (&keys)[kTanhKeys],  // prepared in place
                                    float (&grad_keys)[kTanhKeys],
                                    TanhTiles& tiles) {
  const AttentionInputParams& in = p.in;
  const int64_t parts = divide_up(in.positions, kTanhPositions), limit = position_limit(in, b);
  const int warp = threadIdx.x / 32;
  float* query_part = p.query_parts + (b * parts + part) * in.steps * in.size;
  float grad_weight = 0;
#pragma unroll
  for (int j = 0; j < kTanhKeys; ++j) keys[j] = Tanh::prepare(keys[j]);
  for (int64_t step = 0; step < in.steps; step += kTanhSteps) {
    const int steps = in.steps - step < kTanhSteps ? static_cast<int>(in.steps - step) : kTanhSteps;
    load_steps<T, Tanh>(p, b, step, part * kTanhPositions, limit, a, tiles);
    __syncthreads();
    for (int t = 0; t < steps; ++t) {
      const float query = tiles.queries[t][lane_id()];
      float grad[kTanhKeys], grad_query = 0;
      load_wide(grad, &tiles.grads[t][warp * kTanhKeys]);
#pragma unroll
      for (int j = 0; j < kTanhKeys; ++j) {
        const float hidden = Tanh::of(query, keys[j]), weighted = grad[j] * hidden;
        const float slope = grad[j] - weighted * hidden;
        grad_weight += weighted;
        grad_query += slope;
        grad_keys[j] += slope;
      }
      tiles.partial[warp][t][lane_id()] = grad_query;
    }
    __syncthreads();
    for (int t = warp; t < steps; t += kTanhWarps) {
      float sum = 0;
      for (int i = 0; i < kTanhWarps; ++i) sum += tiles.partial[i][t][lane_id()];
      if (a < in.size) query_part[(step + t) * in.size + a] = sum;
    }
  }
  return grad_weight;
}

// One block per 128 positions and 32 columns, all steps. One thread per 16 positions of a column.
template <class T>
__global__ void __launch_bounds__(kTanhThreads, 2) attention_tanh_kernel(AttentionBackwardParams p) {
  FASTSEQ_DYNAMIC_SHARED(memory);
  auto& tiles = *reinterpret_cast<TanhTiles*>(memory);
  const AttentionInputParams& in = p.in;
  const int64_t parts = divide_up(in.positions, kTanhPositions), b = blockIdx.x / parts, part = blockIdx.x % parts;
  const int64_t a = blockIdx.y * 32 + lane_id(), limit = position_limit(in, b);
  const int warp = threadIdx.x / 32;
  const int64_t first = part * kTanhPositions + warp * kTanhKeys;
  if (threadIdx.x < kTanhPositions) {
    unsigned open = 0;
    for (int64_t t = 0; t < in.steps; t += 32) {
      open |= attending_steps(in, b, t, part * kTanhPositions + threadIdx.x, limit);
    }
    tiles.open[threadIdx.x] = open != 0;
  }
  __syncthreads();
  float keys[kTanhKeys], grad_keys[kTanhKeys] = {}, grad_weight = 0;
#pragma unroll
  for (int j = 0; j < kTanhKeys; ++j) {
    const bool exists = tiles.open[warp * kTanhKeys + j] && a < in.size;
    keys[j] = exists ? to_float(row_of<T>(in.keys, b, first + j)[a]) : 0.0f;
  }
  if (part * kTanhPositions < limit) {  // attention_query_kernel reads no other part
    TanhForm form = TanhForm::kDirect;
    if constexpr (sizeof(T) == 4) form = choose_block_tanh<T>(in, b, a, keys, tiles);
    if (form == TanhForm::kDirect)
      grad_weight = tanh_gradients<T, DirectTanh<T>>(p, b, part, a, keys, grad_keys, tiles);
    if constexpr (sizeof(T) == 4) {
      if (form == TanhForm::kAddition)
        grad_weight = tanh_gradients<T, AdditionTanh>(p, b, part, a, keys, grad_keys, tiles);
      if (form == TanhForm::kExponential)
        grad_weight = tanh_gradients<T, ExponentialTanh>(p, b, part, a, keys, grad_keys, tiles);
    }
  }
  __syncthreads();
  tiles.partial[0][warp][lane_id()] = grad_weight;
  __syncthreads();
  if (a >= in.size) return;
  const float weight = to_float(static_cast<const T*>(in.weight)[a]);
#pragma unroll
  for (int j = 0; j < kTanhKeys; ++j) {
    if (first + j >= in.positions) break;
    from_float(weight * grad_keys[j], static_cast<T*>(p.grad_keys) + (b * in.positions + first + j) * in.size + a);
  }
  if (warp != 0) return;
  float sum = 0;
  for (int i = 0; i < kTanhWarps; ++i) sum += tiles.partial[0][i][lane_id()];
  p.weight_parts[(b * parts + part) * in.size + a] = sum;
}

// Sums x over the warps of a block, lane by lane; the sum is valid in warp 0. All threads must call it.
FASTSEQ_DEVICE float sum_warps(float x) {
  FASTSEQ_SHARED(float, partial, kTanhThreads);
  partial[threadIdx.x] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kTanhWarps; ++i) sum += partial[i * 32 + lane_id()];
  return sum;
}

// grad_query = weight * sum of query_parts; bias_parts: its sums over kSumSteps steps. One block per 32 columns.
template <class T>
__global__ void __launch_bounds__(kTanhThreads) attention_query_kernel(AttentionBackwardParams p) {
  const AttentionInputParams& in = p.in;
  const int64_t blocks = divide_up(in.steps, kSumSteps), b = blockIdx.x / blocks;
  const int64_t first = blockIdx.x % blocks * kSumSteps, a = blockIdx.y * 32 + lane_id();
  const int64_t parts = divide_up(in.positions, kTanhPositions);
  const int64_t filled = divide_up(position_limit(in, b), kTanhPositions);
  const bool inside = a < in.size;
  const float weight = inside ? to_float(static_cast<const T*>(in.weight)[a]) : 0.0f;
  const int64_t end = in.steps - first < kSumSteps ? in.steps : first + kSumSteps;
  float bias = 0;
  for (int64_t t = first + threadIdx.x / 32; inside && t < end; t += kTanhWarps) {
    float sum = 0;
    for (int64_t i = 0; i < filled; ++i) sum += p.query_parts[((b * parts + i) * in.steps + t) * in.size + a];
    bias += sum * weight;
    from_float(sum * weight, static_cast<T*>(p.grad_query) + (b * in.steps + t) * in.size + a);
  }
  bias = sum_warps(bias);
  if (threadIdx.x < 32 && inside) p.bias_parts[blockIdx.x * in.size + a] = bias;
}

// Sums the parts of grad_weight (blockIdx.y = 0), grad_bias (1) or grad_coverage_weight (2). One block per 32 columns.
template <class T>
__global__ void __launch_bounds__(kTanhThreads) attention_sum_kernel(AttentionBackwardParams p) {
  const AttentionInputParams& in = p.in;
  const bool bias = blockIdx.y == 1, weight = blockIdx.y == 0;
  const int64_t rows = in.batch * (bias ? divide_up(in.steps, kSumSteps) : divide_up(in.positions, kTanhPositions));
  const float* x = bias ? p.bias_parts : weight ? p.weight_parts : p.coverage_weight_parts;
  void* out = bias ? p.grad_bias : weight ? p.grad_weight : p.grad_coverage_weight;
  const int64_t a = static_cast<int64_t>(blockIdx.x) * 32 + lane_id();
  float sum = 0;
  for (int64_t r = threadIdx.x / 32; a < in.size && r < rows; r += kTanhWarps) sum += x[r * in.size + a];
  sum = sum_warps(sum);
  if (threadIdx.x < 32 && a < in.size) from_float(sum, static_cast<T*>(out) + a);
}

}  // namespace fastseq::cuda
