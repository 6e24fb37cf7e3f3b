// Products x W^T of the decoder, for tiles of rows and one panel of W: weights packed, or read in place.
//
// A panel is four vectors of columns. Gates: the four gates of kLanes hidden units. Columns: 4 * kLanes neighbours.
#pragma once

#include <cstdint>

#include "cpu/isa/region.h"
#include "cpu/kernels/decoder_params.h"
#include "cpu/kernels/dot-inl.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Rows of W behind the vectors of each panel.
template <class S>
struct PanelRows {
  int64_t M;      // rows of W
  bool is_gates;  // M = 4H, a panel holds kLanes hidden units; else 4 * kLanes neighbouring rows

  int64_t panels() const {
    const int64_t rows = is_gates ? M / 4 : M, width = is_gates ? kLanes<S> : 4 * kLanes<S>;
    return (rows + width - 1) / width;
  }
  // First row of vector q.
  int64_t first(int64_t panel, int64_t q) const {
    return is_gates ? q * (M / 4) + panel * kLanes<S> : (panel * 4 + q) * kLanes<S>;
  }
  // Rows of vector q, at most kLanes; 0 or less past the end.
  int64_t count(int64_t panel, int64_t q) const {
    const int64_t rest = (is_gates ? (q + 1) * (M / 4) : M) - first(panel, q);
    return rest < kLanes<S> ? rest : kLanes<S>;
  }
};

// Operand rows of one factor of a sum of products: columns [begin, begin + depth) of W times `depth` columns of x.
template <class S>
struct DecoderSegment {
  const DecoderWeight<S>* weight;
  int64_t begin, depth;
  const S* x;  // (rows, depth), rows `stride` elements apart
  int64_t stride;
  const int64_t* index;     // row r reads row index[r] of x; null: row r
  const S* mask = nullptr;  // (rows, M) factors of the sum up to this segment, or null
  const S* row(int64_t r) const { return x + (index ? index[r] : r) * stride; }
  // The segment's depths of a packed panel.
  const S* panel(int64_t i) const { return panel_at<S>(weight->packed, i, weight->K) + begin * 4 * kLanes<S>; }
};

template <class S, int ROWS>
FASTSEQ_INLINE void multiply_in_place(const DecoderSegment<S>& segment,
                                      const S* const* a,  // (ROWS) rows of `depth` elements
                                      const PanelRows<S>& rows,
                                      int64_t panel,
                                      Vec<S> (&total)[ROWS][4]) {
  constexpr int GROUP = dot_group<S>(ROWS);
  const DecoderWeight<S>& w = *segment.weight;
  for (int64_t q = 0; q < 4; ++q) {
    const int64_t count = rows.count(panel, q);
    if (count <= 0) continue;
    const S* const base = w.rows + rows.first(panel, q) * w.K + segment.begin;
    Vec<S> sums[ROWS][kLanes<S>] = {};
    for (int group = 0; group * GROUP < count; ++group) {
      const S* row[GROUP];
      for (int g = 0; g < GROUP; ++g) {
        const int64_t u = group * GROUP + g;  // lanes past the last row repeat it
        row[g] = base + (u < count ? u : count - 1) * w.K;
      }
      dot_group_sums<S, ROWS, GROUP>(a, row, segment.depth, sums, group);
    }
    for (int r = 0; r < ROWS; ++r) total[r][q] += reduce_lanes<kLanes<S> / 2>(sums[r]);
  }
}

template <class S, int ROWS>
FASTSEQ_NOINLINE void multiply_segment(const DecoderSegment<S>& segment,
                                       int64_t first,
                                       const PanelRows<S>& rows,
                                       int64_t panel,
                                       int64_t next,  // the panel to prefetch
                                       int64_t tile,  // number of the tile, of `tiles`
                                       int64_t tiles,
                                       Vec<S> (&total)[ROWS][4]) {
  const S* a[ROWS];
  for (int r = 0; r < ROWS; ++r) a[r] = segment.row(first + r);
  if (segment.weight->packed) {
    const Ahead ahead = share_of_prefetch<S>(segment.panel(next), tile, tiles);
    multiply_panel<S, ROWS>(a, segment.panel(panel), segment.depth, ahead, total);
  } else if constexpr (ROWS <= kSkinnyRows) {
    multiply_in_place<S, ROWS>(segment, a, rows, panel, total);
  }
}

// Multiplies the sums of one row of a panel of columns by mask (rows, M).
template <class S>
FASTSEQ_NOINLINE void apply_mask(
    const S* mask, int64_t row, const PanelRows<S>& rows, int64_t panel, Vec<S> (&sums)[4]) {
  for (int64_t q = 0; q < 4; ++q) {
    const int64_t column = rows.first(panel, q), n = rows.count(panel, q);
    if (n > 0) sums[q] = sums[q] * vload(mask + row * rows.M + column, n);
  }
}

// Sums over the segments for rows [first, first + n), at most kBlockRows, of one packed panel: chunks of the panel
// stay in the L1 cache while all rows use them.
template <class S>
FASTSEQ_NOINLINE void multiply_segments(const DecoderSegment<S>* segments,
                                        int64_t count,
                                        const PanelRows<S>& rows,
                                        int64_t first,
                                        int64_t n,
                                        int64_t panel,
                                        int64_t next,  // the panel to prefetch
                                        Vec<S> (&sums)[kBlockRows][4]) {
  const S* a[kBlockRows];
  for (int64_t s = 0; s < count; ++s) {
    const DecoderSegment<S>& segment = segments[s];
    for (int64_t r = 0; r < n; ++r) a[r] = segment.row(first + r);
    multiply_block<S>(a, n, segment.panel(panel), segment.depth, segment.panel(next), s > 0,
                      reinterpret_cast<S*>(sums));
    for (int64_t r = 0; segment.mask && r < n; ++r) apply_mask(segment.mask, first + r, rows, panel, sums[r]);
  }
}

// Calls finish(row, panel, sums) for rows [begin, end) and panels [first_panel, last_panel), the last first if
// `reversed`. sums: four vectors, the sum over the segments of x W^T.
template <class S, class Finish>
FASTSEQ_INLINE void for_each_product(const DecoderSegment<S>* segments,
                                     int64_t count,
                                     const PanelRows<S>& rows,
                                     int64_t begin,
                                     int64_t end,
                                     int64_t first_panel,
                                     int64_t last_panel,
                                     bool reversed,
                                     const Finish& finish) {
  const bool packed = count > 0 && segments[0].weight->packed;
  const int64_t panels = last_panel - first_panel;
  const auto panel_of = [&](int64_t i) { return reversed ? last_panel - 1 - i : first_panel + i; };
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t panel = panel_of(i), next = panel_of(i + 1 < panels ? i + 1 : i);
    const int64_t tiles = (end - begin + kTileRows - 1) / kTileRows;
    int64_t number = 0;
    const auto tile = [&](auto height, int64_t offset) FASTSEQ_NOINLINE {
      constexpr int ROWS = decltype(height)::count;
      const int64_t first = begin + offset, own = number++;
      Vec<S> total[ROWS][4] = {};
      for (int64_t s = 0; s < count; ++s) {
        multiply_segment<S, ROWS>(segments[s], first, rows, panel, next, own, tiles, total);
        if (!segments[s].mask) continue;
        for (int r = 0; r < ROWS; ++r) apply_mask(segments[s].mask, first + r, rows, panel, total[r]);
      }
#pragma GCC unroll 1
      for (int r = 0; r < ROWS; ++r) finish(first + r, panel, total[r]);
    };
    if (packed && end - begin > 2 * kTileRows) {
      Vec<S> sums[kBlockRows][4];
      for (int64_t first = begin; first < end; first += kBlockRows) {
        const int64_t n = end - first < kBlockRows ? end - first : kBlockRows;
        multiply_segments(segments, count, rows, first, n, panel, next, sums);
        for (int64_t r = 0; r < n; ++r) finish(first + r, panel, sums[r]);
      }
    } else if (packed) {
      for_each_tile(end - begin, tile);
    } else {
      for_each_tile<kSkinnyRows>(end - begin, tile);
    }
  }
}

// Packs panel `panel` of W (M, K). scratch: 4 * kLanes rows of K elements.
template <class S>
void decoder_pack(const DecoderWeight<S>& w, bool is_gates, int64_t panel, S* scratch, void* packed) {
  constexpr int64_t kWidth = 4 * kLanes<S>;
  if (is_gates) return pack_gates<S>(w.rows, nullptr, w.M / 4, w.K, panel, packed);
  const int64_t first = panel * kWidth, count = w.M - first < kWidth ? w.M - first : kWidth;
  const S* rows = w.rows + first * w.K;
  if (count < kWidth) {
    std::memcpy(scratch, rows, count * w.K * sizeof(S));
    fill_zero(scratch + count * w.K, (kWidth - count) * w.K);
    rows = scratch;
  }
  pack_gates<S>(rows, nullptr, kLanes<S>, w.K, 0, static_cast<S*>(packed) + panel * kWidth * w.K);
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
