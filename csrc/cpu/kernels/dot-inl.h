// Products of skinny (GEMV-like) batches: rows of W are read in place, because packing them would cost more than it
// saves.
//
// A panel product broadcasts one element of a row over the lanes. A dot product runs along the lanes instead: each lane
// sums a part of the depth, and the lanes are added at the end.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/isa/region.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Rows of a in one tile: as many as leave registers for four rows of W.
constexpr int kDotRows = kTileRows < kSkinnyRows ? kTileRows : kSkinnyRows;

// Rows of W per group, a power of two: as many sums as registers hold. At most 8, because the hardware does not
// prefetch 16 streams (130 GB/s from the L2 cache instead of 159, Emerald Rapids).
template <class S>
constexpr int dot_group(int rows) {
  int group = kLanes<S> < 8 ? kLanes<S> : 8;
  while (group * rows > 4 * kTileRows) group /= 2;
  return group;
}

template <class S>
FASTSEQ_INLINE void multiply_lanes(Vec<Acc<S>> a, Vec<Acc<S>> w, Vec<Acc<S>>& sum) {
  if constexpr (kPair<S> == 2) {
#if FASTSEQ_BF16_DOT
    sum = (VFloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
#endif
  } else {
    sum = fma(a, w, sum);
  }
}

// True if float32 rows meet bfloat16 weights: a vector of weights then holds twice as many depths as one of the row.
template <class S, class W>
constexpr bool kWidened = false;
#if FASTSEQ_VECTOR_BYTES > 16
template <class S>
constexpr bool kWidened<S, BFloat16> = kPair<S> == 1;
#endif

template <int... I>
FASTSEQ_INLINE void split_lanes(VFloat low, VFloat high, VFloat& even, VFloat& odd, Indices<I...>) {
  even = __builtin_shufflevector(low, high, (2 * I)...);
  odd = __builtin_shufflevector(low, high, (2 * I + 1)...);
}

// The lanes of even and of odd index of (low, high).
FASTSEQ_INLINE void split_parity(VFloat low, VFloat high, VFloat& even, VFloat& odd) {
  split_lanes(low, high, even, odd, typename FirstIndices<kLanes<float>>::type{});
}

// Sums over depths [0, K) of GROUP rows of W times ROWS rows of a, each still spread over the lanes.
template <class S, int ROWS, int GROUP, class W>
FASTSEQ_INLINE void dot_group_sums(const Operand<S>* const* a,  // (ROWS) rows of K elements
                                   const W* const* w,           // (GROUP) rows of K elements
                                   int64_t K,
                                   Vec<Acc<S>> (*sums)[kLanes<S>],
                                   int group) {
  constexpr int64_t kStep = kLanes<S> * kPair<S>;
  Vec<Acc<S>> sum[ROWS][GROUP] = {};
  const auto step = [&](int64_t k, auto... n) FASTSEQ_LAMBDA_INLINE {
    Vec<Acc<S>> row[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) row[r] = load_operands(a[r] + k, n...);
#pragma GCC unroll 16
    for (int g = 0; g < GROUP; ++g) {
      const Vec<Acc<S>> column = load_operands(w[g] + k, n...);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) multiply_lanes<S>(row[r], column, sum[r][g]);
    }
  };
  int64_t k = 0;
  if constexpr (kWidened<S, W>) {
    const auto two_steps = [&](int64_t k) FASTSEQ_LAMBDA_INLINE {
      Vec<float> even[ROWS], odd[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) split_parity(vload(a[r] + k), vload(a[r] + k + kStep), even[r], odd[r]);
#pragma GCC unroll 16
      for (int g = 0; g < GROUP; ++g) {
        const VWord pairs = load_bytes<VWord>(w[g] + k);
        const VFloat first = (VFloat)(pairs << 16), second = (VFloat)(pairs & 0xffff0000u);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sum[r][g] = fma(odd[r], second, fma(even[r], first, sum[r][g]));
      }
    };
    for (; k + 2 * kStep <= K; k += 2 * kStep) two_steps(k);
  }
  for (; k + kStep <= K; k += kStep) step(k);
  if (k < K) step(k, K - k);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 16
    for (int g = 0; g < GROUP; ++g) sums[r][group * GROUP + g] = sum[r][g];
  }
}

// Row r times `count` rows of W from `weight` on, one in each lane of the result. Lanes past the last row repeat it.
template <class S, int ROWS, class W>
FASTSEQ_NOINLINE void dot_rows(const Operand<S>* const* a,  // (ROWS) rows of K elements
                               const W* weight,             // (count, K)
                               int64_t K,
                               int64_t count,
                               Vec<Acc<S>> (&result)[ROWS]) {
  constexpr int GROUP = dot_group<S>(ROWS);
  Vec<Acc<S>> sums[ROWS][kLanes<S>];
  for (int group = 0; group < kLanes<S> / GROUP; ++group) {
    const W* row[GROUP];
    for (int g = 0; g < GROUP; ++g) {
      const int64_t n = group * GROUP + g;
      row[g] = weight + (n < count ? n : count - 1) * K;
    }
    dot_group_sums<S, ROWS, GROUP>(a, row, K, sums, group);
  }
  for (int r = 0; r < ROWS; ++r) result[r] = reduce_lanes<kLanes<S> / 2>(sums[r]);
}

// Calls call(weight) with a pointer to elements of `type`.
template <class S, class Call>
FASTSEQ_INLINE void with_weight(const void* weight, WeightType type, const Call& call) {
  if constexpr (std::is_same_v<S, float>) {
    if (type == WeightType::kBFloat16) return call(static_cast<const BFloat16*>(weight));
    if (type == WeightType::kInt8) return call(static_cast<const int8_t*>(weight));
  }
  call(static_cast<const S*>(weight));
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
