// Forward recurrence of one LSTM layer in thread block clusters (sm_90 and newer): one cluster per tile of the batch
// and direction, one of its blocks per U hidden units. Blocks exchange h through distributed shared memory, with one
// mbarrier phase a step and no cluster barrier in the loop. Drawings and proof: docs/kernels/cuda-cluster.md.
//
// W is the A operand (gate rows), h the B operand (units, sequences). Two warps share 8 units; each multiplies every
// other step of K, then sends the partner its sums of column 2 q + 1, through shared memory, and finishes column 2 q.
// Warp `half` reads sequence 4 half + q into column 2 q, the partner's into column 2 q + 1: nothing is selected.
//
//     lane 4 r + q        column 2 q    column 2 q + 1
//     tile 0, row r       i of unit r   i of unit r
//     tile 0, row r + 8   f of unit r   f of unit r
//     tile 1, row r       g of unit r   g of unit r
//     tile 1, row r + 8   o of unit r   o of unit r
//
// A piece is 8 bytes: P = 4 (16-bit) or 2 (TF32) adjacent units of one sequence. In a step of K (4 P units) lane 4 r +
// q multiplies units q P .. q P + P - 1: one piece is its B fragment, the pieces of two gates are an A fragment. Two
// buffers of h; step s reads buffer s & 1:
//
//     h[step of K][tile of 8 sequences][q][sequence ^ (q & 2)]: pieces. A lane reads piece q of sequence 4 ((r & 1)
//     ^ half) + r / 2, a warp 256 bytes; the XOR spreads each half warp over all banks. A warp sends 4 sequences of a
//     q: 32 adjacent bytes.
//
// Only sequences that exist are sent and expected; the columns of the others stay zero in both buffers. Invariant: a
// block sends h of step s + 1 after a __syncthreads that follows its reads of h of step s, and it sends in every step:
// the warps of sequence 0 do, padded units too (weights, gates and states are 0, so h = 0). A buffer is overwritten
// only after all blocks of the cluster have sent, so after all have read.
#pragma once

#include "cuda/lstm/cluster_forward_send.cuh"

namespace fastseq::cuda::cluster {

// Tiling of a launch.
struct ForwardTile {
  int blocks;  // of a cluster
  int units;   // of a block, a multiple of 8
  int steps;   // steps of K of a warp; weights that exceed its registers are in shared memory
  int tiles;   // of the batch
  int rows;    // sequences of a tile: at most 8 if N = 1, else 8 N; the last tile may have fewer
};

// Shared memory: byte offset of each part, total bytes. registers: steps of K whose weights are in registers.
struct ForwardMemory {
  size_t h, sums, weights, bytes;
  __host__ __device__ ForwardMemory(const ForwardTile& tile, int registers, int row_tiles) {
    const size_t warps = tile.units / 4;
    h = 128;
    sums = h + 2 * (2 * static_cast<size_t>(tile.steps) * row_tiles * 256);
    weights = sums + warps * row_tiles * 512;
    bytes = weights + warps * (tile.steps - registers) * 1024;
  }
};

// Index of a piece of a tile of 8 sequences, within a step of K.
FASTSEQ_DEVICE int state_place(int q, int sequence) { return q * 8 + (sequence ^ (q & 2)); }

// Index of the piece that lane 4 r + q of a product of warp `half` reads. Even columns are those that it finishes.
FASTSEQ_DEVICE int read_place(int r, int q, int half) { return state_place(q, 4 * ((r & 1) ^ half) + r / 2); }

// Unit and sequences of a thread.
struct ForwardPlace {
  int direction, unit, row;  // unit in the layer; first sequence (the others follow 8 apart; B or more: none)
  int warp, half, r, q;      // half: of K, and of the columns
  bool backwards;
};

FASTSEQ_DEVICE ForwardPlace forward_place(const LstmShape& s, const ForwardTile& tile) {
  ForwardPlace at;
  const int cluster = static_cast<int>(cluster_index()), lane = lane_id();
  at.warp = threadIdx.x / 32;
  at.half = at.warp >= tile.units / 8;
  at.r = lane / 4;
  at.q = lane % 4;
  at.direction = cluster / tile.tiles;
  at.unit = static_cast<int>(cluster_rank()) * tile.units + (at.warp - at.half * (tile.units / 8)) * 8 + at.r;
  const int place = 4 * at.half + at.q, first = cluster % tile.tiles * tile.rows;
  at.row = place < tile.rows ? first + place : static_cast<int>(s.batch);
  at.backwards = s.directions == 2 ? at.direction == 1 : s.reverse;
  return at;
}

// Loads columns [column, column + P) of a row (columns,); zero past its end. A null row is zero.
template <class T>
FASTSEQ_DEVICE uint2 load_piece(const T* row, int64_t column, int64_t columns) {
  float x[kPiece<T>] = {};
  if (row && columns % kPiece<T> == 0) {
    if (column < columns) load_vector(x, row + column);
  } else if (row) {
#pragma unroll
    for (int k = 0; k < kPiece<T>; ++k) x[k] = column + k < columns ? to_float(row[column + k]) : 0.0f;
  }
  return piece_of<T>(x);
}

// Loads the A fragments of one step of K: [tile][word]. weight: (4H, H).
template <class T>
FASTSEQ_DEVICE void load_weights(
    uint32_t (&a)[2][4], const T* weight, int64_t hidden, const ForwardPlace& at, int64_t step) {
  const int64_t column = step * kStep<T> + at.q * kPiece<T>;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    const T* row = at.unit < hidden ? weight + (gate * hidden + at.unit) * hidden : nullptr;
    const uint2 piece = load_piece(row, column, hidden);
    a[gate / 2][gate % 2] = piece.x;
    a[gate / 2][gate % 2 + 2] = piece.y;
  }
}

// Loads this warp's half of K: R steps into registers, the rest into shared memory. A lane reads only words that it
// wrote.
template <class T, int R>
FASTSEQ_DEVICE void load_all_weights(uint32_t (&weights)[R][2][4],
                                     uint4* more_weights,
                                     const T* weight,
                                     int64_t hidden,
                                     const ForwardPlace& at,
                                     int steps) {
#pragma unroll
  for (int s = 0; s < R; ++s) load_weights(weights[s], weight, hidden, at, 2 * s + at.half);
  for (int s = R; s < steps; ++s) {
    uint32_t a[2][4];
    load_weights(a, weight, hidden, at, 2 * s + at.half);
    more_weights[(s - R) * 64 + lane_id()] = uint4{a[0][0], a[0][1], a[0][2], a[0][3]};
    more_weights[(s - R) * 64 + 32 + lane_id()] = uint4{a[1][0], a[1][1], a[1][2], a[1][3]};
  }
}

// Initialises both buffers of h: h0 (B, H) and zero. Pieces that no warp sends stay zero in both.
template <class T, int N>
FASTSEQ_DEVICE void fill_states(
    uint2* h, const T* h0, const LstmShape& s, const ForwardTile& tile, const RowRange& rows) {
  const int pieces = 2 * tile.steps * N * 32;
  for (int k = threadIdx.x; k < pieces; k += blockDim.x) {
    const int q = k % 32 / 8, sequence = k % 8, place = k / 32 * 32 + state_place(q, sequence);
    const int64_t row = rows.first + k / 32 % N * 8 + sequence;
    const int64_t unit = k / (32 * N) * kStep<T> + q * kPiece<T>;
    h[place] = load_piece(row < rows.end ? h0 + row * s.hidden : nullptr, unit, s.hidden);
    h[pieces + place] = uint2{0, 0};
  }
}

// sums[accumulator][tile of sequences][tile of gates] += W h over this warp's half of K. h: this lane's first piece in
// the buffer of the step.
template <class T, int R, int N, int Accumulators>
FASTSEQ_DEVICE void multiply_states(float (&sums)[Accumulators][N][2][4],
                                    const uint32_t (&weights)[R][2][4],
                                    const uint4* more_weights,
                                    const uint2* h,
                                    int steps) {
#pragma unroll
  for (int s = 0; s < R; ++s) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint2 piece = h[(2 * s * N + n) * 32];
      const uint32_t b[2] = {piece.x, piece.y};
      multiply<T>(sums[s % Accumulators][n][0], weights[s][0], b);
      multiply<T>(sums[s % Accumulators][n][1], weights[s][1], b);
    }
  }
  for (int s = R; s < steps; ++s) {
    const uint4 first = more_weights[(s - R) * 64 + lane_id()], second = more_weights[(s - R) * 64 + 32 + lane_id()];
    const uint32_t a[2][4] = {{first.x, first.y, first.z, first.w}, {second.x, second.y, second.z, second.w}};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint2 piece = h[(2 * s * N + n) * 32];
      const uint32_t b[2] = {piece.x, piece.y};
      multiply<T>(sums[0][n][0], a[0], b);
      multiply<T>(sums[0][n][1], a[1], b);
    }
  }
}

// Splits this warp's sums (gates i f g o): `kept` gets column 2 q, which it finishes, `own` column 2 q + 1.
template <int N, int Accumulators>
FASTSEQ_DEVICE void share_sums(float (&kept)[N][4], const float (&sums)[Accumulators][N][2][4], float4* own) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float sent[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      float first = sums[0][n][gate / 2][gate % 2 * 2], second = sums[0][n][gate / 2][gate % 2 * 2 + 1];
#pragma unroll
      for (int k = 1; k < Accumulators; ++k) {
        first += sums[k][n][gate / 2][gate % 2 * 2];
        second += sums[k][n][gate / 2][gate % 2 * 2 + 1];
      }
      kept[n][gate] = first;
      sent[gate] = second;
    }
    own[n * 32] = float4{sent[0], sent[1], sent[2], sent[3]};
  }
}

// Completes the pre-activations: `gates`, the input product, + (kept + the partner's sums): the same bits in both
// columns. rows: from the first sequence to the end of the batch. Nothing is read for sequences that do not exist: a
// warp without any does not send, so its partner may already write the next step's sums.
template <class T, int N>
FASTSEQ_DEVICE void add_sums(float (&kept)[N][4], const T (&gates)[N][4], const float4* partner, int rows) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float4 other{0, 0, 0, 0};
    if (rows > 8 * n) other = partner[n * 32];
    kept[n][0] = to_float(gates[n][0]) + (kept[n][0] + other.x);
    kept[n][1] = to_float(gates[n][1]) + (kept[n][1] + other.y);
    kept[n][2] = to_float(gates[n][2]) + (kept[n][2] + other.z);
    kept[n][3] = to_float(gates[n][3]) + (kept[n][3] + other.w);
  }
}

// This thread's place in tensors (T, B, D, H), advanced step by step: 64-bit products would lengthen every step.
struct ForwardCursor {
  int64_t index;  // of the current step, first sequence
  int64_t step;   // to the next step in time
  int64_t tile;   // to the sequence of the next tile

  FASTSEQ_DEVICE ForwardCursor(const LstmShape& s, const ForwardPlace& at, int64_t t) {
    step = s.batch * s.directions * s.hidden;
    index = t * step + (static_cast<int64_t>(at.row) * s.directions + at.direction) * s.hidden + at.unit;
    if (at.backwards) step = -step;
    tile = 8 * s.directions * s.hidden;
  }
};

// Index in (T, B, D, 4H) of gate i that belongs to `index` in (T, B, D, H).
FASTSEQ_DEVICE int64_t gate_index(int64_t index, const ForwardPlace& at) { return 4 * index - 3 * at.unit; }

FASTSEQ_DEVICE bool inside(const LstmShape& s, const ForwardPlace& at, int n) {
  return at.row + 8 * n < s.batch && at.unit < s.hidden;
}

// Loads the input product of a step, not converted yet; zero outside the tensor. index: of the first sequence.
template <class T, int N>
FASTSEQ_DEVICE void fetch_gates(
    T (&gates)[N][4], const LstmForwardParams& p, const ForwardPlace& at, int64_t index, int64_t tile) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const T* from = static_cast<const T*>(p.gates) + gate_index(index + n * tile, at);
    const bool exists = inside(p.shape, at, n);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      from_float(0.0f, &gates[n][gate]);
      if (exists) gates[n][gate] = from[gate * p.shape.hidden];
    }
  }
}

// Takes loaded gates: as float, or as they are if G is a 16-bit type. Loads of two steps are then in flight, of which
// only the older is waited for: the compiler would merge a mere copy with the next load.
template <class G, class T, int N>
FASTSEQ_DEVICE void take_gates(G (&gates)[N][4], const T (&loaded)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      if constexpr (std::is_same_v<G, T> && sizeof(T) == 2)
        gates[n][gate] = loaded[n][gate];
      else
        gates[n][gate] = to_float(opaque(loaded[n][gate]));
    }
  }
}

// Index of the piece that this lane sends, in a buffer of h, for the first tile of sequences.
template <class T, int N>
FASTSEQ_DEVICE int sent_piece(const ForwardPlace& at) {
  const int step = at.unit / kStep<T>, q = at.unit % kStep<T> / kPiece<T>;
  return step * N * 32 + state_place(q, 4 * at.half + at.q);
}

// Replaces gates by activations. `alive`: the step is within the sequence's length; else h and c stay unchanged.
template <class T>
FASTSEQ_DEVICE void update_unit(float (&gates)[4], float& c, uint32_t& h, bool alive) {
  float c_next = c;
  const uint32_t h_next = word_of<T>(lstm_cell_for<T>(gates[0], gates[1], gates[2], gates[3], c_next));
  c = alive ? c_next : c;
  h = alive ? h_next : h;
}

// Stores the results of one step that are kept for the backward. index: in (T, B, D, H).
template <class T>
FASTSEQ_DEVICE void store_record(
    const LstmForwardParams& p, const ForwardPlace& at, int64_t index, const float (&activations)[4], float c) {
  if (p.cell_states) p.cell_states[index] = c;
  if (!p.activations) return;
  T* to = static_cast<T*>(p.activations) + gate_index(index, at);
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) from_float(activations[gate], to + gate * p.shape.hidden);
}

// Loads this thread's h0, c0 (D, B, H) and lengths into registers.
template <class T, int N>
FASTSEQ_DEVICE void load_states(
    uint32_t (&h)[N], float (&c)[N], int (&lengths)[N], const LstmForwardParams& p, const ForwardPlace& at) {
  const LstmShape& s = p.shape;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t row = at.row + 8 * n, slot = (at.direction * s.batch + row) * s.hidden + at.unit;
    h[n] = 0;
    c[n] = 0;
    lengths[n] = static_cast<int>(row < s.batch && s.lengths ? s.lengths[row] : s.steps);
    if (row >= s.batch || at.unit >= s.hidden) continue;
    h[n] = word_of<T>(to_float(static_cast<const T*>(p.h0)[slot]));
    c[n] = load_state<T>(p.c0, slot, s.wide_states);
  }
}

// Zeroes the output from step `begin` on, past the longest sequence of the tile.
template <class T, int N>
FASTSEQ_DEVICE void clear_output(const LstmForwardParams& p, const ForwardPlace& at, int begin) {
  const LstmShape& s = p.shape;
  if (at.unit >= s.hidden) return;
  for (int64_t t = begin; t < s.steps; ++t) {
    for (int n = 0; n < N; ++n) {
      const int64_t row = at.row + 8 * n, slot = (t * s.batch + row) * s.directions + at.direction;
      if (row < s.batch) from_float(0.0f, static_cast<T*>(p.output) + slot * s.hidden + at.unit);
    }
  }
}

template <class T, int N>
FASTSEQ_DEVICE void store_states(const uint32_t (&h)[N],
                                 const float (&c)[N],
                                 const LstmForwardParams& p,
                                 const ForwardPlace& at) {
  const LstmShape& s = p.shape;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t row = at.row + 8 * n, slot = (at.direction * s.batch + row) * s.hidden + at.unit;
    if (row >= s.batch || at.unit >= s.hidden) continue;
    static_cast<T*>(p.h_n)[slot] = number_of<T>(h[n]);
    store_state<T>(c[n], p.c_n, slot, s.wide_states);
  }
}

// R: steps of K in registers. N: tiles of 8 sequences.
template <class T, int Threads, int R, int N>
__global__ void __launch_bounds__(Threads, 1) lstm_cluster_forward_kernel(LstmForwardParams p, ForwardTile tile) {
  if constexpr (!kHasClusters) return refuse_cluster();
  FASTSEQ_DYNAMIC_SHARED(memory);
  const ForwardMemory parts(tile, R, N);
  uint64_t* arrived = reinterpret_cast<uint64_t*>(memory);  // by buffer
  uint2* h_pieces = reinterpret_cast<uint2*>(memory + parts.h);
  const ForwardPlace at = forward_place(p.shape, tile);
  const RowRange rows = rows_of(p.shape, tile.tiles, tile.rows);
  uint4* more_weights = reinterpret_cast<uint4*>(memory + parts.weights) + at.warp * (tile.steps - R) * 64;
  const int64_t H = p.shape.hidden;
  const int last = longest_of<N>(p.shape, rows) - 1;
  const int buffer = 2 * tile.steps * N * 32;  // pieces
  const unsigned bytes = tile.blocks * tile.units * (rows.end - rows.first) * sizeof(T);

  uint32_t weights[R][2][4];
  load_all_weights(weights, more_weights, static_cast<const T*>(p.weight_hh) + at.direction * 4 * H * H, H, at,
                   tile.steps);
  const T* h0 = static_cast<const T*>(p.h0) + at.direction * p.shape.batch * H;
  fill_states<T, N>(h_pieces, h0, p.shape, tile, rows);
  uint32_t h[N];
  float c[N];
  int lengths[N];
  load_states<T>(h, c, lengths, p, at);
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b) {
      mbarrier_init(arrived + b, 1);
      mbarrier_arrive_expect(arrived + b, bytes);  // steps 1 and 2
    }
  }
  cluster_barrier();

  // This lane's pieces in a buffer of h: the first that it reads, the first that it sends.
  int read = at.half * N * 32 + read_place(at.r, at.q, at.half), sent = sent_piece<T, N>(at);
  // Bytes from `memory` to this lane's sums and to its partner's.
  int own = static_cast<int>(parts.sums) + (at.warp * N * 32 + lane_id()) * 16;
  int partner = own + (at.half ? -1 : 1) * (tile.units / 8) * N * 512;
  int blocks = at.row < p.shape.batch ? blocks_of_lane<T>(tile.blocks, at.r) : 0;
  if constexpr (Threads <= 256) {  // else no registers are left
    read = opaque(read);
    sent = opaque(sent);
    own = opaque(own);
  }
  if constexpr (Threads <= 256 && N < 4) {
    blocks = opaque(blocks);
    partner = opaque(partner);
  }
  constexpr bool kSkips = Threads <= 256 && N == 1;  // a warp without sequences only multiplies
  const bool finishes = !kSkips || __any_sync(kAllLanes, at.row < p.shape.batch);
  ForwardCursor cursor(p.shape, at, at.backwards ? last : 0);
  constexpr bool kAhead = Threads <= 256 && N == 1;  // else no registers are left
  std::conditional_t<kAhead, float, T> gates[N][4];  // of this step
  T later[N][4];                                     // of the next step, if kAhead
  if (last >= 0) {
    fetch_gates(later, p, at, cursor.index, cursor.tile);
    take_gates(gates, later);
  }
  if (kAhead && last >= 1) fetch_gates(later, p, at, cursor.index + cursor.step, cursor.tile);
  int t = at.backwards ? last : 0;
  for (int s = 0; s <= last; ++s) {
    bool alive[N];
#pragma unroll
    for (int n = 0; n < N; ++n) alive[n] = t < lengths[n];
    // Addresses are computed before the wait.
    int from = read + s % 2 * buffer, to = sent + (s + 1) % 2 * buffer;
    if constexpr (kAhead) {
      from = opaque(from);
      to = opaque(to);
    }
    if (s) mbarrier_wait(arrived + s % 2, (s - 1) >> 1 & 1, p.shape.spin_limit);
    constexpr int kAccumulators = N == 1 ? 2 : 1;  // 2: halve the dependency chain
    float sums[kAccumulators][N][2][4] = {}, pre[N][4];
    multiply_states<T>(sums, weights, more_weights, h_pieces + from, tile.steps);
    if (s && threadIdx.x == 0) mbarrier_arrive_expect(arrived + s % 2, bytes);  // step s + 2
    share_sums(pre, sums, reinterpret_cast<float4*>(memory + own));
    __syncthreads();
    if (finishes) {
      add_sums(pre, gates, reinterpret_cast<const float4*>(memory + partner),
               kSkips ? 1 : static_cast<int>(p.shape.batch) - at.row);
#pragma unroll
      for (int n = 0; n < N; ++n) update_unit<T>(pre[n], c[n], h[n], alive[n]);
      if (s < last) {
        uint64_t pieces[N];
#pragma unroll
        for (int n = 0; n < N; ++n) pieces[n] = gather_piece<T>(h[n], at.r);
        send_states<T>(pieces, h_pieces + to, arrived + (s + 1) % 2, blocks, at.r,
                       static_cast<int>(p.shape.batch) - at.row);
      }
    }
    // The output's stores lie between the send and the loads of gates, lest the compiler load before it sends.
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint32_t out = alive[n] ? h[n] : 0;
      if (inside(p.shape, at, n)) static_cast<T*>(p.output)[cursor.index + n * cursor.tile] = number_of<T>(out);
    }
    constexpr bool kEarly = N < 4;  // else no registers are left
    if constexpr (kAhead) {
      take_gates(gates, later);
      // Past the end this step's gates are loaded again: with a condition the compiler would copy, and so wait.
      fetch_gates(later, p, at, cursor.index + (s + 1 < last ? 2 * cursor.step : 0), cursor.tile);
    }
    if (!kAhead && kEarly && s < last) fetch_gates(gates, p, at, cursor.index + cursor.step, cursor.tile);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (!inside(p.shape, at, n) || !alive[n]) continue;
      store_record<T>(p, at, cursor.index + n * cursor.tile, pre[n], c[n]);
    }
    cursor.index += cursor.step;
    t += at.backwards ? -1 : 1;
    if (!kEarly && s < last) fetch_gates(gates, p, at, cursor.index, cursor.tile);
  }
  store_states<T>(h, c, p, at);
  clear_output<T, N>(p, at, last + 1);
  cluster_barrier();
}

}  // namespace fastseq::cuda::cluster
