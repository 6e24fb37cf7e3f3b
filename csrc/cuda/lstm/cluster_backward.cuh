// Backward recurrence of one LSTM layer in thread block clusters (sm_90 and newer): one cluster per tile of the batch
// and direction, one of its blocks per U <= 32 hidden units. Drawings and proof: docs/kernels/cuda-cluster.md.
//
// A block multiplies the gate gradients of its U units by their 4 U rows of W_hh: a partial dh of ALL units. It sends
// each part, in float, to the block of that unit, which adds the parts in the order of ranks. One exchange a step, no
// cluster barrier in the loop.
//
// Cell: lane u of warp w computes unit u of the block, sequences w, w + 8, .... Product: A is W_hh transposed (rows:
// hidden units j), K = (unit of the block, gate). A piece is 8 bytes of K of one sequence: all gates of a unit (16-bit)
// or half of them (TF32).
//
//     gradients[buffer][step of K][tile of 8 sequences][q][sequence ^ (step % 8) ^ 2 (q & 2)]: pieces. Lane 4 r + q of
//     the product reads column r, piece q. The XOR spreads each half warp, of product and cell, over all banks.
//
//     parts[buffer][sending block][pair of sequences][unit]: two floats. Lane 4 r + q sends units r and r + 8 of its
//     tile of 16, sequences 2 q and 2 q + 1: 64 adjacent bytes for each q.
//
// Both have two buffers. Invariant: a block sends the parts of step s + 1 after a __syncthreads that follows its reads
// of the parts of step s; it needs the parts of all blocks before it continues. So no buffer is overwritten while it is
// read. Only pairs of sequences that exist are sent and expected; columns of the others are zero.
#pragma once

#include "cuda/lstm/cluster_pieces.cuh"

namespace fastseq::cuda::cluster {

constexpr int kUnits = 32;     // of a block, at most
constexpr int kThreads = 256;  // of every block

// Steps of K: 4 gates of 32 units.
template <class T>
constexpr int kGateSteps = 4 * kUnits / kStep<T>;

// Tiling of a launch.
struct BackwardTile {
  int blocks;  // of a cluster
  int units;   // of a block, a multiple of 8
  int tiles;   // of the batch
  int rows;    // sequences of a tile: at most 8 if N = 1, else 8 N; the last tile may have fewer
  int eighth;  // 2^16 / (units / 8), rounded up: the block of 8 units by a product instead of a division

  __host__ __device__ int block_of(int unit) const { return unit / 8 * eighth >> 16; }
};

// Index of a piece of a tile of 8 sequences, within a step of K. step: of K.
FASTSEQ_DEVICE int gradient_place(int step, int q, int sequence) { return q * 8 + (sequence ^ step % 8 ^ 2 * (q & 2)); }

// Shared memory: byte offset of each part, total bytes.
struct BackwardMemory {
  size_t gradients, parts, bytes;
  __host__ __device__ BackwardMemory(const BackwardTile& tile, int steps, int row_tiles) {
    gradients = 128;
    parts = gradients + 2 * static_cast<size_t>(steps) * row_tiles * 256;
    const size_t all_parts = 2 * static_cast<size_t>(tile.blocks) * tile.units * row_tiles * 32;
    const size_t scratch = static_cast<size_t>(kThreads) * steps * 16;  // of load_columns, before `parts` are used
    bytes = parts + (all_parts > scratch ? all_parts : scratch);
  }
};

// Unit and sequences of a thread.
struct BackwardPlace {
  int direction, unit, row;  // unit in the layer (H: none); first sequence (the others follow 8 apart; B or more: none)
  int local, warp, r, q;     // local: unit in the block
  bool backwards;
};

FASTSEQ_DEVICE BackwardPlace backward_place(const LstmShape& s, const BackwardTile& tile) {
  BackwardPlace at;
  const int cluster = static_cast<int>(cluster_index());
  at.local = lane_id();
  at.warp = threadIdx.x / 32;
  at.r = lane_id() / 4;
  at.q = lane_id() % 4;
  at.direction = cluster / tile.tiles;
  at.unit = static_cast<int>(cluster_rank()) * tile.units + at.local;
  if (at.local >= tile.units || at.unit >= s.hidden) at.unit = static_cast<int>(s.hidden);
  at.row = at.warp < tile.rows ? cluster % tile.tiles * tile.rows + at.warp : static_cast<int>(s.batch);
  at.backwards = s.directions == 2 ? at.direction == 1 : s.reverse;
  return at;
}

// Loads two words of A: row `unit`, K from piece * P on. weight: (4H, H).
template <class T>
FASTSEQ_DEVICE uint2
load_column_piece(const T* weight, int64_t hidden, const BackwardTile& tile, int64_t unit, int piece) {
  float x[kPiece<T>];
#pragma unroll
  for (int k = 0; k < kPiece<T>; ++k) {
    const int local = (piece * kPiece<T> + k) / 4, gate = (piece * kPiece<T> + k) % 4;
    const int64_t source = static_cast<int64_t>(cluster_rank()) * tile.units + local;
    const bool inside = local < tile.units && source < hidden && unit < hidden;
    x[k] = inside ? to_float(weight[(gate * hidden + source) * hidden + unit]) : 0.0f;
  }
  return piece_of<T>(x);
}

// Loads M tiles of 16 hidden units of the layer, all of K, through `scratch` (warp, step, lane). A lane reads only
// words that it wrote. The first inner loop is not unrolled: the addresses of all its loads would exceed the registers.
template <class T, int M>
FASTSEQ_DEVICE void load_columns(uint32_t (&a)[M][kGateSteps<T>][4],
                                 uint4* scratch,
                                 const T* weight,
                                 int64_t hidden,
                                 const BackwardTile& tile,
                                 const BackwardPlace& at) {
  uint4* words = scratch + at.warp * kGateSteps<T> * 32 + lane_id();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int64_t unit = (at.warp * M + m) * 16 + at.r;
#pragma unroll 1
    for (int s = 0; s < kGateSteps<T>; ++s) {
      const uint2 upper = load_column_piece(weight, hidden, tile, unit, 4 * s + at.q);
      const uint2 lower = load_column_piece(weight, hidden, tile, unit + 8, 4 * s + at.q);
      words[s * 32] = uint4{upper.x, lower.x, upper.y, lower.y};
    }
#pragma unroll
    for (int s = 0; s < kGateSteps<T>; ++s) {
      const uint4 fragment = words[s * 32];
      a[m][s][0] = fragment.x;
      a[m][s][1] = fragment.y;
      a[m][s][2] = fragment.z;
      a[m][s][3] = fragment.w;
    }
  }
}

// Inputs of one step of one sequence and unit, not converted yet.
template <class T>
struct BackwardInputs {
  T gates[4], grad_output, grad_cell;
  float c, c_before;
};

// This thread's place in tensors (T, B, D, H), advanced step by step. index: of the current step, first sequence. step:
// to the next step of the backward, which is the one before in the sequence. tile: to the sequence of the next tile.
struct BackwardCursor {
  int64_t index, step, tile;

  FASTSEQ_DEVICE BackwardCursor(const LstmShape& s, const BackwardPlace& at, int64_t t) {
    step = s.batch * s.directions * s.hidden;
    index = t * step + (static_cast<int64_t>(at.row) * s.directions + at.direction) * s.hidden + at.unit;
    if (!at.backwards) step = -step;
    tile = 8 * s.directions * s.hidden;
  }
};

// Loads the inputs of step t; zero if t is outside the sequence. index: in (T, B, D, H). step: of the cursor. c0: of
// the sequence and unit.
template <class T>
FASTSEQ_DEVICE void fetch_inputs(BackwardInputs<T>& in,
                                 const LstmBackwardParams& p,
                                 const BackwardPlace& at,
                                 int row,
                                 int length,
                                 int t,
                                 int64_t index,
                                 int64_t step,
                                 float c0) {
  const LstmShape& s = p.shape;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) from_float(0.0f, &in.gates[gate]);
  from_float(0.0f, &in.grad_output);
  from_float(0.0f, &in.grad_cell);
  in.c = 0;
  in.c_before = c0;
  if (row >= s.batch || at.unit >= s.hidden || t < 0 || t >= length) return;
  const T* gates = static_cast<const T*>(p.activations) + 4 * index - 3 * at.unit;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) in.gates[gate] = gates[gate * s.hidden];
  if (p.grad_output) in.grad_output = static_cast<const T*>(p.grad_output)[index];
  if (p.grad_cell_states) in.grad_cell = static_cast<const T*>(p.grad_cell_states)[index];
  in.c = p.cell_states[index];
  const int before = at.backwards ? t + 1 : t - 1;
  if (before >= 0 && before < length) in.c_before = p.cell_states[index + step];
}

// Adds the parts of dh from all blocks, at most 4 M, in the order of ranks. All loads are issued before the first sum.
template <int M>
FASTSEQ_DEVICE float add_parts(const float2* parts, const BackwardTile& tile, const BackwardPlace& at, int n, int N) {
  const int local = min(at.local, tile.units - 1), stride = N * 8 * tile.units;
  const float* numbers =
      reinterpret_cast<const float*>(parts + (n * 4 + at.warp / 2) * tile.units + local) + at.warp % 2;
  float part[4 * M], sum = 0;
#pragma unroll
  for (int from = 0; from < 4 * M; ++from) {
    part[from] = 0;
    if (M > 1 || from < tile.blocks) part[from] = numbers[from * stride];
  }
#pragma unroll
  for (int from = 0; from < 4 * M; ++from) sum += part[from];
  return at.local < tile.units ? sum : 0.0f;
}

// Writes the gate gradients of a unit, rounded to T, to shared memory for the product.
template <class T>
FASTSEQ_DEVICE void stage_gradients(uint2* gradients, const float (&x)[4], const BackwardPlace& at, int n, int N) {
  constexpr int kPieces = 4 / kPiece<T>;  // of a unit
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const int piece = at.local * kPieces + k, step = piece / 4;
    float part[kPiece<T>];
#pragma unroll
    for (int i = 0; i < kPiece<T>; ++i) part[i] = x[k * kPiece<T> + i];
    gradients[(step * N + n) * 32 + gradient_place(step, piece % 4, at.warp)] = piece_of<T>(part);
  }
}

// Computes one step of one sequence and unit: x, its gate gradients. dh, dc: on entry dL/dh_t and dL/dc_t; on return
// dL/dh_{t-1} without the product, and dL/dc_{t-1}. `alive`: t is within the length. The inputs are converted here and
// not before: see opaque().
template <class T>
FASTSEQ_DEVICE void step_back(float (&x)[4], const BackwardInputs<T>& in, bool alive, float& dh, float& dc) {
  const auto grad = lstm_cell_backward_for<T>(to_float(opaque(in.gates[0])), to_float(opaque(in.gates[1])),
                                              to_float(opaque(in.gates[2])), to_float(opaque(in.gates[3])),
                                              opaque(in.c_before), opaque(in.c), dh + to_float(opaque(in.grad_output)),
                                              dc + to_float(opaque(in.grad_cell)));
  x[0] = alive ? grad.i : 0.0f;
  x[1] = alive ? grad.f : 0.0f;
  x[2] = alive ? grad.g : 0.0f;
  x[3] = alive ? grad.o : 0.0f;
  dc = alive ? grad.c : dc;
  dh = alive ? 0.0f : dh;
}

// index: in (T, B, D, H)
template <class T>
FASTSEQ_DEVICE void store_gate_gradients(const LstmBackwardParams& p,
                                         const BackwardPlace& at,
                                         int64_t index,
                                         const float (&x)[4]) {
  T* to = static_cast<T*>(p.grad_gates) + 4 * index - 3 * at.unit;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) from_float(x[gate], to + gate * p.shape.hidden);
}

// Sends the parts of dh of the first Sent tiles of sequences. slots: of this block. blocks: of the cluster; 0: none.
template <int M, int Sent, int N>
FASTSEQ_DEVICE void send_sums(const float (&sums)[M][N][4],
                              const float2* slots,
                              const uint64_t* arrived,
                              const BackwardTile& tile,
                              const BackwardPlace& at,
                              int blocks) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int unit = (at.warp * M + m) * 16 + 8 * half + at.r, rank = tile.block_of(unit);
      if (rank >= blocks) continue;
      const uint64_t address = cluster_address(slots + (at.q - rank) * tile.units + unit, rank);
      const uint64_t mbarrier = cluster_address(arrived, rank);
#pragma unroll
      for (int n = 0; n < Sent; ++n) {
        const float2 pair{sums[m][n][2 * half], sums[m][n][2 * half + 1]};
        uint64_t bits;
        memcpy(&bits, &pair, sizeof bits);
        store_async8(address + n * 4 * tile.units * sizeof(float2), mbarrier, bits);
      }
    }
  }
}

// Computes this block's parts of dh of all units and sends each to `parts` in the block of the unit. pairs: of
// sequences that exist.
template <class T, int M, int N>
FASTSEQ_DEVICE void send_parts(const uint32_t (&weights)[M][kGateSteps<T>][4],
                               const uint2* gradients,
                               const float2* parts,
                               const uint64_t* arrived,
                               const BackwardTile& tile,
                               const BackwardPlace& at,
                               int pairs) {
  float sums[M][N][4] = {};
#pragma unroll
  for (int s = 0; s < kGateSteps<T>; ++s) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint2 piece = gradients[(s * N + n) * 32 + gradient_place(s, at.q, at.r)];
      const uint32_t b[2] = {piece.x, piece.y};
#pragma unroll
      for (int m = 0; m < M; ++m) multiply<T>(sums[m][n], weights[m][s], b);
    }
  }
  const float2* slots = parts + static_cast<int>(cluster_rank()) * N * 4 * tile.units;
  const int blocks = at.q < pairs ? tile.blocks : 0;
  if (N == 1 || 4 * (N - 1) + at.q < pairs) return send_sums<M, N>(sums, slots, arrived, tile, at, blocks);
  if constexpr (N > 1) {  // conditions around the stores of full tiles would lengthen their way
    static_assert(N == 2, "here only sequences of the first tile exist");
#pragma unroll 1
    for (int n = 0; 4 * n + at.q < pairs; ++n) {
      send_sums<M, 1>(sums, slots + n * 4 * tile.units, arrived, tile, at, blocks);
    }
  }
}

// Loads this thread's unit and sequences. from: (D, B, H) of T, or null for zero.
template <class T, int N>
FASTSEQ_DEVICE void load_initial(float (&x)[N], const void* from, const LstmShape& s, const BackwardPlace& at) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t row = at.row + 8 * n;
    const bool inside = from && row < s.batch && at.unit < s.hidden;
    const int64_t slot = (at.direction * s.batch + row) * s.hidden + at.unit;
    x[n] = inside ? load_state<T>(from, slot, s.wide_states) : 0.0f;
  }
}

template <class T, int N>
FASTSEQ_DEVICE void store_gradients(void* to, const float (&x)[N], const LstmShape& s, const BackwardPlace& at) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t row = at.row + 8 * n;
    if (row >= s.batch || at.unit >= s.hidden) continue;
    store_state<T>(x[n], to, (at.direction * s.batch + row) * s.hidden + at.unit, s.wide_states);
  }
}

// Zeroes grad_gates from step `begin` on, past the longest sequence of the tile.
template <class T, int N>
FASTSEQ_DEVICE void clear_grad_gates(const LstmBackwardParams& p, const BackwardPlace& at, int begin) {
  const LstmShape& s = p.shape;
  if (at.unit >= s.hidden) return;
  for (int64_t t = begin; t < s.steps; ++t) {
    for (int n = 0; n < N; ++n) {
      const int64_t row = at.row + 8 * n, slot = (t * s.batch + row) * s.directions + at.direction;
      for (int gate = 0; gate < 4 && row < s.batch; ++gate) {
        from_float(0.0f, static_cast<T*>(p.grad_gates) + (slot * 4 + gate) * s.hidden + at.unit);
      }
    }
  }
}

// M: tiles of 16 units a warp. N: tiles of 8 sequences.
template <class T, int M, int N>
__global__ void __launch_bounds__(kThreads, 1) lstm_cluster_backward_kernel(LstmBackwardParams p, BackwardTile tile) {
  if constexpr (!kHasClusters) return refuse_cluster();
  FASTSEQ_DYNAMIC_SHARED(memory);
  const BackwardMemory offsets(tile, kGateSteps<T>, N);
  uint64_t* arrived = reinterpret_cast<uint64_t*>(memory);  // by buffer
  uint2* gradients = reinterpret_cast<uint2*>(memory + offsets.gradients);
  float2* parts = reinterpret_cast<float2*>(memory + offsets.parts);
  const BackwardPlace at = backward_place(p.shape, tile);
  const RowRange rows = rows_of(p.shape, tile.tiles, tile.rows);
  const int64_t H = p.shape.hidden;
  const int steps = longest_of<N>(p.shape, rows), pairs = (rows.end - rows.first + 1) / 2;
  const int gradients_buffer = kGateSteps<T> * N * 32, parts_buffer = tile.blocks * N * 4 * tile.units;
  const unsigned bytes = tile.blocks * tile.units * pairs * sizeof(float2);

  uint32_t weights[M][kGateSteps<T>][4];
  load_columns<T, M>(weights, reinterpret_cast<uint4*>(parts),
                     static_cast<const T*>(p.weight_hh) + at.direction * 4 * H * H, H, tile, at);
  float dh[N], dc[N], c0[N];
  load_initial<T>(dh, p.grad_h_n, p.shape, at);
  load_initial<T>(dc, p.grad_c_n, p.shape, at);
  load_initial<T>(c0, p.c0, p.shape, at);
  int lengths[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t row = at.row + 8 * n;
    int64_t length = row < p.shape.batch ? p.shape.steps : 0;
    if (row < p.shape.batch && p.shape.lengths) length = min(length, p.shape.lengths[row]);
    lengths[n] = static_cast<int>(length);
  }
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b) {
      mbarrier_init(arrived + b, 1);
      mbarrier_arrive_expect(arrived + b, bytes);  // steps 1 and 2
    }
  }
  cluster_barrier();

  BackwardCursor cursor(p.shape, at, at.backwards ? 0 : steps - 1);
  BackwardInputs<T> in[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t index = cursor.index + n * cursor.tile;
    fetch_inputs(in[n], p, at, at.row + 8 * n, lengths[n], at.backwards ? 0 : steps - 1, index, cursor.step, c0[n]);
  }
  int t = at.backwards ? 0 : steps - 1;
  for (int s = 0; s <= steps; ++s, t += at.backwards ? 1 : -1) {  // round `steps` only completes dh
    if (s) {
      mbarrier_wait(arrived + s % 2, (s - 1) >> 1 & 1, p.shape.spin_limit);
      if (threadIdx.x == 0) mbarrier_arrive_expect(arrived + s % 2, bytes);  // step s + 2
#pragma unroll
      for (int n = 0; n < N; ++n) dh[n] += add_parts<M>(parts + s % 2 * parts_buffer, tile, at, n, N);
    }
    if (s == steps) break;
    float x[N][4];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      step_back<T>(x[n], in[n], t < lengths[n], dh[n], dc[n]);
      stage_gradients<T>(gradients + s % 2 * gradients_buffer, x[n], at, n, N);
    }
    __syncthreads();
    send_parts<T, M, N>(weights, gradients + s % 2 * gradients_buffer, parts + (s + 1) % 2 * parts_buffer,
                        arrived + (s + 1) % 2, tile, at, pairs);
    // Stores and loads of global memory follow the send, off the way between the blocks.
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (at.row + 8 * n >= p.shape.batch || at.unit >= H) continue;
      store_gate_gradients<T>(p, at, cursor.index + n * cursor.tile, x[n]);
    }
    cursor.index += cursor.step;
    if (s + 1 == steps) continue;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t index = cursor.index + n * cursor.tile;
      fetch_inputs(in[n], p, at, at.row + 8 * n, lengths[n], at.backwards ? t + 1 : t - 1, index, cursor.step, c0[n]);
    }
  }
  store_gradients<T>(p.grad_h0, dh, p.shape, at);
  store_gradients<T>(p.grad_c0, dc, p.shape, at);
  clear_grad_gates<T, N>(p, at, steps);
  cluster_barrier();
}

}  // namespace fastseq::cuda::cluster
