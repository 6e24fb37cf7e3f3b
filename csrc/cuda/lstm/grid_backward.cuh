// The backward recurrence of one LSTM layer on a grid that spans the device: blocks exchange the gradients of the gates
// (dgates) through L2, with one synchronisation a step.
//
// Block (slice, group, direction) owns 16 R hidden units and some rows of the batch. A step, from the last of the
// direction to its first: dh = W_hh^T dgates of the step before (all units of the direction, own rows) + grad_output,
// then the cell, then the dgates of the own units go to the exchange. Groups of rows are independent of each other.
//
//   grid_backward_arithmetic.cuh  fragments and products of 16-bit, TF32 and exact float
//   grid_backward_layout.cuh      plan, what a block owns
//   grid_backward_product.cuh     W_hh^T dgates
//   grid_backward_cell.cuh        the cell
//   this file                     the exchange, the kernel
//
// Exchange, T [2][D][tile of 8 rows][chunk][8 rows][U units][4 gates]: the four dgates of a unit are adjacent, one
// store. Rows past the batch are neither written nor read. Units past H are never written: the workspace is zero there,
// and so are their weights.
//
// Why two buffers suffice. Step s reads buffer (s + 1) & 1 (dgates of step s - 1; zero before the first) and writes
// buffer s & 1, which was read by the products of step s - 1. Before a block writes, its warps together have waited
// until the flags of all blocks of the group reach s, and have met in __syncthreads. A block sets its flag to s when
// its products of step s - 1 are done: they end in a __syncthreads before the cell, and the flag follows the cell. So
// no block that still reads the buffer can have let another block write it.
#pragma once

#include "cuda/lstm/grid_backward_cell.cuh"
#include "cuda/lstm/grid_backward_product.cuh"

namespace fastseq::cuda::grid_backward {

// Waits for the blocks whose units this warp multiplies.
template <class Product, int R>
FASTSEQ_DEVICE void wait(const Block<Product, R>& block, int step) {
  constexpr int kOwnUnits = Block<Product, R>::kOwnUnits;
  const int first = block.first_chunk * Product::kUnits / kOwnUnits;
  const int last = ((block.first_chunk + block.chunks) * Product::kUnits - 1) / kOwnUnits;
  for (int slice = first + lane_id(); slice <= last; slice += 32) {
    wait_for_flag(block.flags + slice * kFlagStride, static_cast<unsigned>(step));
  }
  __syncwarp();
}

// Step `steps` is the product alone, which gives grad_h0. The inputs of a thread's first cell are loaded before the
// wait, and its dgates are written after the flag: both are off the critical path from block to block.
template <class Product, int R>
FASTSEQ_DEVICE void run_step(const typename Block<Product, R>::Weights (&held)[Block<Product, R>::kHeld],
                             const Block<Product, R>& block,
                             int step) {
  constexpr int kOwnUnits = Block<Product, R>::kOwnUnits;
  const int own_row = threadIdx.x / kOwnUnits, own_unit = threadIdx.x % kOwnUnits;
  const bool last = step == block.p.shape.steps;
  const CellInputs own = read_cell(block, own_row, own_unit, step);
  Vector<typename Product::Element, 4> own_dgates{};
  wait(block, step);
  for (int tile = 0; tile < block.tiles; tile += block.plan.pass_tiles) {
    const int count = min(block.plan.pass_tiles, block.tiles - tile);
    multiply(held, block, step, tile, count);
    __syncthreads();
    for (int item = threadIdx.x; item < count * kTileRows * kOwnUnits; item += blockDim.x) {
      const int row = tile * kTileRows + item / kOwnUnits, unit = item % kOwnUnits;
      if (!block.exists(row, unit)) continue;
      const float dh = sum_of_warps(block, item / kOwnUnits, unit);
      const bool is_own = row == own_row && unit == own_unit;
      if (last) {
        write_states(block, row, unit, dh);
      } else if (is_own) {
        own_dgates = step_cell(block, row, unit, step, own, dh);
      } else {
        const CellInputs x = read_cell(block, row, unit, step);
        write_dgates(block, row, unit, step, step_cell(block, row, unit, step, x, dh));
      }
    }
    __syncthreads();
  }
  if (last) return;
  if (threadIdx.x == 0) store_release(block.flags + blockIdx.x * kFlagStride, static_cast<unsigned>(step) + 1);
  const int own_rows = min(block.plan.pass_tiles, block.tiles) * kTileRows;  // first pass; later ones are written above
  if (own_row < own_rows && block.exists(own_row, own_unit)) write_dgates(block, own_row, own_unit, step, own_dgates);
}

template <class Product, int R>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    lstm_grid_backward_kernel(const LstmBackwardParams p, const Plan plan) {
  FASTSEQ_DYNAMIC_SHARED(shared);
  const Block<Product, R> block(p, plan, shared);
  typename Block<Product, R>::Weights held[Block<Product, R>::kHeld];
  load_weights(held, block);
  load_states(block);
  __syncthreads();
  for (int step = 0; step <= p.shape.steps; ++step) run_step(held, block, step);
}

}  // namespace fastseq::cuda::grid_backward
