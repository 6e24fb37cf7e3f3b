// Arithmetic of W_hh^T dgates in the backward grid recurrence, as three traits: MmaHalf (tensor cores, 16-bit), MmaTf32
// (tensor cores, float rounded to TF32) and FmaFloat (exact float).
//
// The product is (16 units, k) times (k, 8 rows): units are M of the matrix instruction, rows N, so that one sequence
// costs 8 rows and not 16. k = 4 unit + gate (i, f, g, o), cut into chunks of 4 U. One 16-byte load from the exchange
// gives a lane its B operands for two instructions:
//
//   16-bit, U = 8, m16n8k16: lane 4 r + q loads units 2 q and 2 q + 1 of row r = (i f)(g o) | (i f)(g o)
//                            = b[0], b[1] of instruction 0 | of instruction 1
//   TF32,   U = 4, m16n8k8:  lane 4 r + q loads unit q of row r = i, f | g, o
//   exact,  U = 8, FMA:      lane 8 n + u loads unit u of every row and multiplies it into output units 4 n .. 4 n + 3
#pragma once

#include "cuda/common/cell_math.cuh"

namespace fastseq::cuda::grid_backward {

constexpr int kTileRows = 8;    // rows of the batch in a tile
constexpr int kTileUnits = 16;  // hidden units in a tile

// Sums of a warp, 16 output units by 8 rows: D of m16n8 instructions, in two independent accumulators.
struct MmaSums {
  float d[2][4];

  // Writes to[row * stride + output unit].
  FASTSEQ_DEVICE void store(float* to, int stride) const {
    const int r = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
    for (int k = 0; k < 4; ++k) to[(2 * q + k % 2) * stride + r + k / 2 * 8] = d[0][k] + d[1][k];
  }
};

// FMA sums of a lane: 4 output units, 8 rows, an eighth of k.
struct FmaSums {
  float d[kTileRows][4];

  // Adds pairs of lanes: one lane keeps the sums of the first `Rows` rows, the other the rest.
  template <int Rows>
  FASTSEQ_DEVICE void share() {
    const bool upper = lane_id() & Rows;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float sent = upper ? d[r][k] : d[r + Rows][k], kept = upper ? d[r + Rows][k] : d[r][k];
        d[r][k] = kept + __shfl_xor_sync(kAllLanes, sent, Rows);
      }
    }
  }

  // Sums over the eight lanes of the same output units; lane u stores row u.
  FASTSEQ_DEVICE void store(float* to, int stride) {
    share<4>();
    share<2>();
    share<1>();
    store_wide(to + lane_id() % 8 * stride + lane_id() / 8 * 4, d[0]);
  }
};

// Clears the lowest mantissa bit of a float: rounds to 23 bits, to nearest, ties to even. NaN stays NaN.
FASTSEQ_DEVICE uint32_t without_last_bit(float x) {
  const uint32_t bits = as_bits(x), up = x == x ? bits >> 1 & 1 : 0;
  return (bits + up) & ~1u;
}

// Tensor cores, 16-bit types. Weights of a chunk: A of two instructions.
template <class T>
struct MmaHalf {
  using Element = T;
  using Word = uint32_t;
  static constexpr int kUnits = 8;    // of a chunk
  static constexpr int kParts = 2;    // 16-byte parts of a lane's weights of a chunk
  static constexpr int kVectors = 1;  // 16-byte vectors of a lane in a chunk of the exchange
  static constexpr int kStage = 4;    // chunks polled at once
  using Sums = MmaSums;

  // Parts in registers of a block of R tiles of units.
  static constexpr int held_parts(int) { return 32; }

  // weight(unit of the chunk, gate, output unit of the tile)
  template <class Weight>
  static FASTSEQ_DEVICE void pack(Vector<Word, 4> (&w)[kParts], const Weight& weight) {
    const int r = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
    for (int k = 0; k < 4 * kParts; ++k) {
      const int unit = 2 * q + k / 4, gate = k / 2 % 2 * 2, out = r + k % 2 * 8;
      w[k / 4].element[k % 4] = pack_pair<T>(weight(unit, gate, out), weight(unit, gate + 1, out));
    }
  }

  // Place of a lane's vector in the chunk of a tile of so many rows. A lane without a row reads the last row: no line
  // more, and its sums are not read.
  static FASTSEQ_DEVICE int place(int, int rows) { return min(lane_id() / 4, rows - 1) * 4 + lane_id() % 4; }
  static FASTSEQ_DEVICE bool exists(int, int) { return true; }

  static FASTSEQ_DEVICE void multiply(Sums& sums,
                                      const Vector<Word, 4> (&w)[kParts],
                                      const uint32_t (&f)[kVectors][4]) {
    multiply_16x8x16<T>(sums.d[0], w[0].element, {f[0][0], f[0][1]});
    multiply_16x8x16<T>(sums.d[1], w[1].element, {f[0][2], f[0][3]});
  }

  // Packs a unit's dgates with tag 0. di, `exact` before its rounding to T, loses its last bit: T's neighbour with bit
  // 0 clear is nearest. NaN is not `up` and stays NaN, as its mantissa has other bits.
  static FASTSEQ_DEVICE void encode(uint32_t (&words)[2], const Vector<T, 4>& dgates, const float (&exact)[4]) {
    memcpy(words, &dgates, sizeof words);
    const bool up = fabsf(exact[0]) >= fabsf(to_float(dgates.element[0]));
    words[0] = up ? words[0] + (words[0] & 1) : words[0] & ~1u;
  }
};

// Tensor cores, float rounded to TF32. Weights of a chunk: A of two instructions.
struct MmaTf32 {
  using Element = float;
  using Word = uint32_t;
  static constexpr int kUnits = 4, kParts = 2, kVectors = 1, kStage = 4;
  using Sums = MmaSums;

  static constexpr int held_parts(int) { return 32; }

  template <class Weight>
  static FASTSEQ_DEVICE void pack(Vector<Word, 4> (&w)[kParts], const Weight& weight) {
    const int r = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
    for (int k = 0; k < 4 * kParts; ++k) w[k / 4].element[k % 4] = to_tf32(weight(q, k / 2, r + k % 2 * 8));
  }

  static FASTSEQ_DEVICE int place(int, int rows) { return min(lane_id() / 4, rows - 1) * 4 + lane_id() % 4; }
  static FASTSEQ_DEVICE bool exists(int, int) { return true; }

  static FASTSEQ_DEVICE void multiply(Sums& sums,
                                      const Vector<Word, 4> (&w)[kParts],
                                      const uint32_t (&f)[kVectors][4]) {
    multiply_16x8x8_tf32(sums.d[0], w[0].element, {f[0][0], f[0][1]});
    multiply_16x8x8_tf32(sums.d[1], w[1].element, {f[0][2], f[0][3]});
  }

  static FASTSEQ_DEVICE void encode(uint32_t (&words)[4], const Vector<float, 4>& dgates, const float (&)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) words[k] = to_tf32(dgates.element[k]) & ~1u;
  }
};

// Exact float. Lane 8 n + u has output units 4 n .. 4 n + 3 and unit u of each chunk.
struct FmaFloat {
  using Element = float;
  using Word = float;
  static constexpr int kUnits = 8, kParts = 4, kVectors = kTileRows, kStage = 1;
  using Sums = FmaSums;

  static constexpr int held_parts(int R) { return R == 1 ? 24 : 16; }

  template <class Weight>
  static FASTSEQ_DEVICE void pack(Vector<Word, 4> (&w)[kParts], const Weight& weight) {
    const int n = lane_id() / 8, u = lane_id() % 8;
#pragma unroll
    for (int k = 0; k < 4 * kParts; ++k) w[k / 4].element[k % 4] = weight(u, k % 4, 4 * n + k / 4);
  }

  static FASTSEQ_DEVICE int place(int vector, int) { return vector * kUnits + lane_id() % 8; }
  static FASTSEQ_DEVICE bool exists(int vector, int rows) { return vector < rows; }

  static FASTSEQ_DEVICE void multiply(Sums& sums,
                                      const Vector<Word, 4> (&w)[kParts],
                                      const uint32_t (&f)[kVectors][4]) {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& sum = sums.d[r][k];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) sum = as_float(f[r][gate]) * w[k].element[gate] + sum;
      }
    }
  }

  static FASTSEQ_DEVICE void encode(uint32_t (&words)[4], const Vector<float, 4>& dgates, const float (&)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      words[k] = k % 2 ? as_bits(dgates.element[k]) : without_last_bit(dgates.element[k]);
    }
  }
};

}  // namespace fastseq::cuda::grid_backward
