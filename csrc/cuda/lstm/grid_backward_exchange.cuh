// Exchange of the gradients of the gates (dgates) between the blocks of a group, in the backward grid recurrence.
//
// T [2 buffers][D][tile of 8 rows][chunk][8 rows][U units][4 gates]. A thread stores the four dgates of a unit, a lane
// loads 16 bytes. No flags, no fences: each 8 bytes carry their own sequence tag in bit 0, the last mantissa bit of di
// (16-bit types) or of di and dg (float). The bit is free in TF32; else the sender rounds it away. Rows past the batch
// are neither stored nor polled; units past H are, as zeros.
//
// Step s reads buffer (s + 1) & 1, the dgates of step s - 1, with tag (s + 1) / 2 mod 2; so the tag flips from one use
// of a buffer to the next, and step 0 finds the zeros of the workspace.
//
// Invariants, proven in docs/kernels/cuda-grid.md:
//   1. A thread that reads a word does so in every use of the buffer: so it cannot take dgates of step s - 5 for s - 1.
//   2. All warps poll the dgates of step s - 1 before the __syncthreads that precedes the stores of step s: no block
//      overwrites dgates that another still reads.
#pragma once

#include "cuda/lstm/grid_backward_layout.cuh"

namespace fastseq::cuda::grid_backward {

constexpr uint64_t kNaNPair = 0x7ffe7ffe7ffe7ffeu;  // NaN with tag 0, as two floats and as four 16-bit numbers

// Tag of the dgates that `step` reads.
FASTSEQ_DEVICE uint32_t tag_of(int step) { return (step + 1) / 2 % 2; }

// The dgates of one tile that a warp reads in a step.
template <class Product>
struct Source {
  const uint64_t* pairs;  // first chunk of the warp
  int rows;               // of the tile
  int chunks;             // of the warp
  uint32_t tag;
  SpinLimit limit;
  unsigned* stalled;  // Plan::stalled

  // The lane's vector of a chunk.
  FASTSEQ_DEVICE const uint64_t* at(int chunk, int vector) const {
    constexpr int kChunkVectors = kTileRows * Product::kUnits * sizeof(typename Product::Element) / 4;
    return pairs + (chunk * kChunkVectors + Product::place(vector, rows)) * 2;
  }
};

// Source of a tile of the block's group.
template <class Product, int R>
FASTSEQ_DEVICE Source<Product> source_of(const Block<Product, R>& block, int step, int tile) {
  const int64_t chunk = static_cast<int64_t>(tile) * block.plan.chunks + block.first_chunk;
  return {.pairs = block.exchange + ((step + 1) & 1) * block.buffer + chunk * Block<Product, R>::kChunk,
          .rows = block.rows - tile * kTileRows,
          .chunks = block.chunks,
          .tag = tag_of(step),
          .limit = {block.p.shape.spin_limit, block.stop},
          .stalled = block.plan.stalled};
}

// A lane's dgates of `Count` chunks.
template <class Product, int Count>
struct Stage {
  uint64_t pairs[Count][Product::kVectors][2];

  // Chunk k of the stage; past the warp's chunks, the last one.
  static FASTSEQ_DEVICE int chunk_of(const Source<Product>& from, int first, int k) {
    return Count == 1 ? first : min(first + k, from.chunks - 1);
  }

  // Issues the loads of the chunks from `first` on, of which one exists. A vector that does not exist is zero.
  FASTSEQ_DEVICE void load(const Source<Product>& from, int first) {
#pragma unroll
    for (int k = 0; k < Count; ++k) {
#pragma unroll
      for (int v = 0; v < Product::kVectors; ++v) {
        pairs[k][v][0] = pairs[k][v][1] = from.tag;
        load_relaxed(pairs[k][v], from.at(chunk_of(from, first, k), v), Product::exists(v, from.rows));
      }
    }
  }

  // Waits until every vector has the tag, and clears the tags. Loads only vectors with an old tag again.
  FASTSEQ_DEVICE void wait(const Source<Product>& from, int first) {
    SpinTimeout timeout;
    while (flip(from.tag) & 1) {
      if (timeout.expired(from.limit)) {
        give_up(from, first);
        load(from, first);
        continue;
      }
#pragma unroll
      for (int k = 0; k < Count; ++k) {
#pragma unroll
        for (int v = 0; v < Product::kVectors; ++v) {
          const bool old = static_cast<uint32_t>(pairs[k][v][0] | pairs[k][v][1]) & 1;
          pairs[k][v][0] ^= from.tag;
          pairs[k][v][1] ^= from.tag;
          load_relaxed(pairs[k][v], from.at(chunk_of(from, first, k), v), old);
        }
      }
    }
    __syncwarp();
  }

  // Flips the bit of the tag: it is 0 where the tag was right. Returns all words with a tag, or'ed.
  FASTSEQ_DEVICE uint32_t flip(uint32_t tag) {
    uint32_t all = 0;
#pragma unroll
    for (int k = 0; k < Count; ++k) {
#pragma unroll
      for (int v = 0; v < Product::kVectors; ++v) {
        all |= static_cast<uint32_t>(pairs[k][v][0] ^= tag) | static_cast<uint32_t>(pairs[k][v][1] ^= tag);
      }
    }
    return all;
  }

  // The words of a chunk.
  FASTSEQ_DEVICE void get(uint32_t (&words)[Product::kVectors][4], int chunk) const {
#pragma unroll
    for (int v = 0; v < Product::kVectors; ++v) {
#pragma unroll
      for (int k = 0; k < 4; ++k) words[v][k] = static_cast<uint32_t>(pairs[chunk][v][k / 2] >> (k % 2 * 32));
    }
  }

  // Ends a wait in vain: the vectors of this stage become NaN with the tag of the step. So all later results of these
  // rows are NaN, and no product reads a mixture of two steps. Reports the stall to the host.
  static FASTSEQ_DEVICE void give_up(const Source<Product>& from, int first) {
    if (from.stalled) store_release(from.stalled, 1);
    const uint64_t pair = kNaNPair | from.tag, nan[2] = {pair, pair};
#pragma unroll 1
    for (int k = 0; k < Count * Product::kVectors; ++k) {
      const int chunk = chunk_of(from, first, k / Product::kVectors), vector = k % Product::kVectors;
      if (Product::exists(vector, from.rows)) store_relaxed(const_cast<uint64_t*>(from.at(chunk, vector)), nan);
    }
  }
};

// Stores the dgates of one unit of one row for the next step. exact: before their rounding to the type.
template <class Product, int R>
FASTSEQ_DEVICE void send(const Block<Product, R>& block,
                         unsigned row,
                         unsigned unit,
                         int step,
                         const Vector<typename Product::Element, 4>& dgates,
                         const float (&exact)[4]) {
  constexpr int kPairs = Block<Product, R>::kUnitPairs;
  uint32_t words[2 * kPairs];
  Product::encode(words, dgates, exact);
  uint64_t pairs[kPairs];
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    pairs[k] = static_cast<uint64_t>(words[2 * k + 1]) << 32 | words[2 * k] | tag_of(step + 1);
  }
  const unsigned at = block.first_unit + unit, tile = row / kTileRows;
  const unsigned chunk = tile * block.plan.chunks + at / Product::kUnits;
  const unsigned within = (row % kTileRows * Product::kUnits + at % Product::kUnits) * kPairs;
  uint64_t* buffer = block.exchange + (step & 1) * block.buffer;
  store_relaxed(buffer + (static_cast<uint64_t>(chunk) * Block<Product, R>::kChunk + within), pairs);
}

}  // namespace fastseq::cuda::grid_backward
