// Packing: turns tensors into the panels and strips that products read (drawn in gemm-inl.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa/region.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

template <int... I>
struct Indices {};
template <int N, int... I>
struct FirstIndices : FirstIndices<N - 1, N - 1, I...> {};
template <int... I>
struct FirstIndices<0, I...> {
  using type = Indices<I...>;
};

// Interleave blocks of S lanes: lanes whose index has the bit S come from b, the others from a. See transpose.
template <int S, class V, int... I>
FASTSEQ_INLINE V low_blocks(V a, V b, Indices<I...>) {
  constexpr int kCount = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & S) ? kCount + I - S : I)...);
}
template <int S, class V, int... I>
FASTSEQ_INLINE V high_blocks(V a, V b, Indices<I...>) {
  constexpr int kCount = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & S) ? kCount + I : I + S)...);
}

// Transposes a square of vectors: lane l of vector i goes to lane i of vector l.
template <int S, class V, int N>
FASTSEQ_INLINE void transpose(V (&v)[N]) {
  using Lane = typename FirstIndices<N>::type;
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    if (i & S) continue;
    const V a = v[i], b = v[i + S];
    v[i] = low_blocks<S>(a, b, Lane{});
    v[i + S] = high_blocks<S>(a, b, Lane{});
  }
  if constexpr (S > 1) transpose<S / 2>(v);
}

// Lane l of the result is the sum over the lanes of v[l].
template <int S, class V, int N>
FASTSEQ_INLINE V reduce_lanes(V (&v)[N]) {
  using Lane = typename FirstIndices<N>::type;
#pragma GCC unroll 8
  for (int i = 0; i < S; ++i) {
    v[i] = low_blocks<S>(v[i], v[i + S], Lane{}) + high_blocks<S>(v[i], v[i + S], Lane{});
  }
  if constexpr (S > 1) {
    return reduce_lanes<S / 2>(v);
  } else {
    return v[0];
  }
}

FASTSEQ_INLINE void convert(float x, float* out) { *out = x; }
FASTSEQ_INLINE void convert(double x, double* out) { *out = x; }
FASTSEQ_INLINE void convert(BFloat16 x, BFloat16* out) { *out = x; }
FASTSEQ_INLINE void convert(BFloat16 x, float* out) { *out = load(x); }
FASTSEQ_INLINE void convert(Half x, float* out) { *out = load(x); }
FASTSEQ_INLINE void convert(int8_t x, float* out) { *out = x; }

// Loads as many elements of a row of a tensor as one vector of operands holds.
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> load_operands(const S* p) {
  if constexpr (kPair<S> == 2) {
    return load_bytes<Vec<Acc<S>>>(p);
  } else {
    return vload(p);
  }
}
template <class S>
FASTSEQ_NOINLINE Vec<Acc<S>> load_part_of_operands(const S* p, int64_t n) {
  S lanes[kLanes<S> * kPair<S>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load_operands(lanes);
}
#if FASTSEQ_VECTOR_BYTES >= 32  // loads parts by masks
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> load_operands(const S* p, int64_t n) {
  if constexpr (kPair<S> == 1) {
    return vload(p, n);
  } else {
    return n >= kLanes<S> * kPair<S> ? load_operands(p) : load_part_of_operands(p, n);
  }
}
#else
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> load_operands(const S* p, int64_t n) {
  return n >= kLanes<S> * kPair<S> ? load_operands(p) : load_part_of_operands(p, n);
}
#endif

// Gathers one vector of operands: lane l holds depth k of row l, and k + 1 if depths are paired.
template <class S, class W>
FASTSEQ_INLINE Vec<Acc<S>> gather_lanes(const W* w, int64_t stride, int64_t units, int64_t depths) {
  Operand<S> lanes[kLanes<S> * kPair<S>] = {};
  for (int64_t l = 0; l < units; ++l) {
    for (int64_t k = 0; k < depths; ++k) convert(w[l * stride + k], &lanes[l * kPair<S> + k]);
  }
  return load_bytes<Vec<Acc<S>>>(lanes);
}

// Packs `count` rows of K elements, at most kLanes, into one vector of a panel.
template <class S, class W>
FASTSEQ_INLINE void pack_vector(const W* rows, int64_t K, int64_t count, Vec<Acc<S>> factor, Operand<S>* column) {
  constexpr int64_t kWidth = 4 * kLanes<S> * kPair<S>;
  int64_t k = 0;
  if (count == kLanes<S>) {
    for (; k + kLanes<S> * kPair<S> <= K; k += kLanes<S> * kPair<S>) {
      Vec<Acc<S>> square[kLanes<S>];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes<S>; ++l) square[l] = load_operands(rows + l * K + k);
      transpose<kLanes<S> / 2>(square);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes<S>; ++l, column += kWidth) {
        if constexpr (!std::is_same_v<S, W>) square[l] *= factor;
        std::memcpy(column, &square[l], sizeof square[l]);
      }
    }
  }
  for (; k < K; k += kPair<S>, column += kWidth) {
    Vec<Acc<S>> lanes = gather_lanes<S>(rows + k, K, count, K - k < kPair<S> ? K - k : kPair<S>);
    if constexpr (!std::is_same_v<S, W>) lanes *= factor;
    std::memcpy(column, &lanes, sizeof lanes);
  }
}

// Packs panel `panel` of the gates of a weight (4H, K): vector q holds gate q of kLanes hidden units. scale: factors of
// the rows (4H,), or null.
template <class S, class W>
void pack_gates(const W* weight, const Acc<S>* scale, int64_t H, int64_t K, int64_t panel, void* packed) {
  constexpr int64_t kWidth = 4 * kLanes<S> * kPair<S>;
  const int64_t unit = panel * kLanes<S>, units = H - unit < kLanes<S> ? H - unit : kLanes<S>;
  Operand<S>* const out = static_cast<Operand<S>*>(packed) + panel * 4 * kLanes<S> * padded_depth<S>(K);
  for (int64_t q = 0; q < 4; ++q) {
    const Vec<Acc<S>> factor = scale ? vload(scale + q * H + unit, units) : splat(Acc<S>(1));
    pack_vector<S>(weight + (q * H + unit) * K, K, units, factor, out + q * (kWidth / 4));
  }
}

// Packs panel `panel` of the columns of W^T, for a contiguous weight W (N, K): 4 * kLanes neighbouring rows of W.
template <class S>
void pack_rows(const S* weight, int64_t N, int64_t K, int64_t panel, void* packed) {
  constexpr int64_t kWidth = 4 * kLanes<S> * kPair<S>;
  Operand<S>* const out = static_cast<Operand<S>*>(packed) + panel * 4 * kLanes<S> * padded_depth<S>(K);
  for (int64_t q = 0; q < 4; ++q) {
    const int64_t row = (panel * 4 + q) * kLanes<S>, rest = N - row < 0 ? 0 : N - row;
    pack_vector<S>(weight + (N - rest) * K, K, rest < kLanes<S> ? rest : kLanes<S>, splat(Acc<S>(1)),
                   out + q * (kWidth / 4));
  }
}

// Packs one depth of a panel of columns: row k of a matrix and, if depths are paired, row k + 1 (null: zeros).
template <class S, class T>
FASTSEQ_INLINE void pack_depth(const T* row, const T* next, int64_t columns, Operand<S>* out) {
  for (int64_t v = 0; v < 4; ++v) {
    const int64_t first = v * kLanes<S>, n = columns - first < 0 ? 0 : columns - first;
    Vec<Acc<S>> lanes = vload(row + first, n);
    if constexpr (kPair<S> == 2) {
      const VWord high = next ? (VWord)vload(next + first, n) : VWord{};
      lanes = (VFloat)(high | ((VWord)lanes >> 16));
    }
    std::memcpy(out + v * kLanes<S> * kPair<S>, &lanes, sizeof lanes);
  }
}

// Packs panel `panel` of the columns of a matrix with K rows; row(k) points to the first element of row k.
template <class S, class Row>
FASTSEQ_INLINE void pack_columns(const Row& row, int64_t K, int64_t N, int64_t panel, Operand<S>* out) {
  constexpr int64_t kWidth = 4 * kLanes<S>;
  const int64_t first = panel * kWidth, columns = N - first < kWidth ? N - first : kWidth;
  for (int64_t k = 0; k < K; k += kPair<S>, out += kWidth * kPair<S>) {
    const auto* next = kPair<S> == 2 && k + 1 < K ? row(k + 1) + first : nullptr;
    pack_depth<S>(row(k) + first, next, columns, out);
  }
}

// Packs panel `panel` of the columns of a contiguous weight (K, N).
template <class S>
void pack_weight_columns(const S* weight, int64_t K, int64_t N, int64_t panel, void* packed) {
  Operand<S>* const out = static_cast<Operand<S>*>(packed) + panel * 4 * kLanes<S> * padded_depth<S>(K);
  pack_columns<S>([=](int64_t k) { return weight + k * N; }, K, N, panel, out);
}

// Converts a row of n elements to operands, with zeros up to `padded`.
template <class S>
FASTSEQ_INLINE void convert_row(const S* row, int64_t n, int64_t padded, Operand<S>* out) {
  int64_t k = 0;
  if constexpr (sizeof(Operand<S>) == sizeof(Acc<S>)) {
    for (; k + kLanes<S> <= n; k += kLanes<S>) vstore(vload(row + k), out + k);
  }
  for (; k < n; ++k) convert(row[k], out + k);
  for (; k < padded; ++k) out[k] = Operand<S>{};
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
