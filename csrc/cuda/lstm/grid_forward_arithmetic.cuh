// Arithmetic of W h in the forward grid recurrence, as three traits: MmaHalf (tensor cores, 16-bit), MmaTf32 (tensor
// cores, float rounded to TF32) and FmaFloat (exact float). A trait defines the operand format, the encoding of h in
// the exchange, and the product of a slice of weights and a vector of h.
//
// Fragments (docs/kernels/cuda-grid.md): lane 4 r + q holds vector q of a chunk (16 bytes, kVector units): of W, gate
// rows i, f, g, o of unit r of the group; of h, row r of a tile of 8 rows. This permutes K against the order of the
// matrix instruction. The permutation is the same for W and h, so the product is unchanged. Step s multiplies words 2 s
// and 2 s + 1.
//   tile 0: rows r and r + 8 are gates i and f of unit r          word   0    1    2    3   of a lane
//   tile 1: rows r and r + 8 are gates g and o of unit r          step  |-- 0 --||-- 1 --|
// The sums of a lane are i, f, g, o of unit r for two rows of the batch.
#pragma once

#include "cuda/lstm/grid_forward_layout.cuh"

namespace fastseq::cuda::grid_forward {

constexpr uint32_t kNaNWord = 0x7fffffffu;  // as a float and as two 16-bit numbers

// 64 bytes of weights as A operands: a[2 tile + step].
struct Slice {
  uint32_t a[4][4];

  FASTSEQ_DEVICE uint32_t word(int gate, int k) const { return a[at(gate, k) / 4][at(gate, k) % 4]; }
  // Index, out of 16, of word k of a gate (i, f, g, o).
  static FASTSEQ_DEVICE int at(int gate, int k) { return (2 * (gate / 2) + k / 2) * 4 + 2 * (k % 2) + gate % 2; }
};

// Tensor-core sums of a lane for one group and one tile of rows: d[tile][2 k + e] is gate 2 tile + k of row 2 q + e.
struct MmaSum {
  float d[2][4] = {};

  template <class Multiply>
  FASTSEQ_DEVICE void add(const Slice& w, const uint32_t (&h)[4], const Multiply& multiply) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t b[2] = {h[2 * s], h[2 * s + 1]};
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) multiply(d[tile], w.a[2 * tile + s], b);
    }
  }

  // gates[e]: i, f, g, o of row 2 q + e.
  FASTSEQ_DEVICE void finish(float (&gates)[2][4]) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) gates[e][gate] = d[gate / 2][2 * (gate % 2) + e];
    }
  }
};

template <class Number>
struct MmaHalf {
  using T = Number;
  using Sum = MmaSum;
  static constexpr int kVector = 8, kWord = 2;  // numbers in 16 bytes and in 4
  static constexpr int kStage = 4;              // chunks whose loads are in flight at once
  static constexpr int kKeptSlices = 8;         // slices in registers
  static constexpr uint32_t kTag = 1u << 30;    // bit of the sequence tag in a word

  static FASTSEQ_DEVICE uint32_t operand(uint32_t word) { return word; }
  // Packs h of units u and u + 1 with tag 0. A NaN in the high half moves to the low half: its exponent covers kTag.
  static FASTSEQ_DEVICE uint32_t encode(float h, float next) {
    const bool bad = next != next;
    return pack_pair<T>(bad ? next : h, bad ? 0.0f : next);
  }
  static FASTSEQ_DEVICE uint32_t decode(uint32_t word, bool) { return word; }
  static FASTSEQ_DEVICE void multiply(Sum& sum, const Slice& w, const uint32_t (&h)[4]) {
    sum.add(w, h, [](auto& d, const auto& a, const auto& b) { multiply_16x8x16<T>(d, a, b); });
  }
};

struct MmaTf32 {
  using T = float;
  using Sum = MmaSum;
  static constexpr int kVector = 4, kWord = 1;
  static constexpr int kStage = 4;
  static constexpr int kKeptSlices = 8;
  static constexpr uint32_t kTag = 1;

  static FASTSEQ_DEVICE uint32_t operand(uint32_t word) { return to_tf32(as_float(word)); }
  static FASTSEQ_DEVICE uint32_t encode(float h, float) { return to_tf32(h) & ~kTag; }
  static FASTSEQ_DEVICE uint32_t decode(uint32_t word, bool) { return word; }
  static FASTSEQ_DEVICE void multiply(Sum& sum, const Slice& w, const uint32_t (&h)[4]) {
    sum.add(w, h, [](auto& d, const auto& a, const auto& b) { multiply_16x8x8_tf32(d, a, b); });
  }
};

// FMA sums of a lane: unit r over a quarter of K, for all 8 rows of the tile.
struct FmaSum {
  float d[8][4] = {};

  // Sums over the 4 lanes of a unit: exchanges half of the rows with lane ^ 2, then half of the rest with lane ^ 1.
  FASTSEQ_DEVICE void finish(float (&gates)[2][4]) const {
    const bool upper = lane_id() & 2, odd = lane_id() & 1;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      float half[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float keep = upper ? d[n + 4][gate] : d[n][gate], send = upper ? d[n][gate] : d[n + 4][gate];
        half[n] = keep + __shfl_xor_sync(kAllLanes, send, 2);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float keep = odd ? half[e + 2] : half[e], send = odd ? half[e] : half[e + 2];
        gates[e][gate] = keep + __shfl_xor_sync(kAllLanes, send, 1);
      }
    }
  }
};

struct FmaFloat {
  using T = float;
  using Sum = FmaSum;
  static constexpr int kVector = 4, kWord = 1;
  static constexpr int kStage = 2;
  static constexpr int kKeptSlices = 2;
  static constexpr uint32_t kTag = 1u << 30;
  static constexpr uint32_t kNaN = kTag - 1;  // bits of 1.9999999: encodes NaN, whose exponent covers kTag

  static FASTSEQ_DEVICE uint32_t operand(uint32_t word) { return word; }
  static FASTSEQ_DEVICE uint32_t encode(float h, float) { return h == h ? as_bits(h) : kNaN; }
  static FASTSEQ_DEVICE uint32_t decode(uint32_t word, bool encoded) {
    return encoded && word == kNaN ? kNaNWord : word;
  }
  static FASTSEQ_DEVICE void multiply(Sum& sum, const Slice& w, const uint32_t (&h)[4]) {
    const int q = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < kTile; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float x = __shfl_sync(kAllLanes, as_float(h[k]), 4 * n + q);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) sum.d[n][gate] += as_float(w.word(gate, k)) * x;
      }
    }
  }
};

// Loads kVector operands from `row` (hidden,), beginning at `unit`; zero past the end.
template <class M>
FASTSEQ_DEVICE void load_operand(uint32_t (&out)[4], const typename M::T* row, int unit, int hidden) {
  using T = typename M::T;
  Vector<T, M::kVector> v;
  if (hidden % M::kVector == 0 && unit < hidden) {
    v = *reinterpret_cast<const Vector<T, M::kVector>*>(row + unit);
  } else {
#pragma unroll
    for (int k = 0; k < M::kVector; ++k) {
      from_float(0.0f, &v.element[k]);
      if (unit + k < hidden) v.element[k] = row[unit + k];
    }
  }
  memcpy(out, &v, sizeof out);
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = M::operand(out[k]);
}

}  // namespace fastseq::cuda::grid_forward
