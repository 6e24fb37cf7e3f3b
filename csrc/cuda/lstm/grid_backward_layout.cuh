// Layout of the backward grid recurrence: plan of a launch; rows, units, workspace and shared memory of a block.
#pragma once

#include "cuda/lstm/grid_backward_arithmetic.cuh"
#include "cuda/lstm/params.h"

namespace fastseq::cuda::grid_backward {

constexpr int kMaxWarps = 8;     // of a block, so that a thread may use 255 registers
constexpr int kStopStride = 32;  // words: one cache line per SpinLimit::stop, so that the exchange begins on a line

struct Plan {
  int unit_tiles;   // R: tiles of 16 units of a block
  int slices;       // blocks that split the units of a direction
  int groups;       // groups of rows
  int tiles;        // tiles of 8 rows in the batch
  int group_tiles;  // tiles in a group
  int chunks;       // chunks of k
  int warps;        // of a block
  int warp_chunks;  // chunks of a warp, at most
  int pass_tiles;   // tiles whose sums are in shared memory at once
  size_t shared_memory;
  unsigned* stalled;  // stall_word(), set where a wait ended in vain; or null
};

// Block (slice, group, direction): 16 R hidden units and a group of rows.
template <class Product, int R>
struct Block {
  using T = typename Product::Element;
  using Part = Vector<typename Product::Word, 4>;
  using Weights = Part[R][Product::kParts];  // of a lane, of one chunk

  static constexpr int kHeld = Product::held_parts(R) / Product::kParts / R;        // chunks of a warp in registers
  static constexpr int kStage = Product::kStage < kHeld ? Product::kStage : kHeld;  // chunks polled at once
  static constexpr int kBlockUnits = kTileUnits * R;
  static constexpr int kStride = kBlockUnits + 4;        // between rows of sums: a warp's stores fall on 32 banks
  static constexpr int kTileSums = kTileRows * kStride;  // sums of a warp and tile
  static constexpr int kUnitPairs = sizeof(T) / 2;       // pairs of words of a unit's four gates
  static constexpr int kChunk = kTileRows * Product::kUnits * kUnitPairs;  // pairs of a chunk in the exchange

  const LstmBackwardParams& p;
  const Plan& plan;
  bool backwards;  // the direction is reversed
  int direction, first_row, first_unit;
  int rows, tiles;          // of the group; rows excludes those past the batch
  int first_chunk, chunks;  // of this warp
  unsigned* stop;           // SpinLimit::stop of this direction and group
  uint64_t* exchange;       // of this direction and group, buffer 0
  int64_t buffer;           // pairs between the two buffers
  uint4* weights;           // (warps, warp_chunks - kHeld, R * parts, 32)
  float* sums;              // (pass_tiles, kMaxWarps, 8 rows, kStride)
  float2* carry;            // (group's rows, block's units): dh carried past the lengths, and dc
  int* lengths;             // (group's rows,)

  FASTSEQ_DEVICE Block(const LstmBackwardParams& p, const Plan& plan, unsigned char* shared) : p(p), plan(plan) {
    const int group = blockIdx.y, warp = threadIdx.x / 32;
    direction = blockIdx.z;
    backwards = p.shape.directions == 2 ? direction == 1 : p.shape.reverse;
    first_row = group * plan.group_tiles * kTileRows;
    first_unit = static_cast<int>(blockIdx.x) * kBlockUnits;
    tiles = min(plan.group_tiles, plan.tiles - group * plan.group_tiles);
    rows = static_cast<int>(min(static_cast<int64_t>(tiles) * kTileRows, p.shape.batch - first_row));
    first_chunk = min(warp * plan.warp_chunks, plan.chunks);
    chunks = min(plan.warp_chunks, plan.chunks - first_chunk);

    const int64_t D = p.shape.directions, of_tile = static_cast<int64_t>(plan.chunks) * kChunk;
    unsigned* stops = static_cast<unsigned*>(p.workspace);
    stop = stops + (direction * plan.groups + group) * kStopStride;
    buffer = D * plan.tiles * of_tile;
    exchange = reinterpret_cast<uint64_t*>(stops + D * plan.groups * kStopStride) +
               (direction * plan.tiles + group * plan.group_tiles) * of_tile;

    weights = reinterpret_cast<uint4*>(shared);
    sums = reinterpret_cast<float*>(weights + plan.warps * max(0, plan.warp_chunks - kHeld) * R * Product::kParts * 32);
    carry = reinterpret_cast<float2*>(sums + plan.pass_tiles * kMaxWarps * kTileSums);
    lengths = reinterpret_cast<int*>(carry + plan.group_tiles * kTileRows * kBlockUnits);
  }

  FASTSEQ_DEVICE bool exists(int row, int unit) const { return row < rows && first_unit + unit < p.shape.hidden; }

  // Index in (D, B, H).
  FASTSEQ_DEVICE int64_t state_at(int row, int unit) const {
    return (direction * p.shape.batch + first_row + row) * p.shape.hidden + first_unit + unit;
  }

  // Index in (T, B, D, H) of the time step `time`. Most of it is the same for all threads.
  FASTSEQ_DEVICE int64_t step_at(int time, int row, int unit) const {
    const int64_t line = (time * p.shape.batch + first_row) * p.shape.directions + direction;
    const int columns = static_cast<int>(p.shape.directions * p.shape.hidden);
    return line * p.shape.hidden + first_unit + (static_cast<int64_t>(row) * columns + unit);
  }

  // Time step of gradient step `step`.
  FASTSEQ_DEVICE int time_of(int step) const { return backwards ? step : static_cast<int>(p.shape.steps) - 1 - step; }
};

}  // namespace fastseq::cuda::grid_backward
