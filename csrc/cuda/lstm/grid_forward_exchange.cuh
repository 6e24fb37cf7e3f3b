// Exchange of h between the blocks of a team, in the forward grid recurrence.
//
// Two buffers (tile, chunk, row, 64 bytes). A lane reads one 16-byte vector, a warp one line of 512 bytes. No flags, no
// fences: each word carries its own sequence tag, in bit 30 (MmaHalf, FmaFloat: never set, as |h| <= 1) or bit 0
// (MmaTf32: unused). The tag of step t is (t + 1) / 2 mod 2, so it flips from one use of a buffer to the next. A lane
// polls its vectors until all four words have the tag.
//
// Invariants, proven in docs/kernels/cuda-grid.md:
//   1. A thread that reads a word does so in every use of the buffer: so it cannot take h of t - 4 for h of t.
//   2. A warp polls h(t) before the __syncthreads that precedes the store of h(t + 1): no block overwrites h(t) early.
//   3. A block reads h(t) once per pass, so no pass may be empty.
#pragma once

#include "cuda/lstm/grid_forward_arithmetic.cuh"

namespace fastseq::cuda::grid_forward {

// Index of the buffer that `step` reads: 0 holds h0; 1 and 2 serve odd and even steps.
FASTSEQ_DEVICE int buffer_of(int step) { return step == 0 ? 0 : 2 - step % 2; }

// Reads h of one step: the vectors of this lane's chunks and rows.
template <class M>
struct Hidden {
  const uint32_t* buffer;  // (tiles, chunks, 8 rows, 16 words)
  int step;
  int rows;    // of the team
  int hidden;  // H
  SpinLimit limit;

  // Returns the end of the chunks in which this lane has a vector: the end of the warp's chunks or of K.
  static FASTSEQ_DEVICE int end(const Plan& plan, int hidden) {
    constexpr int kChunk = 4 * M::kVector;
    const int thread = thread_now(), before = thread % 4 * M::kVector;
    return min((thread / 32 + 1) * plan.warp_chunks, (hidden - before + kChunk - 1) / kChunk);
  }

  static FASTSEQ_DEVICE uint32_t tag_of(int step) { return (step + 1) / 2 % 2 ? M::kTag : 0; }

  // Loads M::kStage chunks of both tiles once. Returns true if every valid word has the tag.
  FASTSEQ_DEVICE bool poll(uint32_t (&h)[M::kStage][2][4], const Plan& plan, int pair, int first) const {
    const int last = end(plan, hidden);
    const uint32_t tag = tag_of(step);
    uint32_t wrong = 0;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int lane = thread_now() % 32;
      const bool exists = pair * kPair + tile * kTile + lane / 4 < rows;
      const int64_t line = (static_cast<int64_t>(2 * pair + tile) * plan.chunks + first) * kTile;
      const uint32_t* from = buffer + line * kChunkWords + 4 * lane;
#pragma unroll
      for (int c = 0; c < M::kStage; ++c) {
        uint32_t (&words)[4] = h[c][tile];
        words[0] = words[1] = words[2] = words[3] = tag;
        load_relaxed(words, from + c * kTile * kChunkWords, exists && first + c < last);
      }
    }
#pragma unroll
    for (int c = 0; c < M::kStage; ++c) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int k = 0; k < 4; ++k) wrong |= h[c][tile][k] ^= tag;
      }
    }
    return step == 0 || !(wrong & M::kTag);  // h0 has no tag: a grid barrier precedes step 0
  }

  // Ends a wait in vain: the vectors that this lane polls become NaN with the tag of the step. So all later results of
  // these rows are NaN, and no product reads a mixture of two steps.
  FASTSEQ_DEVICE void give_up(const Plan& plan, int pair, int first) const {
    const int last = min(first + M::kStage, end(plan, hidden)), lane = thread_now() % 32;
    const uint32_t word = M::encode(as_float(kNaNWord), as_float(kNaNWord)) | tag_of(step);
#pragma unroll 1
    for (int k = 0; k < 2 * 4; ++k) {
      const int64_t line = static_cast<int64_t>(2 * pair + k / 4) * plan.chunks;
      if (pair * kPair + k / 4 * kTile + lane / 4 >= rows) continue;
      for (int c = first; c < last; ++c) {
        store_relaxed(const_cast<uint32_t*>(buffer) + (line + c) * kTile * kChunkWords + 4 * lane + k % 4, word);
      }
    }
  }

  FASTSEQ_DEVICE void read(uint32_t (&h)[M::kStage][2][4], const Plan& plan, int pair, int first) const {
    SpinTimeout timeout;
    while (!poll(h, plan, pair, first)) {
      if (timeout.expired(limit)) give_up(plan, pair, first);
    }
    __syncwarp();
    if (step == 0) return;
#pragma unroll
    for (int c = 0; c < M::kStage; ++c) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int k = 0; k < 4; ++k) h[c][tile][k] = M::decode(h[c][tile][k]);
      }
    }
  }
};

// Stores h0 of this block's units, without tags. h0: (B, H) of the direction, from the team's first row on.
template <class M>
FASTSEQ_DEVICE void send_initial(
    uint32_t* buffer, const typename M::T* h0, int hidden, const BlockTask& task, const Plan& plan) {
  constexpr int kVectors = kUnits / M::kVector;  // of a group
  const int vectors = task.groups * kVectors;
#pragma unroll 1
  for (int k = threadIdx.x; k < task.rows * vectors; k += kThreads) {
    const int row = k / vectors, vector = task.group * kVectors + k % vectors;
    if (vector >= 4 * plan.chunks) continue;
    uint32_t words[4];
    load_operand<M>(words, h0 + static_cast<int64_t>(row) * hidden, vector * M::kVector, hidden);
    const int64_t line = (static_cast<int64_t>(row / kTile) * plan.chunks + vector / 4) * kTile + row % kTile;
    store_wide(buffer + line * kChunkWords + vector % 4 * 4, words);
  }
}

// Stores h of one unit of one row into `buffer`, the next step's. Warp-collective: for 16-bit types two adjacent lanes
// share a word. `present`: the lane has a unit.
template <class M>
FASTSEQ_DEVICE void send_hidden(
    uint32_t* buffer, uint32_t tag, const Plan& plan, bool present, int row, int unit, float h) {
  constexpr int kChunk = 4 * M::kVector;
  const float next = M::kWord == 2 ? __shfl_down_sync(kAllLanes, h, 1) : 0.0f;
  if (!present || unit % M::kWord) return;
  const int64_t line = (static_cast<int64_t>(row / kTile) * plan.chunks + unit / kChunk) * kTile + row % kTile;
  store_relaxed(buffer + line * kChunkWords + unit % kChunk / M::kWord, M::encode(h, next) | tag);
}

}  // namespace fastseq::cuda::grid_forward
