// Shared by the attention kernels: attended positions, tiles of rows in shared memory, products of tiles.
#pragma once

#include "cuda/attention/params.h"
#include "cuda/common/device.cuh"

namespace fastseq::cuda {

constexpr int kTileThreads = 128;
constexpr int kTileRows = 32;
constexpr int kTileColumns = 64;
constexpr int kTileDepth = 64;  // of the reduced dimension

// Row stride of a tile of 64 columns, in elements. 16 bytes of padding: rows begin in different banks.
template <class E>
constexpr int kTileStride = 64 + 16 / static_cast<int>(sizeof(E));

// Returns the number of positions of sentence b that steps may attend to.
FASTSEQ_DEVICE int64_t position_limit(const AttentionInputParams& in, int64_t b) {
  if (!in.lengths) return in.positions;
  const int64_t length = in.lengths[b];
  return length < 0 ? 0 : length < in.positions ? length : in.positions;
}

// True if all steps attend to position s; requires one mask for all steps, or T = 1. limit: position_limit().
FASTSEQ_DEVICE bool attends(const AttentionInputParams& in, int64_t b, int64_t s, int64_t limit) {
  return s < limit && (!in.mask || in.mask[b * in.mask_batch + s * in.mask_column]);
}

// Returns a bit mask: bit i is set if step first + i attends to position s.
FASTSEQ_DEVICE unsigned attending_steps(
    const AttentionInputParams& in, int64_t b, int64_t first, int64_t s, int64_t limit) {
  const int steps = in.steps - first < 32 ? static_cast<int>(in.steps - first) : 32;
  if (!in.mask || in.mask_row == 0) return attends(in, b, s, limit) ? ~0u >> (32 - steps) : 0;
  if (s >= limit) return 0;
  const bool* mask = in.mask + b * in.mask_batch + first * in.mask_row + s * in.mask_column;
  unsigned bits = 0;
  for (int i = 0; i < steps; ++i) bits |= static_cast<unsigned>(mask[i * in.mask_row]) << i;
  return bits;
}

template <class T>
FASTSEQ_DEVICE const T* row_of(const Rows& x, int64_t b, int64_t row) {
  return static_cast<const T*>(x.data) + b * x.batch + row * x.row;
}

// Copies N adjacent elements from one type to another.
template <int N, class T, class E>
FASTSEQ_DEVICE void copy_vector(const T* from, E* to) {
  if constexpr (std::is_same_v<T, E>) {
    *reinterpret_cast<Vector<E, N>*>(to) = *reinterpret_cast<const Vector<T, N>*>(from);
  } else {
    float x[N];
    load_vector(x, from);
    store_wide(to, x);
  }
}

template <int N, class E>
FASTSEQ_DEVICE void clear_vector(E* to) {
  const float zeros[N] = {};
  if constexpr (sizeof(E) == sizeof(float))
    store_wide(to, zeros);
  else
    store_vector(to, zeros);
}

// Calls body(i) for all i < kCount, split over the threads of a block. kCount is a multiple of kTileThreads.
template <int kCount, class Body>
FASTSEQ_DEVICE void for_tile(Body body) {
#pragma unroll 8
  for (int k = 0; k < kCount / kTileThreads; ++k) body(k * kTileThreads + static_cast<int>(threadIdx.x));
}

// Loads 64 columns of kRows rows into a tile; zero past `columns` and in rows r for which present(r) is false.
template <int N, int kRows, class E, class T, class Present>
FASTSEQ_DEVICE void load_tile(E* tile, const T* rows, int64_t row_stride, int64_t columns, Present present) {
  constexpr int kVectors = 64 / N;
  for_tile<kRows * kVectors>([&](int i) {
    const int r = i / kVectors, c = i % kVectors * N;
    E* to = tile + r * kTileStride<E> + c;
    if (c < columns && present(r)) {
      copy_vector<N>(rows + r * row_stride + c, to);
    } else {
      clear_vector<N>(to);
    }
  });
}

FASTSEQ_DEVICE void clear(float (&sum)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = 0;
}

// A tile (32, 64) of a product. Each thread has 16 elements; element (i, j) is at row(i, j), column(i, j). Operands are
// zero past `rows` and past `depth` of the reduced dimension, so that products may skip them.
//
//   RowProduct:     sum[m][n] += sum_k x[m][k] y[n][k]
//   ColumnProduct:  sum[m][n] += sum_k x[m][k] y[k][n]
//
// float uses FMA, 16-bit types tensor cores.
template <class E>
struct RowProduct;
template <class E>
struct ColumnProduct;

// Adds one summand of the dot score. Additive score: WeightedTanh in tanh.cuh.
struct Multiply {
  static FASTSEQ_DEVICE float add(float sum, float, float x, float y) { return sum + x * y; }
};

template <>
struct RowProduct<float> {
  static FASTSEQ_DEVICE int row(int i, int) { return static_cast<int>(threadIdx.x) / 16 + 8 * i; }
  static FASTSEQ_DEVICE int column(int, int j) { return static_cast<int>(threadIdx.x) % 16 + 16 * j; }

  // weight: (depth,) for Form, or null.
  template <class Form = Multiply>
  static FASTSEQ_DEVICE void add(
      float (&sum)[4][4], const float* x, const float* y, int rows, int depth, const float* weight = nullptr) {
    constexpr int kStride = kTileStride<float>;
    for (int k = 0; k < depth; k += 4) {
      float right[4][4], w[4] = {};
      if (weight) load_wide(w, weight + k);
#pragma unroll
      for (int j = 0; j < 4; ++j) load_wide(right[j], y + column(0, j) * kStride + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * i >= rows) break;
        float left[4];
        load_wide(left, x + row(i, 0) * kStride + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float four = 0;  // accumulation chunk of 4: halves the rounding error
#pragma unroll
          for (int e = 0; e < 4; ++e) four = Form::add(four, w[e], left[e], right[j][e]);
          sum[i][j] += four;
        }
      }
    }
  }
};

template <>
struct ColumnProduct<float> {
  static FASTSEQ_DEVICE int row(int i, int) { return static_cast<int>(threadIdx.x) / 16 + 8 * i; }
  static FASTSEQ_DEVICE int column(int, int j) { return static_cast<int>(threadIdx.x) % 16 * 4 + j; }

  static FASTSEQ_DEVICE void add(float (&sum)[4][4], const float* x, const float* y, int rows, int depth) {
    constexpr int kStride = kTileStride<float>;
    for (int k = 0; k < depth; k += 4) {
      float right[4][4];
#pragma unroll
      for (int e = 0; e < 4; ++e) load_wide(right[e], y + (k + e) * kStride + column(0, 0));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * i >= rows) break;
        float left[4];
        load_wide(left, x + row(i, 0) * kStride + k);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += left[e] * right[e][j];
        }
      }
    }
  }
};

// Packs two 16-bit elements into one operand word of a matrix instruction.
template <class T>
FASTSEQ_DEVICE uint32_t word_of(Vector<T, 2> pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

template <class T>
FASTSEQ_DEVICE uint32_t load_word(const T* p) {
  return word_of(*reinterpret_cast<const Vector<T, 2>*>(p));
}

// 2 x 2 warps, each 16 rows by 32 columns: four matrix instructions side by side.
template <class T>
struct MmaProduct {
  static FASTSEQ_DEVICE int first_row() { return static_cast<int>(threadIdx.x) / 64 * 16; }
  static FASTSEQ_DEVICE int first_column() { return static_cast<int>(threadIdx.x) / 32 % 2 * 32; }
  static FASTSEQ_DEVICE int row(int, int j) { return first_row() + lane_id() / 4 + j / 2 * 8; }
  static FASTSEQ_DEVICE int column(int i, int j) { return first_column() + 8 * i + lane_id() % 4 * 2 + j % 2; }

  // right(n, k): the word of elements k and k + 1 of y in column n.
  template <class Right>
  static FASTSEQ_DEVICE void add_words(float (&sum)[4][4], const T* x, int rows, int depth, Right right) {
    constexpr int kStride = kTileStride<T>;
    if (first_row() >= rows) return;
    const int r = lane_id() / 4, q = lane_id() % 4 * 2;
    const T* left = x + (first_row() + r) * kStride + q;
    for (int k = 0; k < depth; k += 16) {
      const uint32_t a[4] = {load_word(left + k), load_word(left + k + 8 * kStride), load_word(left + k + 8),
                             load_word(left + k + 8 * kStride + 8)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = first_column() + 8 * i + r;
        const uint32_t b[2] = {right(n, k + q), right(n, k + q + 8)};
        multiply_16x8x16<T>(sum[i], a, b);
      }
    }
  }
};

template <class E>
struct RowProduct : MmaProduct<E> {
  static FASTSEQ_DEVICE void add(float (&sum)[4][4], const E* x, const E* y, int rows, int depth) {
    MmaProduct<E>::add_words(sum, x, rows, depth, [y](int n, int k) { return load_word(y + n * kTileStride<E> + k); });
  }
};

template <class E>
struct ColumnProduct : MmaProduct<E> {
  static FASTSEQ_DEVICE void add(float (&sum)[4][4], const E* x, const E* y, int rows, int depth) {
    constexpr int kStride = kTileStride<E>;
    MmaProduct<E>::add_words(sum, x, rows, depth, [y](int n, int k) {
      return word_of(Vector<E, 2>{{y[k * kStride + n], y[(k + 1) * kStride + n]}});
    });
  }
};

// Stores the tile of a ColumnProduct. If N > 1, out, its rows and `columns` are aligned to N elements.
template <int N, class T>
FASTSEQ_DEVICE void store_tile(const float (&sum)[4][4], T* out, int64_t row_stride, int64_t rows, int64_t columns) {
  using Tile = ColumnProduct<T>;
  constexpr int kTogether = N == 1 ? 1 : sizeof(T) == 2 ? 2 : 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; j += kTogether) {
      float x[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) x[k] = sum[i][j + k];
      const int m = Tile::row(i, j), n = Tile::column(i, j);
      if (m < rows && n < columns) store_vector(out + m * row_stride + n, x);
    }
  }
}

}  // namespace fastseq::cuda
