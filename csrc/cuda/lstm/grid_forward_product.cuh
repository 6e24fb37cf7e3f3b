// The product W h of the forward grid recurrence: storage of a lane's slices of weights, and a warp's sums over its
// chunks of K.
#pragma once

#include "cuda/lstm/grid_forward_exchange.cuh"

namespace fastseq::cuda::grid_forward {

// Slices of a lane: the first kKept chunks of the first pass in registers, all others in shared memory.
template <class M, int G>
struct Weights {
  using T = typename M::T;
  static constexpr int kKept = M::kKeptSlices / G;  // chunks
  static_assert(kKept % M::kStage == 0);
  Slice kept[kKept][G] = {};

  // weight: (4H, H) of the direction. The loop is not unrolled, to save registers: slices for registers pass through
  // `partial`.
  FASTSEQ_DEVICE void load(
      const T* weight, int hidden, const BlockTask& task, const Plan& plan, const Shared<G>& shared) {
    const int first = static_cast<int>(threadIdx.x / 32) * plan.warp_chunks;
#pragma unroll 1
    for (int k = 0; k < passes_of<G>(task) * plan.warp_chunks * G; ++k) {
      const int group = k % G, chunk = k / G % plan.warp_chunks, pass = k / G / plan.warp_chunks;
      const bool keep = pass == 0 && chunk < kKept;
      uint32_t* to = keep ? reinterpret_cast<uint32_t*>(shared.partial) : slice(plan, shared, pass, chunk, group);
      put_slice(to, weight, hidden, task, pass * G + group, first + chunk);
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

  // group: index within the block
  static FASTSEQ_DEVICE void put_slice(
      uint32_t* slice, const T* weight, int hidden, const BlockTask& task, int group, int chunk) {
    const int unit = (task.group + group) * kUnits + lane_id() / 4;
    const bool exists = group < task.groups && unit < hidden;
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

template <int G, class Sum>
FASTSEQ_DEVICE void put_sums(float* partial, const Sum& sum, int warp, int group, int tile) {
  const unsigned lane = thread_now() % 32u;
  float gates[2][4];
  sum.finish(gates);
  float* to = partial + Shared<G>::at(warp, 0, 2 * (lane % 4), lane / 4);
#pragma unroll
  for (int e = 0; e < 2; ++e) store_wide(to + Shared<G>::further(group, tile * kTile + e), gates[e]);
}

// Multiplies slices in registers by the first kTiles tiles of a stage. count: chunks of the warp from `first` on.
template <int kTiles, class M, int G>
FASTSEQ_DEVICE void multiply_kept(typename M::Sum (&sums)[G][2],
                                  const Weights<M, G>& weights,
                                  const typename Hidden<M>::Words& h,
                                  int step,
                                  int first,
                                  int count) {
#pragma unroll
  for (int c = 0; c < M::kStage; ++c) {
    if (c >= count) continue;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t operands[4];
      Hidden<M>::decode(operands, h[c][tile], step);
#pragma unroll
      for (int g = 0; g < G; ++g) M::multiply(sums[g][tile], weights.kept[first + c][g], operands);
    }
  }
}

// Writes this warp's partial sums of W h, for one pass and one pair of tiles, to `partial`. h: requested, of the first
// stage.
template <class M, int G>
FASTSEQ_DEVICE void multiply_pair(float* partial,
                                  const Weights<M, G>& weights,
                                  const Shared<G>& shared,
                                  const Plan& plan,
                                  const Hidden<M>& hidden,
                                  typename Hidden<M>::Words& h,
                                  const Place& at) {
  constexpr int kKept = Weights<M, G>::kKept;
  const int warp = thread_now() / 32u, first = warp * plan.warp_chunks;
  const int count = min(plan.warp_chunks, plan.chunks - first);
  const bool second = at.pair * kPair + kTile < hidden.rows;
  typename M::Sum sums[G][2];
  hidden.complete(h, plan, at, first);
#pragma unroll
  for (int stage = 0; stage < kKept; stage += M::kStage) {
    if (at.pass || stage >= count) continue;
    if (stage) {
      hidden.request(h, plan, at, first + stage);
      hidden.complete(h, plan, at, first + stage);
    }
    if (second) {
      multiply_kept<2>(sums, weights, h, at.step, stage, count - stage);
    } else {
      multiply_kept<1>(sums, weights, h, at.step, stage, count - stage);
    }
  }
  for (int stage = at.pass ? 0 : kKept; stage < count; stage += M::kStage) {
    if (stage) {
      hidden.request(h, plan, at, first + stage);
      hidden.complete(h, plan, at, first + stage);
    }
#pragma unroll
    for (int c = 0; c < M::kStage; ++c) {
      if (stage + c >= count) continue;
      uint32_t operands[2][4];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) Hidden<M>::decode(operands[tile], h[c][tile], at.step);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        Slice w;
        Weights<M, G>::get_slice(w, Weights<M, G>::slice(plan, shared, at.pass, stage + c, g));
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) M::multiply(sums[g][tile], w, operands[tile]);
      }
    }
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
    put_sums<G>(partial, sums[g][0], warp, g, 0);
    if (second) put_sums<G>(partial, sums[g][1], warp, g, 1);
  }
}

}  // namespace fastseq::cuda::grid_forward
