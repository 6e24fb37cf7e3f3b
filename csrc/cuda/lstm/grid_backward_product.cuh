// The product W_hh^T dgates of the backward grid recurrence. Each warp multiplies some chunks of k and keeps their
// weights for the whole sequence: kHeld chunks in registers, the rest in shared memory. Shared memory also collects the
// sums of all warps.
#pragma once

#include "cuda/lstm/grid_backward_layout.cuh"

namespace fastseq::cuda::grid_backward {

// Reads this lane's weights of one chunk of k; zero past H.
template <class Product, int R>
FASTSEQ_DEVICE void read_weights(typename Block<Product, R>::Weights& w, const Block<Product, R>& block, int chunk) {
  using T = typename Product::Element;
  const int64_t H = block.p.shape.hidden;
  const T* weight_hh = static_cast<const T*>(block.p.weight_hh) + block.direction * 4 * H * H;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    Product::pack(w[r], [&](int unit, int gate, int out) {
      const int64_t k = static_cast<int64_t>(chunk) * Product::kUnits + unit;
      const int64_t n = block.first_unit + r * kTileUnits + out;
      return k < H && n < H ? to_float(weight_hh[(gate * H + k) * H + n]) : 0.0f;
    });
  }
}

// Address in shared memory of a lane's weights of a chunk of the warp. Consecutive parts are 32 uint4 apart.
template <class Product, int R>
FASTSEQ_DEVICE typename Block<Product, R>::Part* shared_weights(const Block<Product, R>& block, int chunk) {
  constexpr int kHeld = Block<Product, R>::kHeld;
  const int warp = threadIdx.x / 32, at = warp * (block.plan.warp_chunks - kHeld) + chunk - kHeld;
  return reinterpret_cast<typename Block<Product, R>::Part*>(block.weights + at * R * Product::kParts * 32 + lane_id());
}

// Loads the weights of the warp: the first kHeld chunks into registers, the others into shared memory.
template <class Product, int R>
FASTSEQ_DEVICE void load_weights(typename Block<Product, R>::Weights (&held)[Block<Product, R>::kHeld],
                                 const Block<Product, R>& block) {
  constexpr int kHeld = Block<Product, R>::kHeld;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (k < block.chunks) read_weights(held[k], block, block.first_chunk + k);
  }
  for (int k = kHeld; k < block.chunks; ++k) {
    typename Block<Product, R>::Weights w;
    read_weights(w, block, block.first_chunk + k);
#pragma unroll
    for (int i = 0; i < R * Product::kParts; ++i)
      shared_weights(block, k)[i * 32] = w[i / Product::kParts][i % Product::kParts];
  }
}

// Multiplies `Count` chunks of this warp from `first` on. All loads are issued before the first product.
template <int Count, class Product, int R, class WeightsOf>
FASTSEQ_DEVICE void multiply_chunks(typename Product::Sums (&d)[R],
                                    const Block<Product, R>& block,
                                    const typename Product::Element* from,
                                    int tile_rows,
                                    int first,
                                    const WeightsOf& weights_of) {
  constexpr int kChunk = Block<Product, R>::kChunk;
  typename Product::Fragment fragment[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    if (first + k < block.chunks)
      fragment[k] = Product::load(from + static_cast<int64_t>(first + k) * kChunk, tile_rows);
  }
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    if (first + k >= block.chunks) break;
#pragma unroll
    for (int r = 0; r < R; ++r) Product::multiply(d[r], weights_of(first + k)[r], fragment[k]);
  }
}

// Writes the warp's partial product of one tile to shared memory: to (8 rows, kStride).
template <class Product, int R>
FASTSEQ_DEVICE void multiply_tile(const typename Block<Product, R>::Weights (&held)[Block<Product, R>::kHeld],
                                  const Block<Product, R>& block,
                                  const typename Product::Element* from,
                                  int tile_rows,
                                  float* to) {
  using Weights = typename Block<Product, R>::Weights;
  constexpr int kHeld = Block<Product, R>::kHeld;
  constexpr int kPrefetch = Product::kPrefetch < kHeld ? Product::kPrefetch : kHeld;
  static_assert(kHeld % kPrefetch == 0);
  constexpr int kFewer =
      kPrefetch < R ? kPrefetch : R;  // weights from shared memory also take registers, so prefetch fewer chunks
  typename Product::Sums d[R]{};
#pragma unroll
  for (int k = 0; k < kHeld; k += kPrefetch) {
    multiply_chunks<kPrefetch>(d, block, from, tile_rows, k, [&](int chunk) -> const Weights& { return held[chunk]; });
  }
  for (int k = kHeld; k < block.chunks; k += kPrefetch / kFewer) {
    Weights w;
    multiply_chunks<kPrefetch / kFewer>(d, block, from, tile_rows, k, [&](int chunk) -> const Weights& {
#pragma unroll
      for (int i = 0; i < R * Product::kParts; ++i) {
        w[i / Product::kParts][i % Product::kParts] = shared_weights(block, chunk)[i * 32];
      }
      return w;
    });
  }
#pragma unroll
  for (int r = 0; r < R; ++r) d[r].store(to + r * kTileUnits, Block<Product, R>::kStride);
}

// Multiplies the dgates of the previous step by W_hh^T: the block's units, tiles first .. first + count - 1.
template <class Product, int R>
FASTSEQ_DEVICE void multiply(const typename Block<Product, R>::Weights (&held)[Block<Product, R>::kHeld],
                             const Block<Product, R>& block,
                             int step,
                             int first,
                             int count) {
  constexpr int kChunk = Block<Product, R>::kChunk, kStride = Block<Product, R>::kStride;
  const int64_t of_tile = static_cast<int64_t>(block.plan.chunks) * kChunk;
  const typename Product::Element* from =
      block.exchange + ((step + 1) & 1) * block.buffer + static_cast<int64_t>(block.first_chunk) * kChunk;
  float* to = block.sums + threadIdx.x / 32 * block.plan.pass_tiles * kTileRows * kStride;
  for (int k = 0; k < count; ++k) {
    const int tile_rows = block.rows - (first + k) * kTileRows;
    multiply_tile(held, block, from + (first + k) * of_tile, tile_rows, to + k * kTileRows * kStride);
  }
}

// Adds the partial sums of all warps, in fixed order. row: index in the pass.
template <class Product, int R>
FASTSEQ_DEVICE float sum_of_warps(const Block<Product, R>& block, int row, int unit) {
  float sum = 0;
#pragma unroll 4
  for (int warp = 0; warp < block.plan.warps; ++warp) {
    sum += block.sums[(warp * block.plan.pass_tiles * kTileRows + row) * Block<Product, R>::kStride + unit];
  }
  return sum;
}

}  // namespace fastseq::cuda::grid_backward
