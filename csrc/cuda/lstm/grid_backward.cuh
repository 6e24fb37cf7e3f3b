// The backward recurrence of an LSTM layer on a grid that spans the device: the gradients of the gates (dgates) are
// exchanged through L2, one synchronisation a step.
//
// Block (slice, group, direction) owns 16 R hidden units and some rows of the batch. A step, from the last of the
// direction to its first: dh = W_hh^T dgates of the step before (all units of the direction, own rows) + grad_output,
// then the cell, then the dgates of the own units go to the exchange. Groups of rows know nothing of each other.
//
// The product, (16 units, k) times (k, 8 rows): units are the M of the matrix instruction, rows its N, so that one row
// costs eight, not sixteen. k = 4 unit + gate (i, f, g, o) is cut into chunks of 4 U; each warp has some chunks, keeps
// their weights in registers for the whole sequence (what does not fit: in shared memory), and its sums meet those of
// the other warps in shared memory, added in the order of warps.
//
// Exchange, T [2][D][tile of 8 rows][chunk][8 rows][U units][4 gates]: the four dgates of a unit lie side by side as
// one store, and a lane of a matrix instruction finds its numbers of B, for two instructions, in one load of 16 bytes:
//
//   16-bit, U = 8, m16n8k16: lane 4 r + q loads units 2 q and 2 q + 1 of row r = (i f)(g o) | (i f)(g o)
//                            = b[0], b[1] of instruction 0 | of instruction 1
//   TF32,   U = 4, m16n8k8:  lane 4 r + q loads unit q of row r = i, f | g, o
//   exact,  U = 8, FMA:      lane 8 n + u loads unit u of every row: four lanes the same one, for four own units each
//
// Rows past the batch are neither written nor read. Units past H are never written: the workspace is zero there, and so
// are their weights.
//
// Two buffers suffice. Step s reads buffer (s + 1) & 1 (dgates of step s - 1; zero before the first) and writes
// buffer s & 1, whose readers were the products of step s - 1. Before a block writes, its warps have together waited
// for the flags of all blocks of the group to reach s, and met in __syncthreads. A block sets its flag to s when the
// products of step s - 1 are done: they end in a __syncthreads before the cell, the flag follows the cell. So whoever
// would still read the buffer has not let us come this far.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/lstm/params.h"

namespace fastseq::cuda {

constexpr int kTileRows = 8;
constexpr int kTileUnits = 16;
constexpr int kMaxWarps = 8;     // each thread may have 255 registers
constexpr int kFlagStride = 32;  // a line for each flag: dozens of warps poll it

struct GridBackwardPlan {
  int unit_tiles;   // R, 0: does not fit
  int slices;       // blocks that share the units of a direction
  int groups;       // of rows
  int tiles;        // of 8 rows, in the batch
  int group_tiles;  // in a group
  int chunks;       // of k
  int warps;        // of a block
  int warp_chunks;  // of a warp, at most
  int pass_tiles;   // whose sums lie in shared memory at once
  size_t shared_memory;
};

// What a warp's lanes sum of 16 own units and 8 rows: D of m16n8 instructions, in two chains that overlap.
struct MatrixSums {
  float d[2][4];

  // -> to[row * stride + own unit]
  FASTSEQ_DEVICE void store(float* to, int stride) const {
    const int r = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
    for (int k = 0; k < 4; ++k) to[(2 * q + k % 2) * stride + r + k / 2 * 8] = d[0][k] + d[1][k];
  }
};

// The same where each lane has 4 own units and an eighth of k.
struct ExactSums {
  float d[kTileRows][4];

  // Over pairs of lanes: one goes on with the first `Rows` of its rows, the other with the rest.
  template <int Rows>
  FASTSEQ_DEVICE void share() {
    const bool upper = lane_id() & Rows;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float sent = upper ? d[r][k] : d[r + Rows][k], kept = upper ? d[r + Rows][k] : d[r][k];
        d[r][k] = kept + __shfl_xor_sync(kAllLanes, sent, Rows);
      }
    }
  }

  // Adds over the eight lanes that have the same own units; lane u ends with row u.
  FASTSEQ_DEVICE void store(float* to, int stride) {
    share<4>();
    share<2>();
    share<1>();
    store_wide(to + lane_id() % 8 * stride + lane_id() / 8 * 4, d[0]);
  }
};

// A chunk as B of two instructions. Rows from `rows` on are zero and not read: one sequence costs one row of traffic.
FASTSEQ_DEVICE uint4 load_rows(const void* chunk, int rows) {
  return lane_id() / 4 < rows ? load_l2(static_cast<const uint4*>(chunk) + lane_id()) : uint4{0, 0, 0, 0};
}

// 16-bit types. Weights of a chunk: A of two instructions.
template <class T>
struct HalfProduct {
  using Element = T;
  using Word = uint32_t;
  using Fragment = uint4;
  static constexpr int kUnits = 8, kParts = 2, kHeldParts = 32, kAhead = 8;
  using Sums = MatrixSums;

  // weight(unit of the chunk, gate, own unit)
  template <class Weight>
  static FASTSEQ_DEVICE void pack(Vector<Word, 4> (&w)[kParts], const Weight& weight) {
    const int r = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
    for (int k = 0; k < 4 * kParts; ++k) {
      const int unit = 2 * q + k / 4, gate = k / 2 % 2 * 2, own = r + k % 2 * 8;
      w[k / 4].element[k % 4] = pack_pair<T>(weight(unit, gate, own), weight(unit, gate + 1, own));
    }
  }

  static FASTSEQ_DEVICE Fragment load(const T* chunk, int rows) { return load_rows(chunk, rows); }

  static FASTSEQ_DEVICE void multiply(Sums& sums, const Vector<Word, 4> (&w)[kParts], const Fragment& f) {
    multiply_16x8x16<T>(sums.d[0], w[0].element, {f.x, f.y});
    multiply_16x8x16<T>(sums.d[1], w[1].element, {f.z, f.w});
  }

  // As dgates go to the exchange.
  static FASTSEQ_DEVICE T exchanged(T x) { return x; }
};

// Floats by TF32. Weights likewise.
struct Tf32Product {
  using Element = float;
  using Word = uint32_t;
  using Fragment = uint4;
  static constexpr int kUnits = 4, kParts = 2, kHeldParts = 32, kAhead = 8;
  using Sums = MatrixSums;

  template <class Weight>
  static FASTSEQ_DEVICE void pack(Vector<Word, 4> (&w)[kParts], const Weight& weight) {
    const int r = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
    for (int k = 0; k < 4 * kParts; ++k) w[k / 4].element[k % 4] = to_tf32(weight(q, k / 2, r + k % 2 * 8));
  }

  static FASTSEQ_DEVICE Fragment load(const float* chunk, int rows) { return load_rows(chunk, rows); }

  static FASTSEQ_DEVICE void multiply(Sums& sums, const Vector<Word, 4> (&w)[kParts], const Fragment& f) {
    multiply_16x8x8_tf32(sums.d[0], w[0].element, {f.x, f.y});
    multiply_16x8x8_tf32(sums.d[1], w[1].element, {f.z, f.w});
  }

  static FASTSEQ_DEVICE float exchanged(float x) {
    const uint32_t bits = to_tf32(x);
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};

// Floats by FMA. Lane 8 n + u has own units 4 n ... 4 n + 3 and unit u of each chunk.
struct ExactProduct {
  using Element = float;
  using Word = float;
  static constexpr int kUnits = 8, kParts = 4, kHeldParts = 24, kAhead = 1;
  struct Fragment {
    float4 row[kTileRows];
  };
  using Sums = ExactSums;

  template <class Weight>
  static FASTSEQ_DEVICE void pack(Vector<Word, 4> (&w)[kParts], const Weight& weight) {
    const int n = lane_id() / 8, u = lane_id() % 8;
#pragma unroll
    for (int k = 0; k < 4 * kParts; ++k) w[k / 4].element[k % 4] = weight(u, k % 4, 4 * n + k / 4);
  }

  static FASTSEQ_DEVICE Fragment load(const float* chunk, int rows) {
    Fragment f{};
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (r < rows) f.row[r] = load_l2(reinterpret_cast<const float4*>(chunk) + r * kUnits + lane_id() % 8);
    }
    return f;
  }

  static FASTSEQ_DEVICE void multiply(Sums& sums, const Vector<Word, 4> (&w)[kParts], const Fragment& f) {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float (&gate)[4] = w[k].element;
        float& sum = sums.d[r][k];
        sum = f.row[r].w * gate[3] + (f.row[r].z * gate[2] + (f.row[r].y * gate[1] + (f.row[r].x * gate[0] + sum)));
      }
    }
  }

  static FASTSEQ_DEVICE float exchanged(float x) { return x; }
};

template <class Product, int R>
struct GridBackwardBlock {
  using T = typename Product::Element;
  using Weights = Vector<typename Product::Word, 4>[R][Product::kParts];

  static constexpr int kHeld = Product::kHeldParts / Product::kParts / R;  // chunks of a warp in registers
  static constexpr int kOwnUnits = kTileUnits * R;
  static constexpr int kStride = kOwnUnits + 4;  // of the rows of sums: stores of a warp fall on 32 banks
  static constexpr int kChunk = kTileRows * Product::kUnits * 4;  // numbers of a chunk in the exchange

  struct Cell {  // what the backward of a cell needs
    bool valid;  // the step is within the row's length
    float i, f, g, o, c_prev, c, dh, dc;
  };

  const LstmBackward& p;
  const GridBackwardPlan& plan;
  bool backwards;  // the direction is reversed
  int64_t direction, first_row, first_unit;
  int rows, tiles;          // of the group; rows: within the batch
  int first_chunk, chunks;  // of this warp
  unsigned* flags;          // (slices,): steps done, kFlagStride apart
  T* exchange;              // of this direction and group, buffer 0
  int64_t buffer;           // numbers between the two buffers
  uint4* weights;           // (warps, warp_chunks - kHeld, R * parts, 32)
  float* sums;              // (warps, pass_tiles, 8 rows, kStride)
  float2* carry;            // (group's rows, own units): dh kept for rows beyond their length, and dc
  int* lengths;             // (group's rows,)

  FASTSEQ_DEVICE GridBackwardBlock(const LstmBackward& p, const GridBackwardPlan& plan, unsigned char* shared)
      : p(p), plan(plan) {
    const int group = blockIdx.y, warp = threadIdx.x / 32;
    direction = blockIdx.z;
    backwards = p.shape.directions == 2 ? direction == 1 : p.shape.reverse;
    first_row = static_cast<int64_t>(group) * plan.group_tiles * kTileRows;
    first_unit = static_cast<int64_t>(blockIdx.x) * kOwnUnits;
    tiles = min(plan.group_tiles, plan.tiles - group * plan.group_tiles);
    rows = static_cast<int>(min(static_cast<int64_t>(tiles) * kTileRows, p.shape.batch - first_row));
    first_chunk = min(warp * plan.warp_chunks, plan.chunks);
    chunks = min(plan.warp_chunks, plan.chunks - first_chunk);

    const int64_t D = p.shape.directions, of_tile = static_cast<int64_t>(plan.chunks) * kChunk;
    unsigned* all_flags = static_cast<unsigned*>(p.workspace);
    flags = all_flags + (direction * plan.groups + group) * plan.slices * kFlagStride;
    buffer = D * plan.tiles * of_tile;
    exchange = reinterpret_cast<T*>(all_flags + D * plan.groups * plan.slices * kFlagStride) +
               (direction * plan.tiles + group * plan.group_tiles) * of_tile;

    weights = reinterpret_cast<uint4*>(shared);
    sums = reinterpret_cast<float*>(weights + plan.warps * max(0, plan.warp_chunks - kHeld) * R * Product::kParts * 32);
    carry = reinterpret_cast<float2*>(sums + plan.warps * plan.pass_tiles * kTileRows * kStride);
    lengths = reinterpret_cast<int*>(carry + plan.group_tiles * kTileRows * kOwnUnits);
  }

  // Of one chunk, zero past H.
  FASTSEQ_DEVICE void read_weights(Weights& w, int chunk) const {
    const int64_t H = p.shape.hidden;
    const T* weight_hh = static_cast<const T*>(p.weight_hh) + direction * 4 * H * H;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Product::pack(w[r], [&](int unit, int gate, int own) {
        const int64_t k = static_cast<int64_t>(chunk) * Product::kUnits + unit, n = first_unit + r * kTileUnits + own;
        return k < H && n < H ? to_float(weight_hh[(gate * H + k) * H + n]) : 0.0f;
      });
    }
  }

  // Where a lane's weights of this chunk of the warp lie in shared memory, 32 lanes apart.
  FASTSEQ_DEVICE Vector<typename Product::Word, 4>* shared_weights(int chunk) const {
    const int warp = threadIdx.x / 32, at = warp * (plan.warp_chunks - kHeld) + chunk - kHeld;
    return reinterpret_cast<Vector<typename Product::Word, 4>*>(weights + at * R * Product::kParts * 32 + lane_id());
  }

  FASTSEQ_DEVICE void prepare(Weights (&held)[kHeld]) const {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k < chunks) read_weights(held[k], first_chunk + k);
    }
    for (int k = kHeld; k < chunks; ++k) {
      Weights w;
      read_weights(w, first_chunk + k);
#pragma unroll
      for (int i = 0; i < R * Product::kParts; ++i)
        shared_weights(k)[i * 32] = w[i / Product::kParts][i % Product::kParts];
    }
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      const int64_t* all = p.shape.lengths;
      lengths[row] = static_cast<int>(all ? min(all[first_row + row], p.shape.steps) : p.shape.steps);
    }
    for (int item = threadIdx.x; item < tiles * kTileRows * kOwnUnits; item += blockDim.x) {
      const int row = item / kOwnUnits, unit = item % kOwnUnits;
      if (!exists(row, unit)) continue;
      const T* grad_h_n = static_cast<const T*>(p.grad_h_n);
      const T* grad_c_n = static_cast<const T*>(p.grad_c_n);
      const int64_t at = state_at(row, unit);
      carry[item] = {grad_h_n ? to_float(grad_h_n[at]) : 0.0f, grad_c_n ? to_float(grad_c_n[at]) : 0.0f};
    }
    __syncthreads();
  }

  FASTSEQ_DEVICE bool exists(int row, int unit) const { return row < rows && first_unit + unit < p.shape.hidden; }

  // In (D, B, H).
  FASTSEQ_DEVICE int64_t state_at(int row, int unit) const {
    return (direction * p.shape.batch + first_row + row) * p.shape.hidden + first_unit + unit;
  }

  // In (T, B, D, H), where the gradient's step `step` is.
  FASTSEQ_DEVICE int64_t step_at(int time, int row, int unit) const {
    const int64_t line = (time * p.shape.batch + first_row + row) * p.shape.directions + direction;
    return line * p.shape.hidden + first_unit + unit;
  }

  FASTSEQ_DEVICE int time_of(int step) const { return backwards ? step : static_cast<int>(p.shape.steps) - 1 - step; }

  FASTSEQ_DEVICE Cell read_cell(int row, int unit, int step) const {
    Cell x{};
    const int time = time_of(step);
    x.valid = step < p.shape.steps && exists(row, unit) && time < lengths[row];
    if (!x.valid) return x;
    const int64_t H = p.shape.hidden, at = step_at(time, row, unit);
    const int64_t gates_at = at * 4 - 3 * (first_unit + unit);
    const T* activations = static_cast<const T*>(p.activations) + gates_at;
    x.i = to_float(activations[0]);
    x.f = to_float(activations[H]);
    x.g = to_float(activations[2 * H]);
    x.o = to_float(activations[3 * H]);
    x.c = p.cell_states[at];
    const bool first = time == (backwards ? lengths[row] - 1 : 0);
    x.c_prev = first ? to_float(static_cast<const T*>(p.c0)[state_at(row, unit)])
                     : p.cell_states[step_at(time + (backwards ? 1 : -1), row, unit)];
    if (p.grad_output) x.dh = to_float(static_cast<const T*>(p.grad_output)[at]);
    if (p.grad_cell_states) x.dc = to_float(static_cast<const T*>(p.grad_cell_states)[at]);
    return x;
  }

  // For the blocks whose units this warp multiplies.
  FASTSEQ_DEVICE void wait(int step) const {
    const int first = first_chunk * Product::kUnits / kOwnUnits;
    const int last = ((first_chunk + chunks) * Product::kUnits - 1) / kOwnUnits;
    for (int slice = first + lane_id(); slice <= last; slice += 32) {
      wait_for_flag(flags + slice * kFlagStride, static_cast<unsigned>(step));
    }
    __syncwarp();
  }

  // `Count` chunks of this warp from `first`, all loads before the first product.
  template <int Count, class WeightsOf>
  FASTSEQ_DEVICE void multiply_chunks(
      typename Product::Sums (&d)[R], const T* from, int tile_rows, int first, const WeightsOf& weights_of) const {
    typename Product::Fragment fragment[Count];
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      if (first + k < chunks) fragment[k] = Product::load(from + static_cast<int64_t>(first + k) * kChunk, tile_rows);
    }
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      if (first + k >= chunks) break;
#pragma unroll
      for (int r = 0; r < R; ++r) Product::multiply(d[r], weights_of(first + k)[r], fragment[k]);
    }
  }

  // The warp's share of a tile's product, to shared memory.
  FASTSEQ_DEVICE void multiply_tile(const Weights (&held)[kHeld], const T* from, int tile_rows, float* to) const {
    constexpr int kAhead = Product::kAhead < kHeld ? Product::kAhead : kHeld;
    static_assert(kHeld % kAhead == 0);
    constexpr int kFewer = kAhead < R ? kAhead : R;  // loads at once, for the registers of weights on their way
    typename Product::Sums d[R]{};
#pragma unroll
    for (int k = 0; k < kHeld; k += kAhead) {
      multiply_chunks<kAhead>(d, from, tile_rows, k, [&](int chunk) -> const Weights& { return held[chunk]; });
    }
    for (int k = kHeld; k < chunks; k += kAhead / kFewer) {
      Weights w;
      multiply_chunks<kAhead / kFewer>(d, from, tile_rows, k, [&](int chunk) -> const Weights& {
#pragma unroll
        for (int i = 0; i < R * Product::kParts; ++i) {
          w[i / Product::kParts][i % Product::kParts] = shared_weights(chunk)[i * 32];
        }
        return w;
      });
    }
#pragma unroll
    for (int r = 0; r < R; ++r) d[r].store(to + r * kTileUnits, kStride);
  }

  // dgates (own units, all rows) x W_hh of the step before, for tiles first ... first + count - 1.
  FASTSEQ_DEVICE void multiply(const Weights (&held)[kHeld], int step, int first, int count) const {
    const int64_t of_tile = static_cast<int64_t>(plan.chunks) * kChunk;
    const T* from = exchange + ((step + 1) & 1) * buffer + static_cast<int64_t>(first_chunk) * kChunk;
    float* to = sums + threadIdx.x / 32 * plan.pass_tiles * kTileRows * kStride;
    for (int k = 0; k < count; ++k) {
      const int tile_rows = rows - (first + k) * kTileRows;
      multiply_tile(held, from + (first + k) * of_tile, tile_rows, to + k * kTileRows * kStride);
    }
  }

  // Of all warps, for row `row` of the pass.
  FASTSEQ_DEVICE float sum_of_warps(int row, int unit) const {
    float sum = 0;
#pragma unroll 4
    for (int warp = 0; warp < plan.warps; ++warp) {
      sum += sums[(warp * plan.pass_tiles * kTileRows + row) * kStride + unit];
    }
    return sum;
  }

  // dh: what comes from later steps. -> dgates, which also go to the exchange.
  FASTSEQ_DEVICE Vector<T, 4> step_cell(int row, int unit, int step, const Cell& x, float dh) const {
    float2& kept = carry[row * kOwnUnits + unit];
    CellGradient<float> grad{};
    dh += kept.x;
    if (x.valid) grad = lstm_cell_backward(x.i, x.f, x.g, x.o, x.c_prev, x.c, dh + x.dh, kept.y + x.dc);
    kept = x.valid ? float2{0.0f, grad.c} : float2{dh, kept.y};

    Vector<T, 4> dgates, sent;
    const float four[4] = {grad.i, grad.f, grad.g, grad.o};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      from_float(four[k], &dgates.element[k]);
      sent.element[k] = Product::exchanged(dgates.element[k]);
    }
    using Bits = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
    const int64_t at = first_unit + unit, chunk = row / kTileRows * plan.chunks + at / Product::kUnits;
    const int64_t within = row % kTileRows * Product::kUnits + at % Product::kUnits;
    Bits bits;
    memcpy(&bits, &sent, sizeof bits);
    store_l2(reinterpret_cast<Bits*>(exchange + (step & 1) * buffer + chunk * kChunk + within * 4), bits);
    return dgates;
  }

  FASTSEQ_DEVICE void write_dgates(int row, int unit, int step, const Vector<T, 4>& dgates) const {
    const int64_t H = p.shape.hidden;
    T* to = static_cast<T*>(p.grad_gates) + step_at(time_of(step), row, unit) * 4 - 3 * (first_unit + unit);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k * H] = dgates.element[k];
  }

  FASTSEQ_DEVICE void write_states(int row, int unit, float dh) const {
    const float2 kept = carry[row * kOwnUnits + unit];
    from_float(kept.x + dh, static_cast<T*>(p.grad_h0) + state_at(row, unit));
    from_float(kept.y, static_cast<T*>(p.grad_c0) + state_at(row, unit));
  }

  // Step `steps` is the product alone, which ends in grad_h0. What a thread's first cell needs is loaded before the
  // wait, and its dgates are written after the flag: both are off the path from block to block.
  FASTSEQ_DEVICE void run_step(const Weights (&held)[kHeld], int step) const {
    const int own_row = threadIdx.x / kOwnUnits, own_unit = threadIdx.x % kOwnUnits;
    const bool last = step == p.shape.steps;
    const Cell own = read_cell(own_row, own_unit, step);
    Vector<T, 4> own_dgates{};
    wait(step);
    for (int tile = 0; tile < tiles; tile += plan.pass_tiles) {
      const int count = min(plan.pass_tiles, tiles - tile);
      multiply(held, step, tile, count);
      __syncthreads();
      for (int item = threadIdx.x; item < count * kTileRows * kOwnUnits; item += blockDim.x) {
        const int row = tile * kTileRows + item / kOwnUnits, unit = item % kOwnUnits;
        if (!exists(row, unit)) continue;
        const float dh = sum_of_warps(item / kOwnUnits, unit);
        const bool is_own = row == own_row && unit == own_unit;
        if (last) {
          write_states(row, unit, dh);
        } else if (is_own) {
          own_dgates = step_cell(row, unit, step, own, dh);
        } else {
          write_dgates(row, unit, step, step_cell(row, unit, step, read_cell(row, unit, step), dh));
        }
      }
      __syncthreads();
    }
    if (last) return;
    if (threadIdx.x == 0) store_release(flags + blockIdx.x * kFlagStride, static_cast<unsigned>(step) + 1);
    const int own_rows = min(plan.pass_tiles, tiles) * kTileRows;  // of the first pass; of later ones all are written
    if (own_row < own_rows && exists(own_row, own_unit)) write_dgates(own_row, own_unit, step, own_dgates);
  }
};

template <class Product, int R>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    lstm_grid_backward_kernel(const LstmBackward p, const GridBackwardPlan plan) {
  FASTSEQ_DYNAMIC_SHARED(shared);
  const GridBackwardBlock<Product, R> block(p, plan, shared);
  typename GridBackwardBlock<Product, R>::Weights held[GridBackwardBlock<Product, R>::kHeld];
  block.prepare(held);
  for (int step = 0; step <= p.shape.steps; ++step) block.run_step(held, step);
}

}  // namespace fastseq::cuda
