// Shared by the cluster recurrences: pieces of 8 bytes, the unit of the exchange and of B fragments.
#pragma once

#include <initializer_list>

#include "cuda/common/cell_math.cuh"
#include "cuda/lstm/params.h"

namespace fastseq::cuda::cluster {

// P: numbers in a piece.
template <class T>
constexpr int kPiece = 8 / static_cast<int>(sizeof(T));
// Units in a step of K.
template <class T>
constexpr int kStep = 4 * kPiece<T>;

// Packs P numbers into two fragment words.
template <class T>
FASTSEQ_DEVICE uint2 piece_of(const float (&x)[kPiece<T>]) {
  if constexpr (sizeof(T) == 2)
    return {pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3])};
  else
    return {to_tf32(x[0]), to_tf32(x[1])};
}

template <class T>
FASTSEQ_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2)
    multiply_16x8x16<T>(d, a, b);
  else
    multiply_16x8x8_tf32(d, a, b);
}

// Sequences of a cluster's tile: from `first` to before `end`, at least one.
struct RowRange {
  int first, end;
};

// tiles: of the batch. rows: sequences of a tile; the last may have fewer.
FASTSEQ_DEVICE RowRange rows_of(const LstmShape& s, int tiles, int rows) {
  const int cluster = static_cast<int>(cluster_index()), batch = static_cast<int>(s.batch);
  const int first = (cluster < tiles ? cluster : cluster - tiles) * rows;  // at most two directions
  return {first, min(first + rows, batch)};
}

// Largest length of a tile of at most N * 8 sequences; the same in all threads of the cluster.
template <int N>
FASTSEQ_DEVICE int longest_of(const LstmShape& s, const RowRange& rows) {
  static_assert(N * 8 <= 32, "a lane for each sequence");
  if (!s.lengths) return static_cast<int>(s.steps);
  const int row = rows.first + lane_id() % (N * 8);
  int longest = row < rows.end ? max(static_cast<int>(s.lengths[row]), 0) : 0;
#pragma unroll
  for (int offset = 16; offset; offset /= 2) longest = max(longest, __shfl_xor_sync(kAllLanes, longest, offset));
  return min(longest, static_cast<int>(s.steps));
}

// Returns the plan with the smallest tiles of the batch whose clusters are all resident at once. If there is none, the
// plan with the largest tiles of which at least one cluster is resident; else nullopt. plan_of(row_tiles): optional
// plan. resident(plan): number of clusters resident at once.
template <class PlanOf, class Resident>
auto best_tiles(std::initializer_list<int> sizes, int64_t directions, const PlanOf& plan_of, const Resident& resident) {
  decltype(plan_of(1)) best;
  for (const int row_tiles : sizes) {
    const auto plan = plan_of(row_tiles);
    const int clusters = plan ? resident(*plan) : 0;
    if (clusters) best = plan;
    if (clusters && static_cast<int64_t>(plan->tile.tiles) * directions <= clusters) break;
  }
  return best;
}

// Returns the plan with tiles of 2 or 4 sequences instead of 8, if `clusters` hold them all at once. Other layers of a
// wavefront need the room.
template <class Plan>
Plan spread(Plan plan, const LstmShape& s, int clusters) {
  if (s.beside || plan.row_tiles > 1) return plan;
  for (const int rows : {2, 4}) {
    const int64_t tiles = divide_up(s.batch, rows);
    if (tiles * s.directions > clusters) continue;
    plan.tile.rows = rows;
    plan.tile.tiles = static_cast<int>(tiles);
    plan.launch.grid = dim3(static_cast<unsigned>(tiles * s.directions * plan.tile.blocks));
    break;
  }
  return plan;
}

}  // namespace fastseq::cuda::cluster
