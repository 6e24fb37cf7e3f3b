// Exchange of h between the blocks of a team, in the forward grid recurrence.
//
// Two buffers (tile, chunk, row, 64 bytes). A lane reads one 16-byte vector, a warp one line of 512 bytes. No flags, no
// fences: each word carries its own sequence tag, in bit 30 (MmaHalf, FmaFloat: never set, as |h| <= 1) or bit 0
// (MmaTf32: unused). The tag of step t is (t + 1) / 2 mod 2, so it flips from one use of a buffer to the next. A lane
// loads its vectors ahead and then those again in which a word lacks the tag.
//
// Invariants, proven in docs/kernels/cuda-grid.md:
//   1. A thread that reads a word does so in every use of the buffer: so it cannot take h of t - 4 for h of t.
//   2. A warp polls h(t) before the __syncthreads that precedes the store of h(t + 1): no block overwrites h(t) early.
//   3. A block reads h(t) once per pass, so no pass may be empty.
#pragma once

#include "cuda/lstm/grid_forward_arithmetic.cuh"

namespace fastseq::cuda::grid_forward {

// Index of the buffer that `step` reads: 0 holds h0; 1 and 2 serve odd and even steps.
FASTSEQ_DEVICE unsigned buffer_of(unsigned step) { return step == 0 ? 0 : 2 - step % 2; }

// A product's place in the sequence: a step, a pair of tiles of rows, and a pass over the groups of the block.
struct Place {
  int step, pair, pass;
};

// Reads h: the vectors of this lane's chunks and rows. request() loads them once and does not wait; complete() waits.
template <class M>
struct Hidden {
  using Words = uint32_t[M::kStage][2][4];  // of a stage: M::kStage chunks of both tiles

  uint32_t* buffers;  // (3, tiles, chunks, 8 rows, 16 words)
  int rows;           // of the team
  int hidden;         // H
  SpinLimit limit;

  static FASTSEQ_DEVICE uint32_t tag_of(unsigned step) { return (step + 1) / 2 % 2 * M::kTag; }

  FASTSEQ_DEVICE uint32_t* buffer(const Plan& plan, int step) const {
    return buffers + buffer_of(step) * plan.buffer_words;
  }

  // This lane's words of the first tile of a pair, from chunk `first` on.
  FASTSEQ_DEVICE uint32_t* line(const Plan& plan, const Place& at, int first) const {
    const unsigned lane = thread_now() % 32u, chunk = 2 * at.pair * plan.chunks + first;
    return buffers + (buffer_of(at.step) * plan.buffer_words + (chunk * kTile * kChunkWords + 4 * lane));
  }

  // Chunks, from `first` on, of which this lane has a vector: to the end of the warp's chunks or of K.
  FASTSEQ_DEVICE int chunks(const Plan& plan, int first) const {
    constexpr int kChunk = 4 * M::kVector;
    const unsigned thread = thread_now(), before = thread % 4 * M::kVector;
    return min((thread / 32 + 1) * plan.warp_chunks, (hidden - before + kChunk - 1) / kChunk) - first;
  }

  FASTSEQ_DEVICE bool exists(int pair, int tile) const {
    return pair * kPair + tile * kTile + static_cast<int>(thread_now() % 32u / 4) < rows;
  }

  // A vector that does not exist is complete: it holds the tag.
  FASTSEQ_DEVICE void request(Words& words, const Plan& plan, const Place& at, int first) const {
    const uint32_t tag = tag_of(at.step);
    const uint32_t* from = line(plan, at, first);
    const int count = chunks(plan, first);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int wanted = exists(at.pair, tile) ? count : 0;
#pragma unroll
      for (int c = 0; c < M::kStage; ++c) {
        uint32_t (&vector)[4] = words[c][tile];
        vector[0] = vector[1] = vector[2] = vector[3] = tag;
        load_relaxed(vector, from + (tile * plan.chunks + c) * (kTile * kChunkWords), c < wanted);
      }
    }
  }

  // Not 0 if a word lacks the tag.
  static FASTSEQ_DEVICE uint32_t missing(const uint32_t (&vector)[4], uint32_t tag) {
    return ((vector[0] ^ tag) | (vector[1] ^ tag) | (vector[2] ^ tag) | (vector[3] ^ tag)) & M::kTag;
  }

  static FASTSEQ_DEVICE uint32_t missing(const Words& words, uint32_t tag) {
    uint32_t all = 0;
#pragma unroll
    for (int c = 0; c < M::kStage; ++c) all |= missing(words[c][0], tag) | missing(words[c][1], tag);
    return all;
  }

  // Waits until every word has the tag of the step, then removes it. Loads again what lacked it, and nothing else: a
  // vector that has the tag does not change until this block has sent h of the next step.
  FASTSEQ_DEVICE void complete(Words& words, const Plan& plan, const Place& at, int first) const {
    const uint32_t tag = tag_of(at.step);
    if (at.step > 0) {  // h0 has no tag: a grid barrier precedes step 0
      SpinTimeout timeout;
      while (missing(words, tag)) {
        if (timeout.expired(limit)) give_up(plan, at, first);
        const uint32_t* from = line(plan, at, first);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int c = 0; c < M::kStage; ++c) {
            uint32_t (&vector)[4] = words[c][tile];
            load_relaxed(vector, from + (tile * plan.chunks + c) * (kTile * kChunkWords), missing(vector, tag));
          }
        }
      }
    }
    __syncwarp();
    // Opaque: decode() is to stand beside its product, not before all of them.
#pragma unroll
    for (int c = 0; c < M::kStage; ++c) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int k = 0; k < 4; ++k) words[c][tile][k] = opaque(static_cast<int>(words[c][tile][k]));
      }
    }
  }

  // Operands of the product: the vector without the tag.
  static FASTSEQ_DEVICE void decode(uint32_t (&operands)[4], const uint32_t (&vector)[4], int step) {
#pragma unroll
    for (int k = 0; k < 4; ++k) operands[k] = M::decode(vector[k] ^ tag_of(step), step > 0);
  }

  // Ends a wait in vain: the vectors that this lane polls become NaN with the tag of the step. So all later results of
  // these rows are NaN, and no product reads a mixture of two steps.
  FASTSEQ_DEVICE void give_up(const Plan& plan, const Place& at, int first) const {
    const int count = min(M::kStage, chunks(plan, first));
    const uint32_t word = M::encode(as_float(kNaNWord), as_float(kNaNWord)) | tag_of(at.step);
    uint32_t* to = line(plan, at, first);
#pragma unroll 1
    for (int k = 0; k < 2 * 4; ++k) {
      if (!exists(at.pair, k / 4)) continue;
      for (int c = 0; c < count; ++c) {
        store_relaxed(to + (k / 4 * plan.chunks + c) * (kTile * kChunkWords) + k % 4, word);
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
    uint32_t* buffer, uint32_t tag, const Plan& plan, bool present, unsigned row, unsigned unit, float h) {
  constexpr unsigned kChunk = 4 * M::kVector;
  const float next = M::kWord == 2 ? __shfl_down_sync(kAllLanes, h, 1) : 0.0f;
  if (!present || unit % M::kWord) return;
  const unsigned line = (row / kTile * plan.chunks + unit / kChunk) * kTile + row % kTile;
  store_relaxed(buffer + line * kChunkWords + unit % kChunk / M::kWord, M::encode(h, next) | tag);
}

}  // namespace fastseq::cuda::grid_forward
