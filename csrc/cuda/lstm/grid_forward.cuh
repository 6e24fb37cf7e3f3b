// The recurrence of one LSTM layer, whole sequence, on a grid that spans the device.
//
// A team of blocks computes some rows of the batch in one direction; rows never meet, so teams never talk. A block
// owns groups of 8 hidden units, their 4 gates and the whole K = H of their weights. Its 8 warps share out K in chunks
// of 64 bytes (32 units of 16 bits, 16 floats), and every weight stays where it is for the whole sequence: a lane's
// slice (a group, a chunk: 64 bytes) in registers, the slices that do not fit there in shared memory.
//
// Fragments. Lane 4 r + q holds, of a chunk, vector q (16 bytes: kVector units): of weights the rows i, f, g, o of
// unit r of the group; of h, row r of a tile of 8 rows. The matrix instruction wants other columns of K in a lane, but
// any order of K will do that is the same in both operands: step s of a chunk multiplies words 2 s and 2 s + 1.
//   tile 0: rows r and r + 8 are gates i and f of unit r          word   0    1    2    3   of a lane
//   tile 1: rows r and r + 8 are gates g and o of unit r          step  |-- 0 --||-- 1 --|
// So a lane's sums are i, f, g, o of unit r for two rows of the batch. The warps add theirs up through shared memory.
//
// Exchange of h. Two buffers of (tile, chunk, row, 64 bytes): a lane's vector is one load, a warp's load one line of
// 512 bytes. There are no flags and no fences: a word says itself that it is new. |h| <= 1, so bit 30 (the upper
// number's highest bit of exponent) is never set; in a word of TF32 the lowest bit is free. That bit is the stamp of
// step t, (t + 1) / 2 mod 2: it alternates from one use of a buffer to the next, and zeroed memory is older than the
// first. A lane loads its own vectors until all four words have the stamp. Against flags that saves a fence and a round
// trip a step.
//
// Why a word that has the stamp is h of step t, and not of t - 4: the same thread reads a word in every use of the
// buffer, and once it has seen h of t - 2 there it can see nothing older (coherence of one word; loads are relaxed,
// not weak).
//
// Why nobody overwrites h of step t that is still to be read: a block stores h of t + 2 (same buffer, same rows) only
// after it has all of h of t + 1 of these rows. Each of its words was stored by a block whose warps had met at a
// barrier after their last look at h of t, a look whose value decides that they come to the barrier. A store is not
// made before what it depends on is there, so the chain from look to overwriting store needs no fence. A block that
// computes groups in several passes reads h of t in each; so no pass may be empty, or its looks would be in no chain.
//
// NaN has no such free bit: a NaN in the upper half of a word of two is sent as a NaN in the lower half, which makes
// the same sums NaN.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/lstm/params.h"

namespace fastseq::cuda::grid_forward {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kUnits = 8;                      // of a group
constexpr int kTile = 8;                       // rows
constexpr int kPair = 2 * kTile;               // rows that are computed at once
constexpr int kChunkWords = 16;                // 32-bit words of a row of a chunk
constexpr size_t kSliceBytes = 64 * kThreads;  // of all lanes of a block

// How the layer lies on the device; found by the launcher.
struct Plan {
  int blocks;           // of a team
  int groups;           // of a block; the last block may have fewer
  int splits;           // of the batch: teams of a direction
  int tiles;            // of a team; the last team may have fewer
  int chunks;           // of K
  int warp_chunks;      // of a warp; the last ones may have fewer, or none
  int warps;            // that have any
  int shared_slices;    // of a lane, in shared memory
  size_t buffer_words;  // (tiles, chunks, 8 rows, 16)
  size_t shared_memory;

  FASTSEQ_INLINE int pairs() const { return (tiles + 1) / 2; }
  FASTSEQ_INLINE size_t team_words() const { return kChunkWords + 3 * buffer_words; }  // a counter, h0, two of h
};

FASTSEQ_DEVICE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FASTSEQ_DEVICE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// 64 bytes of weights, as A operands: a[2 tile + step].
struct Slice {
  uint32_t a[4][4];

  FASTSEQ_DEVICE uint32_t word(int gate, int k) const { return a[at(gate, k) / 4][at(gate, k) % 4]; }
  // Where word k of a gate (i, f, g, o) is, of 16.
  static FASTSEQ_DEVICE int at(int gate, int k) { return (2 * (gate / 2) + k / 2) * 4 + 2 * (k % 2) + gate % 2; }
};

// A lane's sums of one group and one tile on tensor cores: d[tile][2 k + e] is gate 2 tile + k, row 2 q + e.
struct TensorSum {
  float d[2][4] = {};

  template <class Multiply>
  FASTSEQ_DEVICE void add(const Slice& w, const uint32_t (&h)[4], const Multiply& multiply) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t b[2] = {h[2 * s], h[2 * s + 1]};
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) multiply(d[tile], w.a[2 * tile + s], b);
    }
  }

  // gates i, f, g, o of rows 2 q and 2 q + 1
  FASTSEQ_DEVICE void finish(float (&gates)[2][4]) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) gates[e][gate] = d[gate / 2][2 * (gate % 2) + e];
    }
  }
};

// Of the buffers of h: 0 is h0, then odd and even steps.
FASTSEQ_DEVICE int buffer_of(int step) { return step == 0 ? 0 : 2 - step % 2; }

// Arithmetic of a product: what a word holds, how h travels in it, how slices and vectors are multiplied.
template <class Number>
struct Tensor16 {
  using T = Number;
  using Sum = TensorSum;
  static constexpr int kVector = 8, kWord = 2;  // numbers of 16 and of 4 bytes
  static constexpr int kStage = 4;              // chunks whose loads are on their way at once
  static constexpr int kKeptSlices = 8;         // in registers
  static constexpr uint32_t kStamp = 1u << 30;

  static FASTSEQ_DEVICE uint32_t operand(uint32_t word) { return word; }
  // h of units u and u + 1, stamp 0
  static FASTSEQ_DEVICE uint32_t encode(float h, float next) {
    const bool bad = next != next;
    return pack_pair<T>(bad ? next : h, bad ? 0.0f : next);
  }
  static FASTSEQ_DEVICE uint32_t decode(uint32_t word) { return word; }
  static FASTSEQ_DEVICE void multiply(Sum& sum, const Slice& w, const uint32_t (&h)[4]) {
    sum.add(w, h, [](auto& d, const auto& a, const auto& b) { multiply_16x8x16<T>(d, a, b); });
  }
};

struct TensorFloat {
  using T = float;
  using Sum = TensorSum;
  static constexpr int kVector = 4, kWord = 1;
  static constexpr int kStage = 4;
  static constexpr int kKeptSlices = 8;
  static constexpr uint32_t kStamp = 1;

  static FASTSEQ_DEVICE uint32_t operand(uint32_t word) { return to_tf32(as_float(word)); }
  static FASTSEQ_DEVICE uint32_t encode(float h, float) { return to_tf32(h) & ~kStamp; }
  static FASTSEQ_DEVICE uint32_t decode(uint32_t word) { return word; }
  static FASTSEQ_DEVICE void multiply(Sum& sum, const Slice& w, const uint32_t (&h)[4]) {
    sum.add(w, h, [](auto& d, const auto& a, const auto& b) { multiply_16x8x8_tf32(d, a, b); });
  }
};

// A lane's sums without tensor cores: of unit r, over its own quarter of K, for all 8 rows of the tile.
struct PlainSum {
  float d[8][4] = {};

  // The 4 lanes of a unit add up: each sends half of its rows away, then half of what is left.
  FASTSEQ_DEVICE void finish(float (&gates)[2][4]) const {
    const bool upper = lane_id() & 2, odd = lane_id() & 1;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      float half[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float keep = upper ? d[n + 4][gate] : d[n][gate], send = upper ? d[n][gate] : d[n + 4][gate];
        half[n] = keep + __shfl_xor_sync(kAllLanes, send, 2);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float keep = odd ? half[e + 2] : half[e], send = odd ? half[e] : half[e + 2];
        gates[e][gate] = keep + __shfl_xor_sync(kAllLanes, send, 1);
      }
    }
  }
};

struct PlainFloat {
  using T = float;
  using Sum = PlainSum;
  static constexpr int kVector = 4, kWord = 1;
  static constexpr int kStage = 2;
  static constexpr int kKeptSlices = 2;
  static constexpr uint32_t kStamp = 1u << 30;
  static constexpr uint32_t kNaN = kStamp - 1;  // 1.9999999, sent for NaN

  static FASTSEQ_DEVICE uint32_t operand(uint32_t word) { return word; }
  static FASTSEQ_DEVICE uint32_t encode(float h, float) { return h == h ? as_bits(h) : kNaN; }
  static FASTSEQ_DEVICE uint32_t decode(uint32_t word) { return word == kNaN ? 0x7fffffffu : word; }
  static FASTSEQ_DEVICE void multiply(Sum& sum, const Slice& w, const uint32_t (&h)[4]) {
    const int q = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < kTile; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float x = __shfl_sync(kAllLanes, as_float(h[k]), 4 * n + q);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) sum.d[n][gate] += as_float(w.word(gate, k)) * x;
      }
    }
  }
};

// kVector numbers of a row, which begin at `unit`; zero from `hidden` on.
template <class M>
FASTSEQ_DEVICE void load_operand(uint32_t (&out)[4], const typename M::T* row, int unit, int hidden) {
  using T = typename M::T;
  Vector<T, M::kVector> v;
  if (hidden % M::kVector == 0 && unit < hidden) {
    v = *reinterpret_cast<const Vector<T, M::kVector>*>(row + unit);
  } else {
#pragma unroll
    for (int k = 0; k < M::kVector; ++k) {
      from_float(0.0f, &v.element[k]);
      if (unit + k < hidden) v.element[k] = row[unit + k];
    }
  }
  memcpy(out, &v, sizeof out);
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = M::operand(out[k]);
}

// What a block works on: some rows, of its team, and some groups, its own.
struct Team {
  int direction;
  int first_row, rows;  // of the batch
  int group, groups;    // first of this block, and how many
};

template <int G>
FASTSEQ_DEVICE int passes_of(const Team& team) {  // none is empty: see the exchange of h
  return (team.groups + G - 1) / G;
}

FASTSEQ_DEVICE Team team_of(const LstmShape& s, const Plan& plan) {
  const int team = blockIdx.x / plan.blocks, member = blockIdx.x % plan.blocks;
  const int first = team % plan.splits * plan.tiles * kTile;
  const int all = (static_cast<int>(s.hidden) + kUnits - 1) / kUnits, group = member * plan.groups;
  Team t;
  t.direction = team / plan.splits;
  t.first_row = first;
  t.rows = min(plan.tiles * kTile, static_cast<int>(s.batch) - first);
  t.group = group;
  t.groups = min(plan.groups, all - group);
  return t;
}

// Shared memory of a block.
template <int G>
struct Shared {
  uint32_t* weights;  // (shared_slices, 4 operands, threads, 4): a thread reads what it wrote
  float* partial;     // (2, warps, G groups, 16 rows, 8 units, 4 gates), units permuted
  float* cells;       // (rows, 8 * groups) cell states; each is one thread's own
  int* lengths;       // (rows)
  int* longest;       // (pairs) length of each pair of tiles

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
  // Of a unit of a group for a row of a pair; the permutation lets 8 lanes meet 8 different banks, in rows or in units.
  static FASTSEQ_DEVICE size_t at(int warp, int group, int row, int unit) {
    return ((static_cast<size_t>(warp * G + group) * kPair + row) * kUnits + (unit ^ (row & 6))) * 4;
  }
};

// The slices of this lane: the first chunks of the first pass in registers, all others in shared memory.
template <class M, int G>
struct Weights {
  using T = typename M::T;
  static constexpr int kKept = M::kKeptSlices / G;  // chunks
  static_assert(kKept % M::kStage == 0);
  Slice kept[kKept][G] = {};

  // weight: (4H, H) of the direction. One loop that is not unrolled: what goes to registers goes through `partial`.
  FASTSEQ_DEVICE void load(const T* weight, int hidden, const Team& team, const Plan& plan, const Shared<G>& shared) {
    const int first = static_cast<int>(threadIdx.x / 32) * plan.warp_chunks;
#pragma unroll 1
    for (int k = 0; k < passes_of<G>(team) * plan.warp_chunks * G; ++k) {
      const int group = k % G, chunk = k / G % plan.warp_chunks, pass = k / G / plan.warp_chunks;
      const bool keep = pass == 0 && chunk < kKept;
      uint32_t* to = keep ? reinterpret_cast<uint32_t*>(shared.partial) : slice(plan, shared, pass, chunk, group);
      put_slice(to, weight, hidden, team, pass * G + group, first + chunk);
#pragma unroll
      for (int c = 0; c < kKept; ++c) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
          if (keep && c == chunk && g == group) get_slice(kept[c][g], to);
        }
      }
    }
  }

  static FASTSEQ_DEVICE uint32_t* slice(const Plan& plan, const Shared<G>& shared, int pass, int chunk, int group) {
    const int index = (pass * plan.warp_chunks + chunk - min(kKept, plan.warp_chunks)) * G + group;
    return shared.weights + static_cast<size_t>(index) * (kSliceBytes / 4);
  }

  // slice: (4, threads, 4) words
  static FASTSEQ_DEVICE void get_slice(Slice& w, const uint32_t* slice) {
#pragma unroll
    for (int k = 0; k < 4; ++k) load_wide(w.a[k], slice + (k * kThreads + thread_now()) * 4);
  }

  // group: of the block
  static FASTSEQ_DEVICE void put_slice(
      uint32_t* slice, const T* weight, int hidden, const Team& team, int group, int chunk) {
    const int unit = (team.group + group) * kUnits + lane_id() / 4;
    const bool exists = group < team.groups && unit < hidden;
    const int column = exists ? (4 * chunk + lane_id() % 4) * M::kVector : hidden;
#pragma unroll 1
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t row = exists ? static_cast<int64_t>(gate) * hidden + unit : 0;
      uint32_t words[4];
      load_operand<M>(words, weight + row * hidden, column, hidden);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int at = Slice::at(gate, k);
        slice[(at / 4 * kThreads + threadIdx.x) * 4 + at % 4] = words[k];
      }
    }
  }
};

// h of one step, as a lane reads it: vectors of its own chunks and rows.
template <class M>
struct Hidden {
  const uint32_t* buffer;  // (tiles, chunks, 8 rows, 16 words)
  int step;
  int rows;    // of the team
  int hidden;  // H

  // Of the chunks in which this lane has a vector: the warp's, up to the end of K.
  static FASTSEQ_DEVICE int end(const Plan& plan, int hidden) {
    constexpr int kChunk = 4 * M::kVector;
    const int thread = thread_now(), before = thread % 4 * M::kVector;
    return min((thread / 32 + 1) * plan.warp_chunks, (hidden - before + kChunk - 1) / kChunk);
  }

  static FASTSEQ_DEVICE uint32_t stamp_of(int step) { return (step + 1) / 2 % 2 ? M::kStamp : 0; }

  // One look at M::kStage chunks of both tiles; whether all there is has the stamp.
  FASTSEQ_DEVICE bool look(uint32_t (&h)[M::kStage][2][4], const Plan& plan, int pair, int first) const {
    const int last = end(plan, hidden);
    const uint32_t stamp = stamp_of(step);
    uint32_t wrong = 0;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int lane = thread_now() % 32;
      const bool exists = pair * kPair + tile * kTile + lane / 4 < rows;
      const int64_t line = (static_cast<int64_t>(2 * pair + tile) * plan.chunks + first) * kTile;
      const uint32_t* from = buffer + line * kChunkWords + 4 * lane;
#pragma unroll
      for (int c = 0; c < M::kStage; ++c) {
        uint32_t (&words)[4] = h[c][tile];
        words[0] = words[1] = words[2] = words[3] = stamp;
        load_relaxed(words, from + c * kTile * kChunkWords, exists && first + c < last);
      }
    }
#pragma unroll
    for (int c = 0; c < M::kStage; ++c) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int k = 0; k < 4; ++k) wrong |= h[c][tile][k] ^= stamp;
      }
    }
    return step == 0 || !(wrong & M::kStamp);  // h0 bears no stamp
  }

  FASTSEQ_DEVICE void read(uint32_t (&h)[M::kStage][2][4], const Plan& plan, int pair, int first) const {
    Patience patience;
    while (!look(h, plan, pair, first)) patience.look();
    __syncwarp();
    if (step == 0) return;
#pragma unroll
    for (int c = 0; c < M::kStage; ++c) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int k = 0; k < 4; ++k) h[c][tile][k] = M::decode(h[c][tile][k]);
      }
    }
  }
};

// h0 of this block's units, to be read without stamps. (B, H) of the direction from the team's first row on.
template <class M>
FASTSEQ_DEVICE void send_initial(
    uint32_t* buffer, const typename M::T* h0, int hidden, const Team& team, const Plan& plan) {
  constexpr int kVectors = kUnits / M::kVector;  // of a group
  const int vectors = team.groups * kVectors;
#pragma unroll 1
  for (int k = threadIdx.x; k < team.rows * vectors; k += kThreads) {
    const int row = k / vectors, vector = team.group * kVectors + k % vectors;
    if (vector >= 4 * plan.chunks) continue;
    uint32_t words[4];
    load_operand<M>(words, h0 + static_cast<int64_t>(row) * hidden, vector * M::kVector, hidden);
    const int64_t line = (static_cast<int64_t>(row / kTile) * plan.chunks + vector / 4) * kTile + row % kTile;
    store_wide(buffer + line * kChunkWords + vector % 4 * 4, words);
  }
}

template <int G, class Sum>
FASTSEQ_DEVICE void put_sums(float* partial, const Sum& sum, int warp, int group, int tile) {
  const int lane = thread_now() % 32;
  float gates[2][4];
  sum.finish(gates);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    store_wide(partial + Shared<G>::at(warp, group, tile * kTile + 2 * (lane % 4) + e, lane / 4), gates[e]);
  }
}

// Kept slices times the first tiles of a stage. `count`: chunks from `first` on that are the warp's.
template <int kTiles, class M, int G>
FASTSEQ_DEVICE void multiply_kept(typename M::Sum (&sums)[G][2],
                                  const Weights<M, G>& weights,
                                  const uint32_t (&h)[M::kStage][2][4],
                                  int first,
                                  int count) {
#pragma unroll
  for (int c = 0; c < M::kStage; ++c) {
    if (c >= count) continue;
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) M::multiply(sums[g][tile], weights.kept[first + c][g], h[c][tile]);
    }
  }
}

// This warp's part of W h of one pass and one pair of tiles, to `partial`.
template <class M, int G>
FASTSEQ_DEVICE void multiply_pair(float* partial,
                                  const Weights<M, G>& weights,
                                  const Shared<G>& shared,
                                  const Plan& plan,
                                  const Hidden<M>& hidden,
                                  int pair,
                                  int pass) {
  constexpr int kKept = Weights<M, G>::kKept;
  const int warp = thread_now() / 32, first = warp * plan.warp_chunks;
  const int count = min(plan.warp_chunks, plan.chunks - first);
  if (count <= 0) return;
  const bool second = pair * kPair + kTile < hidden.rows;
  typename M::Sum sums[G][2];
  uint32_t h[M::kStage][2][4];
#pragma unroll
  for (int stage = 0; stage < kKept; stage += M::kStage) {
    if (pass || stage >= count) continue;
    hidden.read(h, plan, pair, first + stage);
    if (second) {
      multiply_kept<2>(sums, weights, h, stage, count - stage);
    } else {
      multiply_kept<1>(sums, weights, h, stage, count - stage);
    }
  }
  for (int stage = pass ? 0 : kKept; stage < count; stage += M::kStage) {
    hidden.read(h, plan, pair, first + stage);
#pragma unroll
    for (int c = 0; c < M::kStage; ++c) {
      if (stage + c >= count) continue;
#pragma unroll
      for (int g = 0; g < G; ++g) {
        Slice w;
        Weights<M, G>::get_slice(w, Weights<M, G>::slice(plan, shared, pass, stage + c, g));
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) M::multiply(sums[g][tile], w, h[c][tile]);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
    put_sums<G>(partial, sums[g][0], warp, g, 0);
    if (second) put_sums<G>(partial, sums[g][1], warp, g, 1);
  }
}

// The cell of one thread: one unit of one row. Threads beyond a pass's units and a pair's rows have none. Cheap to make
// anew: `gates` (i, f, g, o) are all that a thread keeps of it while it waits for h.
template <class M, int G>
struct Cell {
  using T = typename M::T;
  int row, unit;  // of the team, of the direction
  int pass_row, pass_unit;
  int length;  // of the row
  bool owned, exists, active;
  float* c;

  FASTSEQ_DEVICE Cell(
      const Team& team, const Plan& plan, const Shared<G>& shared, int hidden, int step, int pair, int pass) {
    const int thread = thread_now();
    pass_row = thread / (G * kUnits);
    pass_unit = thread % (G * kUnits);
    const int own_unit = pass * G * kUnits + pass_unit;
    row = pair * kPair + pass_row;
    unit = team.group * kUnits + own_unit;
    owned = pass_row < kPair && row < team.rows && own_unit < team.groups * kUnits;
    exists = owned && unit < hidden;
    length = exists ? shared.lengths[row] : 0;
    active = step < length;
    c = shared.cells + row * plan.groups * kUnits + own_unit;
  }

  // (T, B, D) of this step; past the length: of as many zeros
  FASTSEQ_DEVICE int64_t place(const LstmShape& s, const Team& team, int step) const {
    const bool backwards = s.directions == 2 ? team.direction : s.reverse;
    const int64_t t = active && backwards ? length - 1 - step : step;
    return (t * s.batch + team.first_row + row) * s.directions + team.direction;
  }

  // What needs no other block.
  FASTSEQ_DEVICE void load(float (&gates)[4], const LstmForward& p, const Team& team, int step) const {
    if (!active) return;
    const T* from = static_cast<const T*>(p.gates) + place(p.shape, team, step) * 4 * p.shape.hidden + unit;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) gates[gate] = to_float(from[gate * p.shape.hidden]);
  }

  FASTSEQ_DEVICE void add(float (&gates)[4], const float* partial, int warps) const {
    if (!active) return;
#pragma unroll 4
    for (int warp = 0; warp < warps; ++warp) {
      float part[4];
      load_wide(part, partial + Shared<G>::at(warp, pass_unit / kUnits, pass_row, pass_unit % kUnits));
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) gates[gate] += part[gate];
    }
  }

  // Gates become activations. Returns h; 0 past the length.
  FASTSEQ_DEVICE float update(float (&gates)[4]) const {
    if (!active) return 0.0f;
    return lstm_cell_for<T>(gates[0], gates[1], gates[2], gates[3], *c);
  }

  // buffer: of the next step. Called by whole warps: neighbours make a word.
  FASTSEQ_DEVICE void send(uint32_t* buffer, uint32_t stamp, const Plan& plan, float h) const {
    constexpr int kChunk = 4 * M::kVector;
    const float next = M::kWord == 2 ? __shfl_down_sync(kAllLanes, h, 1) : 0.0f;
    if (!owned || unit % M::kWord) return;
    const int64_t line = (static_cast<int64_t>(row / kTile) * plan.chunks + unit / kChunk) * kTile + row % kTile;
    store_relaxed(buffer + line * kChunkWords + unit % kChunk / M::kWord, M::encode(h, next) | stamp);
  }

  FASTSEQ_DEVICE void store(
      const LstmForward& p, const Team& team, int step, const float (&activations)[4], float h) const {
    if (!exists) return;
    const LstmShape& s = p.shape;
    const int64_t at = place(s, team, step);
    from_float(h, static_cast<T*>(p.output) + at * s.hidden + unit);
    if (!active) return;
    if (p.cell_states) p.cell_states[at * s.hidden + unit] = *c;
    if (p.activations) {
      T* to = static_cast<T*>(p.activations) + at * 4 * s.hidden + unit;
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) from_float(activations[gate], to + gate * s.hidden);
    }
    if (step + 1 < length) return;
    const int64_t last = (team.direction * s.batch + team.first_row + row) * s.hidden + unit;
    from_float(h, static_cast<T*>(p.h_n) + last);
    from_float(*c, static_cast<T*>(p.c_n) + last);
  }
};

// Lengths and cell states to shared memory. Rows of no steps are done.
template <class M, int G>
FASTSEQ_DEVICE void begin(const LstmForward& p, const Team& team, const Plan& plan, const Shared<G>& shared) {
  using T = typename M::T;
  const LstmShape& s = p.shape;
  for (int row = threadIdx.x; row < team.rows; row += kThreads) {
    const int64_t length = s.lengths ? s.lengths[team.first_row + row] : s.steps;
    shared.lengths[row] = static_cast<int>(min(max(length, static_cast<int64_t>(0)), s.steps));
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < plan.pairs(); pair += kThreads) {
    int longest = 0;
    for (int row = pair * kPair; row < min(team.rows, (pair + 1) * kPair); ++row) {
      longest = max(longest, shared.lengths[row]);
    }
    shared.longest[pair] = longest;
  }
  const int units = team.groups * kUnits;
#pragma unroll 1
  for (int k = threadIdx.x; k < team.rows * units; k += kThreads) {
    const int row = k / units, unit = k % units, column = team.group * kUnits + unit;
    if (column >= s.hidden) continue;
    const int64_t index = (team.direction * s.batch + team.first_row + row) * s.hidden + column;
    const float c = to_float(static_cast<const T*>(p.c0)[index]);
    shared.cells[row * plan.groups * kUnits + unit] = c;
    if (shared.lengths[row]) continue;
    static_cast<T*>(p.h_n)[index] = static_cast<const T*>(p.h0)[index];
    static_cast<T*>(p.c_n)[index] = static_cast<const T*>(p.c0)[index];
  }
  __syncthreads();
}

// A cooperative grid: (directions * splits * blocks) blocks. Workspace: (teams, Plan::team_words()).
template <class M, int G>
__global__ void __launch_bounds__(kThreads, 1) lstm_grid_forward_kernel(const LstmForward p, const Plan plan) {
  FASTSEQ_DYNAMIC_SHARED(memory);
  using T = typename M::T;
  const LstmShape& s = p.shape;
  const int hidden_size = static_cast<int>(s.hidden);
  const Team team = team_of(s, plan);
  const Shared<G> shared(memory, plan);
  begin<M, G>(p, team, plan, shared);

  uint32_t* counter = static_cast<uint32_t*>(p.workspace) + blockIdx.x / plan.blocks * plan.team_words();
  uint32_t* buffers = counter + kChunkWords;
  const int64_t first = (team.direction * s.batch + team.first_row) * s.hidden;
  send_initial<M>(buffers, static_cast<const T*>(p.h0) + first, hidden_size, team, plan);
  Weights<M, G> weights;
  weights.load(static_cast<const T*>(p.weight_hh) + team.direction * 4 * s.hidden * s.hidden, hidden_size, team, plan,
               shared);
  grid_barrier(counter, 1, plan.blocks);

  Hidden<M> h{.buffer = buffers, .step = 0, .rows = team.rows, .hidden = hidden_size};
  unsigned round = 0;
  for (int step = 0; step < s.steps; ++step) {
    h.step = step;
    h.buffer = buffers + buffer_of(step) * plan.buffer_words;
    for (int pair = 0; pair * kPair < team.rows; ++pair) {
      const int longest = shared.longest[pair];
      for (int pass = 0; pass < passes_of<G>(team); ++pass) {
        float gates[4] = {};
        Cell<M, G>(team, plan, shared, hidden_size, step, pair, pass).load(gates, p, team, step);
        // Two, by turns: who is through the barrier reads one while others begin to write the other.
        float* partial = shared.partial + round % 2 * kWarps * Shared<G>::kPartial;
        if (step < longest) {
          multiply_pair(partial, weights, shared, plan, h, pair, pass);
          __syncthreads();
          ++round;
        }
        const Cell<M, G> cell(team, plan, shared, hidden_size, step, pair, pass);
        cell.add(gates, partial, plan.warps);
        const float out = cell.update(gates);
        if (step + 1 < longest) {
          uint32_t* next = buffers + buffer_of(step + 1) * plan.buffer_words;
          cell.send(next, Hidden<M>::stamp_of(step + 1), plan, out);
        }
        cell.store(p, team, step, gates, out);
      }
    }
  }
}

}  // namespace fastseq::cuda::grid_forward
