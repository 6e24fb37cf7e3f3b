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

// Loads a chunk as B of two instructions. Rows past `rows` are zero and not read, so one sequence costs one row of
// traffic.
FASTSEQ_DEVICE uint4 load_rows(const void* chunk, int rows) {
  return lane_id() / 4 < rows ? load_l2(static_cast<const uint4*>(chunk) + lane_id()) : uint4{0, 0, 0, 0};
}

// Tensor cores, 16-bit types. Weights of a chunk: A of two instructions.
template <class T>
struct MmaHalf {
  using Element = T;
  using Word = uint32_t;
  using Fragment = uint4;
  static constexpr int kUnits = 8;       // of a chunk
  static constexpr int kParts = 2;       // 16-byte parts of a lane's weights of a chunk
  static constexpr int kHeldParts = 32;  // parts in registers
  static constexpr int kPrefetch = 8;    // chunks loaded before the first product
  using Sums = MmaSums;

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

  static FASTSEQ_DEVICE Fragment load(const T* chunk, int rows) { return load_rows(chunk, rows); }

  static FASTSEQ_DEVICE void multiply(Sums& sums, const Vector<Word, 4> (&w)[kParts], const Fragment& f) {
    multiply_16x8x16<T>(sums.d[0], w[0].element, {f.x, f.y});
    multiply_16x8x16<T>(sums.d[1], w[1].element, {f.z, f.w});
  }

  // Rounds a dgate to the format of the exchange.
  static FASTSEQ_DEVICE T exchanged(T x) { return x; }
};

// Tensor cores, float rounded to TF32. Weights of a chunk: A of two instructions.
struct MmaTf32 {
  using Element = float;
  using Word = uint32_t;
  using Fragment = uint4;
  static constexpr int kUnits = 4, kParts = 2, kHeldParts = 32, kPrefetch = 8;
  using Sums = MmaSums;

  template <class Weight>
  static FASTSEQ_DEVICE void pack(Vector<Word, 4> (&w)[kParts], const Weight& weight) {
    const int r = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
    for (int k = 0; k < 4 * kParts; ++k) w[k / 4].element[k % 4] = to_tf32(weight(q, k / 2, r + k % 2 * 8));
  }

  static FASTSEQ_DEVICE Fragment load(const float* chunk, int rows) { return load_rows(chunk, rows); }

  static FASTSEQ_DEVICE void multiply(Sums& sums, const Vector<Word, 4> (&w)[kParts], const Fragment& f) {
    multiply_16x8x8_tf32(sums.d[0], w[0].element, {f.x, f.y});
    multiply_16x8x8_tf32(sums.d[1], w[1].element, {f.z, f.w});
  }

  static FASTSEQ_DEVICE float exchanged(float x) {
    const uint32_t bits = to_tf32(x);
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};

// Exact float. Lane 8 n + u has output units 4 n .. 4 n + 3 and unit u of each chunk.
struct FmaFloat {
  using Element = float;
  using Word = float;
  static constexpr int kUnits = 8, kParts = 4, kHeldParts = 24, kPrefetch = 1;
  struct Fragment {
    float4 row[kTileRows];
  };
  using Sums = FmaSums;

  template <class Weight>
  static FASTSEQ_DEVICE void pack(Vector<Word, 4> (&w)[kParts], const Weight& weight) {
    const int n = lane_id() / 8, u = lane_id() % 8;
#pragma unroll
    for (int k = 0; k < 4 * kParts; ++k) w[k / 4].element[k % 4] = weight(u, k % 4, 4 * n + k / 4);
  }

  static FASTSEQ_DEVICE Fragment load(const float* chunk, int rows) {
    Fragment f{};
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (r < rows) f.row[r] = load_l2(reinterpret_cast<const float4*>(chunk) + r * kUnits + lane_id() % 8);
    }
    return f;
  }

  static FASTSEQ_DEVICE void multiply(Sums& sums, const Vector<Word, 4> (&w)[kParts], const Fragment& f) {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float (&gate)[4] = w[k].element;
        float& sum = sums.d[r][k];
        sum = f.row[r].w * gate[3] + (f.row[r].z * gate[2] + (f.row[r].y * gate[1] + (f.row[r].x * gate[0] + sum)));
      }
    }
  }

  static FASTSEQ_DEVICE float exchanged(float x) { return x; }
};

}  // namespace fastseq::cuda::grid_backward
