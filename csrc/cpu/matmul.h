// C += A W for the recurrent products: few rows, a weight that is packed once and read at every time step.
#pragma once

#include <cstdint>
#include <cstring>

#include "storage.h"

namespace fastseq {

// Columns of one panel of a packed weight: 128 bytes, the same for every instruction set.
template <class A>
constexpr int64_t kPanel = 128 / sizeof(A);

template <class A>
constexpr int64_t padded(int64_t columns) {
  return (columns + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
}

// Packs columns [panel * kPanel, (panel + 1) * kPanel) of W, zeros past the last column.
template <class S>
void pack_panel(const S* weight,  // W[k][n] at weight[k * stride_k + n * stride_n]
                int64_t K,
                int64_t N,  // W is (K, N)
                int64_t stride_k,
                int64_t stride_n,
                int64_t panel,
                Acc<S>* packed) {  // (padded(N) / kPanel, K, kPanel), all panels
  constexpr int64_t P = kPanel<Acc<S>>;
  Acc<S>* out = packed + panel * K * P;
  const int64_t first = panel * P;
  const int64_t columns = N - first < P ? N - first : P;
  for (int64_t k = 0; k < K; ++k) {
    const S* row = weight + k * stride_k + first * stride_n;
    for (int64_t j = 0; j < columns; ++j) out[k * P + j] = load(row[j * stride_n]);
    for (int64_t j = columns; j < P; ++j) out[k * P + j] = 0;
  }
}

template <class A, int BYTES>
struct Vector {
  typedef A type __attribute__((vector_size(BYTES)));
};

// A tile of ROWS x kPanel sums, held in registers over K.
template <class A, int BYTES, int ROWS>
FASTSEQ_INLINE void matmul_tile(const A* a,
                                int64_t stride_a,  // (ROWS, K)
                                const A* w,        // (K, kPanel)
                                int64_t K,
                                A* c,
                                int64_t stride_c) {  // (ROWS, kPanel), added to
  using V = typename Vector<A, BYTES>::type;
  constexpr int kVectors = 128 / BYTES;
  constexpr int kLanes = BYTES / sizeof(A);
  V sum[ROWS][kVectors] = {};
  for (int64_t k = 0; k < K; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const V scalar = a[r * stride_a + k] - V{};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        V column;
        std::memcpy(&column, w + k * kPanel<A> + v * kLanes, BYTES);
        sum[r][v] += scalar * column;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      V old;
      std::memcpy(&old, c + r * stride_c + v * kLanes, BYTES);
      old += sum[r][v];
      std::memcpy(c + r * stride_c + v * kLanes, &old, BYTES);
    }
  }
}

// All rows of one panel: tiles of ROWS, then the rest by smaller tiles.
template <class A, int BYTES, int ROWS>
FASTSEQ_INLINE void matmul_rows(
    const A* a, int64_t stride_a, const A* w, int64_t K, A* c, int64_t stride_c, int64_t rows) {
  for (; rows >= ROWS; rows -= ROWS) {
    matmul_tile<A, BYTES, ROWS>(a, stride_a, w, K, c, stride_c);
    a += ROWS * stride_a;
    c += ROWS * stride_c;
  }
  if constexpr (ROWS > 1) matmul_rows<A, BYTES, ROWS / 2>(a, stride_a, w, K, c, stride_c, rows);
}

template <class A, int BYTES>
FASTSEQ_INLINE void matmul_add(int64_t rows,
                               int64_t K,
                               int64_t N,
                               const A* a,
                               int64_t stride_a,  // (rows, K)
                               const A* packed,   // W (K, N), by pack_panel
                               A* c,
                               int64_t stride_c) {              // (rows, padded(N)), added to
  constexpr int kRows = BYTES == 64 ? 6 : BYTES == 32 ? 3 : 1;  // as many as the registers hold
  constexpr int64_t kDepth = 32;  // one long chain of additions loses digits; 32 costs 3 % of the speed
  for (int64_t n = 0; n < padded<A>(N); n += kPanel<A>) {
    for (int64_t k = 0; k < K; k += kDepth) {
      const int64_t depth = K - k < kDepth ? K - k : kDepth;
      matmul_rows<A, BYTES, kRows>(a + k, stride_a, packed + n * K + k * kPanel<A>, depth, c + n, stride_c, rows);
    }
  }
}

}  // namespace fastseq
