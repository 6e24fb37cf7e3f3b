// Products with packed weights: register tiles of up to kTileRows rows and four vectors of columns.
//
// A packed weight is a sequence of panels, read front to back. One panel, with vectors of kLanes elements:
//
//                 vector 0    vector 1    vector 2    vector 3
//     depth 0        i           f           g           o        of W_ih, W_hh: the gates of kLanes hidden units
//     depth 1        i           f           g           o        of other weights: 4 * kLanes neighbouring columns
//      ...
//     depth K - 1    i           f           g           o
//
// Lanes past the last unit or column are zero. bfloat16 with a dot-product instruction pairs neighbouring depths: a
// lane then holds (k, k + 1), and an odd depth is padded with zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Element type that products read, in rows and packed weights. Types without arithmetic are converted to float.
template <class S>
struct OperandOf {
  using type = Acc<S>;
};
#if FASTSEQ_BF16_DOT
template <>
struct OperandOf<BFloat16> {
  using type = BFloat16;
};
#endif
template <class S>
using Operand = typename OperandOf<S>::type;

// Number of neighbouring depths in one lane.
template <class S>
constexpr int kPair = sizeof(Acc<S>) / sizeof(Operand<S>);

// True if products can read the elements of a tensor in place.
template <class S>
constexpr bool kDirect = kPair<S> == 1 && sizeof(S) == sizeof(Operand<S>);

template <class S>
FASTSEQ_INLINE int64_t padded_depth(int64_t K) {
  return (K + kPair<S> - 1) / kPair<S> * kPair<S>;
}

#if FASTSEQ_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kTileRows = 6;  // 24 sums, 4 columns and a broadcast value fill 32 registers
#else
constexpr int kTileRows = 3;  // 12 sums of 16 registers
#endif

// Terms in one accumulation chunk, whose sum is then added to the total. A longer chunk loses digits; a shorter one
// costs time.
constexpr int64_t kAccumulationChunk = 128;

template <class S>
FASTSEQ_INLINE void multiply_add(const Operand<S>* a, Vec<Acc<S>> w, Vec<Acc<S>>& sum) {
  if constexpr (kPair<S> == 2) {
#if FASTSEQ_BF16_DOT
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    sum = (VFloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w);
#endif
  } else {
    sum = fma(splat<Acc<S>>(*a), w, sum);
  }
}

// Cursor over the next panel, which is prefetched into the L2 cache while a tile computes, one cache line per depth.
// The hardware does not prefetch that far ahead, and a panel in the L3 cache would stall its first tile.
struct PrefetchCursor {
  const char *next, *end;

  const char* take(int64_t lines) {
    if (next + 64 * lines > end) return end - 64 * lines;
    next += 64 * lines;
    return next - 64 * lines;
  }
};

// Panel `panel` of a packed weight with depth K (padded).
template <class S>
FASTSEQ_INLINE const Operand<S>* panel_at(const void* packed, int64_t panel, int64_t K) {
  return static_cast<const Operand<S>*>(packed) + panel * 4 * kLanes<S> * K;
}
template <class S>
FASTSEQ_INLINE PrefetchCursor prefetch_panel(const void* packed, int64_t panel, int64_t K) {
  const char* const next = reinterpret_cast<const char*>(panel_at<S>(packed, panel, K));
  return {next, next + 4 * kLanes<S> * K * sizeof(Operand<S>)};
}

// total[r][v] += row r times vector v of one panel.
template <class S, int ROWS>
FASTSEQ_INLINE void multiply_panel(const Operand<S>* const* a,  // (ROWS) rows of K elements
                                   const Operand<S>* panel,     // (K, 4 vectors)
                                   int64_t K,                   // padded
                                   PrefetchCursor& prefetch,
                                   Vec<Acc<S>> (&total)[ROWS][4]) {
  const char* line = prefetch.take(K / kPair<S>);
  constexpr int64_t kWidth = 4 * kLanes<S> * kPair<S>;
  const Operand<S>* row[ROWS];
  for (int r = 0; r < ROWS; ++r) row[r] = a[r];
  for (int64_t begin = 0; begin < K; begin += kAccumulationChunk * kPair<S>) {
    const int64_t end = K - begin > kAccumulationChunk * kPair<S> ? begin + kAccumulationChunk * kPair<S> : K;
    Vec<Acc<S>> sum[ROWS][4] = {};
    for (int64_t k = begin; k < end; k += kPair<S>, panel += kWidth, line += 64) {
      __builtin_prefetch(line, 0, 2);
      const Vec<Acc<S>> w[4] = {load_bytes<Vec<Acc<S>>>(panel), load_bytes<Vec<Acc<S>>>(panel + kWidth / 4),
                                load_bytes<Vec<Acc<S>>>(panel + kWidth / 2),
                                load_bytes<Vec<Acc<S>>>(panel + kWidth / 4 * 3)};
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) multiply_add<S>(row[r] + k, w[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) total[r][v] += sum[r][v];
    }
  }
}

// A number of rows known at compile time.
template <int N>
struct Rows {
  static constexpr int count = N;
};

template <int N, class Tile>
FASTSEQ_INLINE void call_with_rows(int64_t rows, int64_t first, const Tile& tile) {
  if constexpr (N == 1) {
    tile(Rows<1>{}, first);
  } else {
    if (rows == N) return tile(Rows<N>{}, first);
    call_with_rows<N - 1>(rows, first, tile);
  }
}

// Calls tile(Rows<n>{}, first row) for tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
template <int MAX = kTileRows, class Tile>
FASTSEQ_INLINE void for_each_tile(int64_t rows, const Tile& tile) {
  for (int64_t first = 0, tiles = (rows + MAX - 1) / MAX; tiles > 0; --tiles) {
    const int64_t height = (rows - first + tiles - 1) / tiles;
    call_with_rows<MAX>(height, first, tile);
    first += height;
  }
}

// Depth at which a panel and the rows stay in a small L2 cache while all tiles use them.
constexpr int64_t kDeep = 1024;

// sums[r] (+)= row r times one panel, for many rows of large depth K: in slices of kDeep.
template <class S>
FASTSEQ_INLINE void multiply_deep(const Operand<S>* const* a,  // (rows) rows of K elements
                                  int64_t rows,
                                  const Operand<S>* panel,  // (K, 4 vectors)
                                  int64_t K,                // padded
                                  const Operand<S>* next,   // the panel to prefetch
                                  bool add,
                                  Acc<S>* sums) {  // (rows, 4 vectors)
  for (int64_t begin = 0; begin < K; begin += kDeep, add = true) {
    const int64_t depth = K - begin < kDeep ? K - begin : kDeep, rest = K - begin - depth;
    const Operand<S>* const following = rest > 0 ? panel + (begin + depth) * 4 * kLanes<S> : next;
    PrefetchCursor prefetch = prefetch_panel<S>(following, 0, rest > 0 && rest < kDeep ? rest : depth);
    const auto tile = [&](auto height, int64_t first) FASTSEQ_NOINLINE {
      constexpr int ROWS = decltype(height)::count;
      const Operand<S>* row[ROWS];
      Vec<Acc<S>> total[ROWS][4] = {};
      for (int r = 0; r < ROWS; ++r) row[r] = a[first + r] + begin;
      multiply_panel<S, ROWS>(row, panel + begin * 4 * kLanes<S>, depth, prefetch, total);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          Acc<S>* const sum = sums + ((first + r) * 4 + v) * kLanes<S>;
          vstore(add ? vload(sum) + total[r][v] : total[r][v], sum);
        }
      }
    };
    for_each_tile(rows, tile);
  }
}

// Peak of the multiply-adds: `steps` times one depth of a full tile, with the same registers but no memory traffic.
template <class S>
int64_t fma_chain(int64_t steps) {
  Vec<Acc<S>> start[kTileRows][4] = {}, w{}, sum[kTileRows][4], total{};
  Operand<S> a[kPair<S>] = {};
  asm volatile("" : "+m"(start), "+m"(w));  // hides the values from the compiler
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = start[r][v];
  }
  for (int64_t step = 0; step < steps; ++step) {
    asm volatile("" : "+m"(a));  // reload it, as a product does
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) multiply_add<S>(a, w, sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) total += sum[r][v];
  }
  asm volatile("" ::"m"(total));
  return steps * kTileRows * 4 * kLanes<S> * kPair<S> * 2;
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
