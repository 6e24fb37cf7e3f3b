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

// Depth k, or the pair (k, k + 1), of a row in every lane.
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> broadcast(const Operand<S>* a) {
  if constexpr (kPair<S> == 2) {
    uint32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return (Vec<Acc<S>>)(pair - VWord{});
  } else {
    return splat<Acc<S>>(*a);
  }
}

template <class S>
FASTSEQ_INLINE void multiply_add(Vec<Acc<S>> a, Vec<Acc<S>> w, Vec<Acc<S>>& sum) {
  if constexpr (kPair<S> == 2) {
#if FASTSEQ_BF16_DOT
    sum = (VFloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
#endif
  } else {
    sum = fma(a, w, sum);
  }
}

// Panel `panel` of a packed weight with depth K (padded).
template <class S>
FASTSEQ_INLINE const Operand<S>* panel_at(const void* packed, int64_t panel, int64_t K) {
  return static_cast<const Operand<S>*>(packed) + panel * 4 * kLanes<S> * K;
}

// Cache lines to prefetch into the L2 cache while a tile computes: `count` at `first`, and again one group of depths
// further for each group. The hardware does not prefetch the next panel, which would stall its first tile.
constexpr int64_t kPrefetchGroup = 4;
struct Ahead {
  const char* first;
  int64_t count;
};

// The share of one of `tiles` tiles in prefetching a panel.
template <class S>
FASTSEQ_INLINE Ahead share_of_prefetch(const Operand<S>* panel, int64_t tile, int64_t tiles) {
  constexpr int64_t kLines = kPrefetchGroup * 4 * kLanes<S> * kPair<S> * sizeof(Operand<S>) / 64;
  const int64_t share = (kLines + tiles - 1) / tiles, first = tile * share, rest = kLines - first;
  return {reinterpret_cast<const char*>(panel) + 64 * first, rest < share ? rest : share};
}

// sum[r][v] += row r times vector v of one panel, over one accumulation chunk.
template <class S, int ROWS>
FASTSEQ_INLINE void multiply_chunk(const Operand<S>* const* a,  // (ROWS) rows
                                   int64_t begin,               // first depth, into the rows
                                   const Operand<S>* panel,     // (depth, 4 vectors), from `begin` on
                                   int64_t depth,               // padded
                                   Ahead ahead,
                                   Vec<Acc<S>> (&sum)[ROWS][4]) {
  constexpr int64_t kWidth = 4 * kLanes<S> * kPair<S>;
  const Operand<S>* row[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) row[r] = a[r] + begin;
  const auto step = [&](int64_t k, const Operand<S>* columns) FASTSEQ_LAMBDA_INLINE {
    Vec<Acc<S>> x[ROWS];  // before the columns: with one column at a time, a tile of 3 rows fills 16 registers
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) x[r] = broadcast<S>(row[r] + k);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const auto w = load_bytes<Vec<Acc<S>>>(columns + v * (kWidth / 4));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) multiply_add<S>(x[r], w, sum[r][v]);
    }
  };
  int64_t k = 0;
  for (; k + kPrefetchGroup * kPair<S> <= depth; k += kPrefetchGroup * kPair<S>, panel += kPrefetchGroup * kWidth) {
    for (int64_t i = 0; i < ahead.count; ++i) __builtin_prefetch(ahead.first + 64 * i, 0, 2);
    ahead.first += kPrefetchGroup * kWidth * sizeof(Operand<S>);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kPrefetchGroup; ++i) step(k + i * kPair<S>, panel + i * kWidth);
  }
  for (; k < depth; k += kPair<S>, panel += kWidth) step(k, panel);
}

// total[r][v] += row r times vector v of one panel, in accumulation chunks. For a few tiles of rows; multiply_block
// serves many.
template <class S, int ROWS>
FASTSEQ_INLINE void multiply_panel(const Operand<S>* const* a,  // (ROWS) rows of K elements
                                   const Operand<S>* panel,     // (K, 4 vectors)
                                   int64_t K,                   // padded
                                   Ahead ahead,
                                   Vec<Acc<S>> (&total)[ROWS][4]) {
  constexpr int64_t kDepth = kAccumulationChunk * kPair<S>, kWidth = 4 * kLanes<S>;
  for (int64_t begin = 0; begin < K; begin += kDepth) {
    const int64_t depth = K - begin < kDepth ? K - begin : kDepth;
    Vec<Acc<S>> sum[ROWS][4] = {};
    multiply_chunk<S, ROWS>(a, begin, panel + begin * kWidth, depth, ahead, sum);
    ahead.first += depth * kWidth * sizeof(Operand<S>);
#pragma GCC unroll 32
    for (int i = 0; i < ROWS * 4; ++i) total[i / 4][i % 4] += sum[i / 4][i % 4];
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

// Number of depths between the chunk in use and the one that is prefetched: both stay in a small L2 cache.
constexpr int64_t kPrefetchDistance = 1024;

// sums (ROWS, 4 vectors) (+)= rows times one panel, over one accumulation chunk.
template <class S, int ROWS>
FASTSEQ_NOINLINE void multiply_tile(const Operand<S>* const* a,  // (ROWS) rows
                                    int64_t begin,               // first depth, into the rows
                                    const Operand<S>* panel,     // (depth, 4 vectors), from `begin` on
                                    int64_t depth,               // padded
                                    Ahead ahead,
                                    bool add,
                                    Acc<S>* sums) {
  Vec<Acc<S>> sum[ROWS][4] = {};
  multiply_chunk<S, ROWS>(a, begin, panel, depth, ahead, sum);
  if (add) {
#pragma GCC unroll 32
    for (int i = 0; i < ROWS * 4; ++i) sum[i / 4][i % 4] += vload(sums + i * kLanes<S>);
  }
#pragma GCC unroll 32
  for (int i = 0; i < ROWS * 4; ++i) vstore(sum[i / 4][i % 4], sums + i * kLanes<S>);
}

// sums[r] (+)= row r times one panel. Runs chunk by chunk of the depth: a chunk of the panel stays in the L1 cache
// while all tiles of rows use it. Calls finish(first row, rows) once the sums of a tile are complete: its loads and
// stores to colder memory then overlap with the products of the next tile. CHUNK: terms in one accumulation chunk.
template <class S, int64_t CHUNK = kAccumulationChunk, class Finish>
FASTSEQ_INLINE void multiply_block(const Operand<S>* const* a,  // (rows) rows of K elements
                                   int64_t rows,
                                   const Operand<S>* panel,  // (K, 4 vectors)
                                   int64_t K,                // padded
                                   const Operand<S>* next,   // panel to prefetch
                                   bool add,
                                   Acc<S>* sums,  // (rows, 4 vectors)
                                   const Finish& finish) {
  constexpr int64_t kDepth = CHUNK * kPair<S>, kWidth = 4 * kLanes<S>;
  if (rows == 0) return;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t distance = K < kPrefetchDistance ? K : kPrefetchDistance;
  for (int64_t begin = 0; begin == 0 || begin < K; begin += kDepth, add = true) {
    const int64_t depth = K - begin < kDepth ? K - begin : kDepth, later = begin + distance;
    const Operand<S>* const prefetched = later < K ? panel + later * kWidth : next + (later - K) * kWidth;
    int64_t number = 0;  // of the tile
    for_each_tile(rows, [&](auto height, int64_t first) FASTSEQ_LAMBDA_INLINE {
      constexpr int ROWS = decltype(height)::count;
      multiply_tile<S, ROWS>(a + first, begin, panel + begin * kWidth, depth,
                             share_of_prefetch<S>(prefetched, number++, tiles), add, sums + first * kWidth);
      if (begin + kDepth >= K) finish(first, ROWS);
    });
  }
}
template <class S>
FASTSEQ_NOINLINE void multiply_block(const Operand<S>* const* a,  // (rows) rows of K elements
                                     int64_t rows,
                                     const Operand<S>* panel,  // (K, 4 vectors)
                                     int64_t K,                // padded
                                     const Operand<S>* next,   // panel to prefetch
                                     bool add,
                                     Acc<S>* sums) {  // (rows, 4 vectors)
  multiply_block<S>(a, rows, panel, K, next, add, sums, [](int64_t, int64_t) {});
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
      for (int v = 0; v < 4; ++v) multiply_add<S>(broadcast<S>(a), w, sum[r][v]);
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
