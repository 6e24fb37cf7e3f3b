// Forward grid recurrence of one LSTM layer: all T steps in one cooperative launch over the whole device.
//
// A team of blocks computes some rows of the batch in one direction. Rows are independent, so teams never communicate.
// A block computes groups of 8 hidden units: 4 gate rows of W_hh each, all K = H columns. Its 8 warps split K. W_hh
// stays in registers and shared memory for the whole sequence. Drawings, proof and cost: docs/kernels/cuda-grid.md.
//
//   grid_forward_layout.cuh      plan, rows and units of a block, shared memory
//   grid_forward_arithmetic.cuh  fragments and products of 16-bit, TF32 and exact float
//   grid_forward_exchange.cuh    h between blocks: sequence tags
//   grid_forward_product.cuh     W h
//   this file                    cell, kernel
#pragma once

#include "cuda/lstm/grid_forward_product.cuh"

namespace fastseq::cuda::grid_forward {

// The cell of a thread: one unit of one row. Threads past the units of a pass or the rows of a pair have none. It is
// constructed twice per pass, before and after the wait for h, so that only `loaded` occupies registers during the
// wait.
template <class M, int G>
struct Cell {
  using T = typename M::T;
  int row;                  // index in the team
  int unit;                 // index in the direction
  int pass_row, pass_unit;  // index in the pair of tiles, in the pass
  int length;               // of the row
  bool owned, exists, active;
  float* c;

  FASTSEQ_DEVICE Cell(const BlockTask& task, const Plan& plan, const Shared<G>& shared, int hidden, const Place& at) {
    const unsigned thread = thread_now();
    pass_row = thread / (G * kUnits);
    pass_unit = thread % (G * kUnits);
    const int block_unit = at.pass * G * kUnits + pass_unit;
    row = at.pair * kPair + pass_row;
    unit = task.group * kUnits + block_unit;
    owned = pass_row < kPair && row < task.rows && block_unit < task.groups * kUnits;
    exists = owned && unit < hidden;
    length = exists ? shared.lengths[row] : 0;
    active = at.step < length;
    c = shared.cells + row * plan.groups * kUnits + block_unit;
  }

  // Index in (T, B, D) of this step. Past the length t = step, where the output is zero.
  FASTSEQ_DEVICE int64_t place(const LstmShape& s, const BlockTask& task, int step) const {
    const unsigned t = active && task.backwards ? length - 1 - step : step;
    const unsigned rows = static_cast<unsigned>(s.batch * s.directions);  // of a step
    return static_cast<int64_t>(t) * rows + ((task.first_row + row) * static_cast<int>(s.directions) + task.direction);
  }

  // Loads the input product x W_ih^T + b, which depends on no other block, before the wait for h. It is converted after
  // the product: a conversion waits for its load, and so would the first poll.
  FASTSEQ_DEVICE void load(T (&gates)[4], const LstmForwardParams& p, const BlockTask& task, int step) const {
    if (!active) return;
    const T* from = static_cast<const T*>(p.gates) + place(p.shape, task, step) * 4 * p.shape.hidden + unit;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) gates[gate] = from[gate * p.shape.hidden];
  }

  // Adds the sums of the warps. Not only where `active`: the length need not be there yet.
  FASTSEQ_DEVICE void add(float (&gates)[4], const float* partial) const {
    if (!owned) return;
    const unsigned unit_now = pass_unit;
    const float* from = partial + Shared<G>::at(0, unit_now / kUnits, pass_row, unit_now % kUnits);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      float part[4];
      load_wide(part, from + warp * Shared<G>::kPartial);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) gates[gate] += part[gate];
    }
  }

  // Replaces gates by activations and c_{t-1} by c_t. Returns h_t; 0 past the length.
  FASTSEQ_DEVICE float update(float (&gates)[4]) const {
    if (!active) return 0.0f;
    return lstm_cell_for<T>(gates[0], gates[1], gates[2], gates[3], *c);
  }

  // buffer: the next step's h. Warp-collective: adjacent lanes pack two values into one word.
  FASTSEQ_DEVICE void send(uint32_t* buffer, uint32_t tag, const Plan& plan, float h) const {
    send_hidden<M>(buffer, tag, plan, owned, row, unit, h);
  }

  FASTSEQ_DEVICE void store(
      const LstmForwardParams& p, const BlockTask& task, int step, const float (&activations)[4], float h) const {
    if (!exists) return;
    const LstmShape& s = p.shape;
    const int64_t at = place(s, task, step);
    from_float(h, static_cast<T*>(p.output) + at * s.hidden + unit);
    if (!active) return;
    if (p.cell_states) p.cell_states[at * s.hidden + unit] = *c;
    if (p.activations) {
      T* to = static_cast<T*>(p.activations) + at * 4 * s.hidden + unit;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) from_float(activations[gate], to + gate * s.hidden);
    }
    if (step + 1 < length) return;
    const int64_t last = (task.direction * s.batch + task.first_row + row) * s.hidden + unit;
    from_float(h, static_cast<T*>(p.h_n) + last);
    store_state<T>(*c, p.c_n, last, s.wide_states);
  }
};

// Loads lengths and cell states into shared memory. Writes the final states of rows of length 0.
template <class M, int G>
FASTSEQ_DEVICE void begin(const LstmForwardParams& p,
                          const BlockTask& task,
                          const Plan& plan,
                          const Shared<G>& shared) {
  using T = typename M::T;
  const LstmShape& s = p.shape;
  for (int row = threadIdx.x; row < task.rows; row += kThreads) {
    const int64_t length = s.lengths ? s.lengths[task.first_row + row] : s.steps;
    shared.lengths[row] = static_cast<int>(min(max(length, static_cast<int64_t>(0)), s.steps));
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < plan.pairs(); pair += kThreads) {
    int longest = 0;
    for (int row = pair * kPair; row < min(task.rows, (pair + 1) * kPair); ++row) {
      longest = max(longest, shared.lengths[row]);
    }
    shared.longest[pair] = longest;
  }
  const int units = task.groups * kUnits;
#pragma unroll 1
  for (int k = threadIdx.x; k < task.rows * units; k += kThreads) {
    const int row = k / units, unit = k % units, column = task.group * kUnits + unit;
    if (column >= s.hidden) continue;
    const int64_t index = (task.direction * s.batch + task.first_row + row) * s.hidden + column;
    const float c = load_state<T>(p.c0, index, s.wide_states);
    shared.cells[row * plan.groups * kUnits + unit] = c;
    if (shared.lengths[row]) continue;
    static_cast<T*>(p.h_n)[index] = static_cast<const T*>(p.h0)[index];
    store_state<T>(c, p.c_n, index, s.wide_states);
  }
  __syncthreads();
}

// Cooperative grid of directions * splits * blocks. Workspace: (teams, Plan::team_words()) zeroed words.
template <class M, int G>
__global__ void __launch_bounds__(kThreads, 1) lstm_grid_forward_kernel(const LstmForwardParams p, const Plan plan) {
  FASTSEQ_DYNAMIC_SHARED(memory);
  using T = typename M::T;
  const LstmShape& s = p.shape;
  const int hidden_size = static_cast<int>(s.hidden);
  const BlockTask task = task_of(s, plan);
  const Shared<G> shared(memory, plan);
  begin<M, G>(p, task, plan, shared);

  uint32_t* counter = static_cast<uint32_t*>(p.workspace) + blockIdx.x / plan.blocks * plan.team_words();
  uint32_t* buffers = counter + kHeaderWords;
  const int64_t first = (task.direction * s.batch + task.first_row) * s.hidden;
  send_initial<M>(buffers, static_cast<const T*>(p.h0) + first, hidden_size, task, plan);
  Weights<M, G> weights;
  weights.load(static_cast<const T*>(p.weight_hh) + task.direction * 4 * s.hidden * s.hidden, hidden_size, task, plan,
               shared);
  const SpinLimit limit{s.spin_limit, counter + 1};
  if (!grid_barrier(counter, 1, plan.blocks, limit)) {  // blocks without a multiprocessor have not sent their h0
    for (size_t k = 0; k < plan.buffer_words; ++k) store_relaxed(buffers + k, kNaNWord);
  }

  const Hidden<M> hidden{.buffers = buffers, .rows = task.rows, .hidden = hidden_size, .limit = limit};
  typename Hidden<M>::Words h;
  T loaded[4] = {};
  const int passes = passes_of<G>(task);
  Place at{0, 0, 0};
  const auto request = [&](const Place& place, int longest) {
    if (place.step >= longest) return;  // at most s.steps
    hidden.request(h, plan, place, static_cast<int>(thread_now() / 32u) * plan.warp_chunks);
  };
  Cell<M, G>(task, plan, shared, hidden_size, at).load(loaded, p, task, at.step);
  int longest = shared.longest[0];  // of the rows of at.pair
  request(at, longest);
  unsigned round = 0;
  while (at.step < s.steps) {
    Place next{at.step, at.pair, at.pass + 1};
    if (next.pass == passes) {
      next.pass = 0;
      if (++next.pair * kPair >= task.rows) next = {at.step + 1, 0, 0};
    }
    // Double buffer: a fast warp writes the sums of the next round while slower warps still read this round's.
    float* partial = shared.partial + round % 2 * kWarps * Shared<G>::kPartial;
    const bool live = at.step < longest;
    if (live) {
      multiply_pair(partial, weights, shared, plan, hidden, h, at);
      __syncthreads();
      ++round;
    }
    const Cell<M, G> cell(task, plan, shared, hidden_size, at);
    float gates[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) gates[gate] = to_float(opaque(loaded[gate]));
    if (live) cell.add(gates, partial);
    const float out = cell.update(gates);
    if (at.step + 1 < longest) {
      cell.send(hidden.buffer(plan, at.step + 1), Hidden<M>::tag_of(at.step + 1), plan, out);
    }
    longest = shared.longest[next.pair];
    request(next, longest);
    Cell<M, G>(task, plan, shared, hidden_size, next).load(loaded, p, task, next.step);
    cell.store(p, task, at.step, gates, out);
    at = next;
  }
  if (threadIdx.x == 0 && plan.stalled && load_acquire(limit.stop)) store_release(plan.stalled, 1);
}

}  // namespace fastseq::cuda::grid_forward
