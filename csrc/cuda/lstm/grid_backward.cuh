// Backward grid recurrence of one LSTM layer: all T steps in one cooperative launch over the whole device. Blocks
// exchange the gradients of the gates (dgates) through L2.
//
// Block (slice, group, direction) owns 16 R hidden units and a group of rows. Steps run from the direction's last time
// step to its first: dh = W_hh^T dgates (previous step, all units of the direction) + grad_output; cell; dgates of the
// block's units to the exchange. Groups of rows are independent. Drawings, proof and cost: docs/kernels/cuda-grid.md.
//
//   grid_backward_arithmetic.cuh  fragments and products of 16-bit, TF32 and exact float
//   grid_backward_layout.cuh      plan, units and rows of a block, workspace, shared memory
//   grid_backward_exchange.cuh    dgates between blocks: sequence tags
//   grid_backward_product.cuh     W_hh^T dgates
//   grid_backward_cell.cuh        cell
//   this file                     step, kernel
#pragma once

#include "cuda/lstm/grid_backward_cell.cuh"
#include "cuda/lstm/grid_backward_product.cuh"

namespace fastseq::cuda::grid_backward {

// Step `steps` is only the product, which gives grad_h0. To shorten the critical path between blocks, the inputs of a
// thread's first cell of a pass are loaded while the first polls are in flight.
template <class Product, int R>
FASTSEQ_DEVICE void run_step(const typename Block<Product, R>::Weights (&held)[Block<Product, R>::kHeld],
                             const Block<Product, R>& block,
                             int step) {
  constexpr unsigned kBlockUnits = Block<Product, R>::kBlockUnits;
  const bool last = step == static_cast<int>(block.p.shape.steps);
  for (int tile = 0; tile < block.tiles; tile += block.plan.pass_tiles) {
    const int count = min(block.plan.pass_tiles, block.tiles - tile), first = tile * kTileRows;
    CellInputs<typename Product::Element> x{};
    multiply(held, block, step, tile, count, [&] {
      const unsigned thread = thread_now();
      x = read_cell(block, first + thread / kBlockUnits, thread % kBlockUnits, step);
    });
    const unsigned items = min(count * kTileRows, block.rows - first) * kBlockUnits;
    unsigned item = thread_now();
    __syncthreads();
    for (bool prefetched = true; item < items; item += blockDim.x, prefetched = false) {
      const unsigned row = first + item / kBlockUnits, unit = item % kBlockUnits;
      const float dh = sum_of_warps(block, item / kBlockUnits, unit);
      if (last) {
        if (block.exists(row, unit)) write_states(block, row, unit, dh);
        continue;
      }
      if (!prefetched) x = read_cell(block, row, unit, step);
      const auto dgates = step_cell(block, row, unit, step, x, dh);
      if (block.exists(row, unit)) write_dgates(block, row, unit, step, dgates);
    }
    __syncthreads();  // before the next products overwrite the sums
  }
}

template <class Product, int R>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    lstm_grid_backward_kernel(const LstmBackwardParams p, const Plan plan) {
  FASTSEQ_DYNAMIC_SHARED(shared);
  const Block<Product, R> block(p, plan, shared);
  typename Block<Product, R>::Weights held[Block<Product, R>::kHeld];
  load_weights(held, block);
  load_states(block);
  clear_sums(block);
  __syncthreads();
  for (int step = 0; step <= p.shape.steps; ++step) run_step(held, block, step);
}

}  // namespace fastseq::cuda::grid_backward
