// Layout of the forward grid recurrence: plan of a launch, rows and units of a block, shared memory of a block.
#pragma once

#include "cuda/common/cell_math.cuh"
#include "cuda/lstm/params.h"

namespace fastseq::cuda::grid_forward {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kUnits = 8;                      // hidden units of a group
constexpr int kTile = 8;                       // rows of the batch in a tile
constexpr int kPair = 2 * kTile;               // rows of a pair of tiles, computed together
constexpr int kChunkWords = 16;                // 32-bit words of one row of a chunk of K
constexpr int kHeaderWords = 32;               // a line of 128 bytes, so that no load of h spans two lines
constexpr size_t kSliceBytes = 64 * kThreads;  // one slice (64 bytes) of every lane of a block

// Chosen by the launcher. A team is the set of blocks that compute the same rows of one direction.
struct Plan {
  int blocks;             // of a team
  int groups;             // of a block; the last block may have fewer
  int splits;             // teams of a direction, one per part of the batch
  int tiles;              // of a team; the last team may have fewer
  int chunks;             // of K
  int warp_chunks;        // of a warp; the last warps may have fewer, or none
  int shared_slices;      // slices of a lane in shared memory; the rest are in registers
  unsigned buffer_words;  // words of one buffer of h: (tiles, chunks, 8 rows, 16)
  size_t shared_memory;
  unsigned* stalled;  // stall_word(), set where a wait ended in vain; or null

  FASTSEQ_INLINE int pairs() const { return (tiles + 1) / 2; }
  // Workspace of a team: a 128-byte line, word 0 the barrier's counter, word 1 SpinLimit::stop; then buffers of h for
  // h0, odd steps and even steps.
  FASTSEQ_INLINE size_t team_words() const { return kHeaderWords + size_t{3} * buffer_words; }
};

// Work of one block: the rows of its team, and groups of units that no other block of the team computes.
struct BlockTask {
  int direction;
  bool backwards;       // from the last time step to the first
  int first_row, rows;  // of the batch
  int group, groups;    // first group of this block, number of groups
};

FASTSEQ_DEVICE BlockTask task_of(const LstmShape& s, const Plan& plan) {
  const int team = blockIdx.x / plan.blocks, member = blockIdx.x % plan.blocks;
  const int first = team % plan.splits * plan.tiles * kTile;
  const int all = (static_cast<int>(s.hidden) + kUnits - 1) / kUnits, group = member * plan.groups;
  BlockTask t;
  t.direction = team / plan.splits;
  t.backwards = s.directions == 2 ? t.direction : s.reverse;
  t.first_row = first;
  t.rows = min(plan.tiles * kTile, static_cast<int>(s.batch) - first);
  t.group = group;
  t.groups = min(plan.groups, all - group);
  return t;
}

// Passes over the groups of a block, G groups at once. A pass must not be empty: see grid_forward_exchange.cuh.
template <int G>
FASTSEQ_DEVICE int passes_of(const BlockTask& task) {
  return (task.groups + G - 1) / G;
}

// Shared memory of a block.
template <int G>
struct Shared {
  uint32_t* weights;  // (shared_slices, 4 operands, threads, 4); a thread reads only words that it wrote
  float* partial;     // (2, warps, G groups, 16 rows, 8 units, 4 gates), units permuted by at()
  float* cells;       // (rows, 8 * groups) cell states c; each belongs to one thread
  int* lengths;       // (rows,)
  int* longest;       // (pairs,) largest length of each pair of tiles

  static constexpr size_t kPartial = static_cast<size_t>(G) * kPair * kUnits * 4;  // of a warp
  static size_t bytes(const Plan& plan) {
    const size_t rows = static_cast<size_t>(plan.tiles) * kTile;
    const size_t words = 2 * kWarps * kPartial + rows * plan.groups * kUnits + rows + plan.pairs();
    return plan.shared_slices * kSliceBytes + 4 * words;
  }
  FASTSEQ_DEVICE Shared(unsigned char* memory, const Plan& plan) {
    const size_t rows = static_cast<size_t>(plan.tiles) * kTile;
    weights = reinterpret_cast<uint32_t*>(memory);
    partial = reinterpret_cast<float*>(memory + plan.shared_slices * kSliceBytes);
    cells = partial + 2 * kWarps * kPartial;
    lengths = reinterpret_cast<int*>(cells + rows * plan.groups * kUnits);
    longest = lengths + rows;
  }
  // Offset in `partial` of one unit of one row of a pair. The XOR avoids bank conflicts of 8 lanes that differ in rows
  // (put_sums) and of 8 lanes that differ in units (Cell::add).
  static FASTSEQ_DEVICE unsigned at(unsigned warp, unsigned group, unsigned row, unsigned unit) {
    return (((warp * G + group) * kPair + row) * kUnits + (unit ^ (row & 6))) * 4;
  }
  // at(warp, group, row + more, unit) - at(warp, 0, row, unit), for an even row of the first tile; more: 0, 1, 8, 9.
  static FASTSEQ_DEVICE unsigned further(unsigned group, unsigned more) { return (group * kPair + more) * kUnits * 4; }
};

}  // namespace fastseq::cuda::grid_forward
