// Backward grid recurrence of one LSTM layer: all T steps in one cooperative launch over the whole device. Blocks
// exchange the gradients of the gates (dgates) through L2, with one flag per block and step.
//
// Block (slice, group, direction) owns 16 R hidden units and a group of rows. Steps run from the direction's last time
// step to its first: dh = W_hh^T dgates (previous step, all units of the direction) + grad_output; cell; dgates of the
// block's units to the exchange. Groups of rows are independent. Drawings, proof and cost: docs/kernels/cuda-grid.md.
//
//   grid_backward_arithmetic.cuh  fragments and products of 16-bit, TF32 and exact float
//   grid_backward_layout.cuh      plan, units and rows of a block, workspace, shared memory
//   grid_backward_product.cuh     W_hh^T dgates
//   grid_backward_cell.cuh        cell
//   this file                     exchange, kernel
//
// Exchange: T [2][D][tile of 8 rows][chunk][8 rows][U units][4 gates]; one store writes the four dgates of a unit. Rows
// past the batch are neither written nor read. Units past H stay zero from the zeroed workspace; so are their weights.
//
// Step s reads buffer (s + 1) & 1 and writes buffer s & 1. Two buffers suffice because a block raises its flag to s + 1
// only after a __syncthreads that follows its reads of step s, and every block waits for all flags >= s before it
// writes in step s.
#pragma once

#include "cuda/lstm/grid_backward_cell.cuh"
#include "cuda/lstm/grid_backward_product.cuh"

namespace fastseq::cuda::grid_backward {

// Makes one dgate of a slice NaN in each row of the buffer that `step` reads. So all later results of these rows are
// NaN. Reports the stall to the host.
template <class Product, int R>
FASTSEQ_DEVICE void give_up(const Block<Product, R>& block, int step, int slice) {
  using T = typename Product::Element;
  constexpr int kChunk = Block<Product, R>::kChunk;
  if (block.plan.stalled) store_release(block.plan.stalled, 1);
  const int chunk = slice * Block<Product, R>::kBlockUnits / Product::kUnits;
  T* from = block.exchange + ((step + 1) & 1) * block.buffer + static_cast<int64_t>(chunk) * kChunk;
#pragma unroll 1
  for (int row = 0; row < block.rows; ++row) {
    T* to = from + row / kTileRows * block.plan.chunks * kChunk + row % kTileRows * Product::kUnits * 4;
    T nan;
    from_float(__builtin_nanf(""), &nan);
    store_l2(to, nan);
  }
}

// Waits until the blocks whose units this warp multiplies have finished step - 1.
template <class Product, int R>
FASTSEQ_DEVICE void wait(const Block<Product, R>& block, int step) {
  constexpr int kBlockUnits = Block<Product, R>::kBlockUnits;
  const int first = block.first_chunk * Product::kUnits / kBlockUnits;
  const int last = ((block.first_chunk + block.chunks) * Product::kUnits - 1) / kBlockUnits;
  for (int slice = first + lane_id(); slice <= last; slice += 32) {
    const SpinLimit limit{block.p.shape.spin_limit, block.flags + 1};
    if (!wait_for_flag(block.flags + slice * kFlagStride, static_cast<unsigned>(step), limit)) {
      give_up(block, step, slice);
    }
  }
  __syncwarp();
}

// Step `steps` is only the product, which gives grad_h0. To shorten the critical path between blocks, the inputs of a
// thread's first cell are loaded before the wait, and its dgates are written to grad_gates after the flag.
template <class Product, int R>
FASTSEQ_DEVICE void run_step(const typename Block<Product, R>::Weights (&held)[Block<Product, R>::kHeld],
                             const Block<Product, R>& block,
                             int step) {
  using T = typename Product::Element;
  constexpr int kBlockUnits = Block<Product, R>::kBlockUnits;
  constexpr bool kDeferred = R == 1;  // else no registers are left
  const int first_row = threadIdx.x / kBlockUnits, first_unit = threadIdx.x % kBlockUnits;
  const bool last = step == block.p.shape.steps;
  const CellInputs<T> prefetched = read_cell(block, first_row, first_unit, step);
  Vector<T, 4> deferred{};
  wait(block, step);
  for (int tile = 0; tile < block.tiles; tile += block.plan.pass_tiles) {
    const int count = min(block.plan.pass_tiles, block.tiles - tile);
    multiply(held, block, step, tile, count);
    __syncthreads();
    int item = threadIdx.x;
    if (tile == 0 && !last) {
      if (item < count * kTileRows * kBlockUnits && block.exists(first_row, first_unit)) {
        const float dh = sum_of_warps(block, first_row, first_unit);
        deferred = step_cell(block, first_row, first_unit, step, prefetched, dh);
        if (!kDeferred) write_dgates(block, first_row, first_unit, step, deferred);
      }
      item += blockDim.x;
    }
    for (; item < count * kTileRows * kBlockUnits; item += blockDim.x) {
      const int row = tile * kTileRows + item / kBlockUnits, unit = item % kBlockUnits;
      if (!block.exists(row, unit)) continue;
      const float dh = sum_of_warps(block, item / kBlockUnits, unit);
      if (last) {
        write_states(block, row, unit, dh);
      } else {
        const CellInputs<T> x = read_cell(block, row, unit, step);
        write_dgates(block, row, unit, step, step_cell(block, row, unit, step, x, dh));
      }
    }
    __syncthreads();
  }
  if (last) return;
  if (threadIdx.x == 0) store_release(block.flags + blockIdx.x * kFlagStride, static_cast<unsigned>(step) + 1);
  const int pass_rows = min(block.plan.pass_tiles, block.tiles) * kTileRows;  // of the first pass
  if (kDeferred && first_row < pass_rows && block.exists(first_row, first_unit)) {
    write_dgates(block, first_row, first_unit, step, deferred);
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
  __syncthreads();
  for (int step = 0; step <= p.shape.steps; ++step) run_step(held, block, step);
}

}  // namespace fastseq::cuda::grid_backward
