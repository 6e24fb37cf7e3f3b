// How the forward cluster recurrence sends h: words, pieces of 8 bytes, one store for each block of the cluster.
#pragma once

#include "cuda/lstm/cluster_pieces.cuh"

namespace fastseq::cuda::cluster {

// The bits of h in T, in the low end of a word.
template <class T>
FASTSEQ_DEVICE uint32_t word_of(float h) {
  if constexpr (sizeof(T) == 2) return pack_pair<T>(h, 0.0f);
  uint32_t word;
  memcpy(&word, &h, sizeof word);
  return word;
}

template <class T>
FASTSEQ_DEVICE T number_of(uint32_t word) {
  T x;
  if constexpr (sizeof(T) == 2) {
    const uint16_t bits = static_cast<uint16_t>(word);
    memcpy(&x, &bits, sizeof x);
  } else {
    memcpy(&x, &word, sizeof x);
  }
  return x;
}

// Returns the piece (P units of one sequence) that contains this lane's unit. All P lanes of the piece get it. The
// shuffles do not wait for each other.
template <class T>
FASTSEQ_DEVICE uint64_t gather_piece(uint32_t h, int r) {
  if constexpr (sizeof(T) == 4) {
    const uint32_t word = to_tf32(number_of<T>(h)), other = __shfl_xor_sync(kAllLanes, word, 4);
    return r & 1 ? other | static_cast<uint64_t>(word) << 32 : word | static_cast<uint64_t>(other) << 32;
  } else {
    const uint32_t second = __shfl_xor_sync(kAllLanes, h, 4), third = __shfl_xor_sync(kAllLanes, h, 8);
    const uint32_t fourth = __shfl_xor_sync(kAllLanes, h, 12), order = r & 1 ? kSecondFirst : kFirstSecond;
    const uint32_t pair = low_halves(h, second, order), others = low_halves(third, fourth, order);
    return r & 2 ? others | static_cast<uint64_t>(pair) << 32 : pair | static_cast<uint64_t>(others) << 32;
  }
}

// Number of blocks if this lane sends to any, else 0: the P lanes of a piece split the 2, 4, 8 or 16 blocks.
template <class T>
FASTSEQ_DEVICE int blocks_of_lane(int blocks, int r) {
  return r % kPiece<T> < blocks ? blocks : 0;
}

// Sends pieces of N sequences, 8 apart, to all blocks of the cluster. Unrolled, so that no address depends on a loop.
template <class T, int N>
FASTSEQ_DEVICE void send_pieces(
    const uint64_t (&pieces)[N], const uint2* to, const uint64_t* arrived, int blocks, int r) {
  constexpr int kMostBlocks = 16;
#pragma unroll
  for (int k = 0; k < kMostBlocks; k += kPiece<T>) {
    if (k >= blocks) break;
    const int rank = r % kPiece<T> + k;
    const uint64_t address = cluster_address(to, rank), mbarrier = cluster_address(arrived, rank);
#pragma unroll
    for (int n = 0; n < N; ++n) store_async8(address + n * 32 * sizeof(uint2), mbarrier, pieces[n]);
  }
}

// Sends h of this lane's sequences. to: this lane's piece in the next buffer. blocks: blocks_of_lane(), 0 if there is
// no sequence. rows: from the first sequence to the end of the batch.
template <class T, int N>
FASTSEQ_DEVICE void send_states(
    const uint64_t (&pieces)[N], const uint2* to, const uint64_t* arrived, int blocks, int r, int rows) {
  if (N == 1 || rows > 8 * (N - 1)) return send_pieces<T>(pieces, to, arrived, blocks, r);
  if constexpr (N > 1) {  // conditions around the stores of full tiles would lengthen their way
#pragma unroll 1
    for (int n = 0; 8 * n < rows; ++n) {
      uint64_t piece = pieces[0];
#pragma unroll
      for (int k = 1; k + 1 < N; ++k) piece = n == k ? pieces[k] : piece;
      send_pieces<T, 1>({piece}, to + n * 32, arrived, blocks, r);
    }
  }
}

}  // namespace fastseq::cuda::cluster
