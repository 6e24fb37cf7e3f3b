// The product W_hh^T dgates of the backward grid recurrence. Each warp multiplies some chunks of k and keeps their
// weights for the whole sequence: kHeld chunks in registers, the rest in shared memory. Shared memory also collects the
// sums of all warps.
#pragma once

#include "cuda/lstm/grid_backward_exchange.cuh"

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

// Multiplies `Count` chunks of this warp from `first` on. Calls meanwhile() while the polls are in flight.
template <int Count, class Product, int R, class WeightsOf, class Meanwhile>
FASTSEQ_DEVICE void multiply_chunks(typename Product::Sums (&d)[R],
                                    const Source<Product>& from,
                                    int first,
                                    const WeightsOf& weights_of,
                                    const Meanwhile& meanwhile) {
  Stage<Product, Count> stage;
  stage.load(from, first);
  meanwhile();
  stage.wait(from, first);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    if (first + k >= from.chunks) break;
    uint32_t dgates[Product::kVectors][4];
    stage.get(dgates, k);
#pragma unroll
    for (int r = 0; r < R; ++r) Product::multiply(d[r], weights_of(first + k)[r], dgates);
  }
}

// Writes the warp's partial product of one tile to shared memory: to (8 rows, kStride).
template <class Product, int R, class Meanwhile>
FASTSEQ_DEVICE void multiply_tile(const typename Block<Product, R>::Weights (&held)[Block<Product, R>::kHeld],
                                  const Block<Product, R>& block,
                                  const Source<Product>& from,
                                  float* to,
                                  const Meanwhile& meanwhile) {
  using Weights = typename Block<Product, R>::Weights;
  constexpr int kHeld = Block<Product, R>::kHeld, kStage = Block<Product, R>::kStage;
  static_assert(kHeld % kStage == 0);
  constexpr int kFewer = kStage < R ? kStage : R;  // weights from shared memory also take registers
  typename Product::Sums d[R]{};
#pragma unroll
  for (int k = 0; k < kHeld; k += kStage) {
    if (k >= from.chunks) break;
    const auto weights_of = [&](int chunk) -> const Weights& { return held[chunk]; };
    multiply_chunks<kStage>(d, from, k, weights_of, [&] {
      if (k == 0) meanwhile();
    });
  }
  for (int k = kHeld; k < from.chunks; k += kStage / kFewer) {
    Weights w;
    const auto weights_of = [&](int chunk) -> const Weights& {
#pragma unroll
      for (int i = 0; i < R * Product::kParts; ++i) {
        w[i / Product::kParts][i % Product::kParts] = shared_weights(block, chunk)[i * 32];
      }
      return w;
    };
    multiply_chunks<kStage / kFewer>(d, from, k, weights_of, [] {});
  }
#pragma unroll
  for (int r = 0; r < R; ++r) d[r].store(to + r * kTileUnits, Block<Product, R>::kStride);
}

// Multiplies the dgates of the previous step by W_hh^T: the block's units, tiles first .. first + count - 1. Calls
// meanwhile() once, while the first polls are in flight.
template <class Product, int R, class Meanwhile>
FASTSEQ_DEVICE void multiply(const typename Block<Product, R>::Weights (&held)[Block<Product, R>::kHeld],
                             const Block<Product, R>& block,
                             int step,
                             int first,
                             int count,
                             const Meanwhile& meanwhile) {
  float* to = block.sums + threadIdx.x / 32 * Block<Product, R>::kTileSums;
  for (int k = 0; k < count; ++k) {
    multiply_tile(held, block, source_of(block, step, first + k), to + k * kMaxWarps * Block<Product, R>::kTileSums,
                  [&] {
                    if (k == 0) meanwhile();
                  });
  }
}

// Zeroes the sums of the warps that the block lacks.
template <class Product, int R>
FASTSEQ_DEVICE void clear_sums(const Block<Product, R>& block) {
  for (int k = threadIdx.x; k < block.plan.pass_tiles * kMaxWarps * Block<Product, R>::kTileSums; k += blockDim.x) {
    if (k / Block<Product, R>::kTileSums % kMaxWarps >= block.plan.warps) block.sums[k] = 0.0f;
  }
}

// Adds the partial sums of all warps, in fixed order. row: index in the pass.
template <class Product, int R>
FASTSEQ_DEVICE float sum_of_warps(const Block<Product, R>& block, unsigned row, unsigned unit) {
  using B = Block<Product, R>;
  const float* from = block.sums + row / kTileRows * kMaxWarps * B::kTileSums + row % kTileRows * B::kStride + unit;
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kMaxWarps; ++warp) sum += from[warp * B::kTileSums];
  return sum;
}

}  // namespace fastseq::cuda::grid_backward
