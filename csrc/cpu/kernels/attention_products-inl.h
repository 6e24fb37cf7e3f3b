// Products of attention: scores of steps and keys in register tiles, and weighted sums of rows.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/isa/region.h"
#include "cpu/kernels/attention_rows-inl.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

#if FASTSEQ_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kGroup = 4;  // rows of a register tile: 16 sums and 12 operands of 32 registers
#else
constexpr int kGroup = 2;  // 4 sums and 9 operands of 16 registers
#endif

// Calls body(Rows<N>{}, i) for every whole group of N, then body(Rows<1>{}, i) for each of the rest.
template <int N, class Body>
FASTSEQ_INLINE void in_groups(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + N <= count; i += N) body(Rows<N>{}, i);
  for (; i < count; ++i) body(Rows<1>{}, i);
}

// Form of the dot score: adds the products of one vector of columns. attention_tanh-inl.h has the additive forms.
template <class A>
struct Product {
  static FASTSEQ_INLINE Vec<A> add(Vec<A> sum, Vec<A>, Vec<A> q, Vec<A> k) { return fma(q, k, sum); }
};

// Source of lane i, if every four lanes are `first` and `second` of the four in a, then of the four in b.
constexpr int pick(int i, int first, int second, int lanes) {
  return i / 4 * 4 + (i % 2 ? second : first) + (i % 4 < 2 ? 0 : lanes);
}

template <int... I>
FASTSEQ_INLINE VFloat fold_fours(VFloat a, VFloat b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
  return __builtin_shufflevector(a, b, pick(I, 0, 1, N)...) + __builtin_shufflevector(a, b, pick(I, 2, 3, N)...);
}

template <int... I>
FASTSEQ_INLINE VFloat fold_pairs(VFloat a, VFloat b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I);
  return __builtin_shufflevector(a, b, pick(I, 0, 2, N)...) + __builtin_shufflevector(a, b, pick(I, 1, 3, N)...);
}

// out[j] = scale * sum over the lanes of v[j].
template <int M, class A>
FASTSEQ_INLINE void store_sums(const Vec<A> (&v)[M], A scale, A* out) {
  if constexpr (M == 4 && sizeof(A) == 4) {
    const auto lanes = std::make_integer_sequence<int, kLanes<A>>{};
    Vec<A> s = fold_pairs(fold_fours(v[0], v[1], lanes), fold_fours(v[2], v[3], lanes), lanes);
    A folded[kLanes<A>];
    vstore(s, folded);
    typedef A Four __attribute__((vector_size(16)));
    Four four = load_bytes<Four>(folded);
    for (int i = 4; i < kLanes<A>; i += 4) four += load_bytes<Four>(folded + i);
    four *= scale;
    std::memcpy(out, &four, sizeof four);
  } else {
    for (int j = 0; j < M; ++j) out[j] = scale * sum_lanes(v[j]);
  }
}

// out[t][s] = scale * sum over the columns of Form, for N steps and M keys.
template <class Form, int N, int M, class A>
FASTSEQ_INLINE void score_tile(const A* const* queries,  // (N) rows
                               const A* const* keys,     // (M) rows
                               const A* weight,          // (columns) or unused
                               int64_t columns,
                               A scale,
                               Matrix<A> out) {  // (N, M)
  Vec<A> sum[N][M] = {};
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    const Vec<A> v = weight ? vload(weight + c) : Vec<A>{};
    Vec<A> k[M];
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) k[j] = vload(keys[j] + c);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const Vec<A> q = vload(queries[i] + c);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) sum[i][j] = Form::add(sum[i][j], v, q, k[j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) store_sums(sum[i], scale, out.row(i));
}

template <class Form, class A>
void scores_of(Matrix<const A> queries,  // (T, columns)
               int64_t T,
               Matrix<const A> keys,  // (S, columns)
               int64_t S,
               const A* weight,  // (columns) or null
               int64_t columns,  // whole vectors
               A scale,
               Matrix<A> out) {  // (T, S)
  in_groups<kGroup>(T, [&](auto steps, int64_t t) {
    constexpr int N = decltype(steps)::count;
    const A* query_rows[N];
    for (int i = 0; i < N; ++i) query_rows[i] = queries.row(t + i);
    in_groups<N == 1 ? 4 : kGroup>(S, [&](auto positions, int64_t s) {
      constexpr int M = decltype(positions)::count;
      const A* key_rows[M];
      for (int j = 0; j < M; ++j) key_rows[j] = keys.row(s + j);
      score_tile<Form, N, M>(query_rows, key_rows, weight, columns, scale, Matrix<A>{out.row(t) + s, out.stride});
    });
  });
}

// Factors of a weighted sum: element (r, j) belongs to result row r and summand j.
template <class A>
struct Factors {
  const A* data;
  int64_t row, summand;  // strides
};

template <int N, int V, class A>
FASTSEQ_INLINE void sum_tile(Factors<A> factors, Matrix<const A> x, int64_t count, Matrix<A> out) {
  Vec<A> total[N][V] = {};
  for (int64_t begin = 0; begin < count; begin += kAccumulationChunk) {
    const int64_t end = count - begin > kAccumulationChunk ? begin + kAccumulationChunk : count;
    Vec<A> sum[N][V] = {};
    for (int64_t j = begin; j < end; ++j) {
      Vec<A> summand[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) summand[v] = vload(x.row(j) + v * kLanes<A>);
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) {
        const Vec<A> factor = splat(factors.data[r * factors.row + j * factors.summand]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[r][v] = fma(factor, summand[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) total[r][v] += sum[r][v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) vstore(total[r][v], out.row(r) + v * kLanes<A>);
  }
}

// out[r] = sum over j of factor(r, j) * x[j].
template <class A>
void weighted_sum(Factors<A> factors, int64_t rows, Matrix<const A> x, int64_t count, int64_t columns, Matrix<A> out) {
  int64_t begin = 0;
  const auto from = [&](int64_t v) { return Matrix<const A>{x.data + v * kLanes<A>, x.stride}; };
  if (rows == 1) {  // long pieces of every row of x: the memory's bandwidth bounds one step
    in_groups<8>(columns / kLanes<A> / 8 * 8, [&](auto vectors, int64_t v) {
      sum_tile<1, decltype(vectors)::count>(factors, from(v), count, Matrix<A>{out.row(0) + v * kLanes<A>, out.stride});
    });
    begin = columns / kLanes<A> / 8 * 8;
  }
  in_groups<4>(columns / kLanes<A> - begin, [&](auto vectors, int64_t i) {
    constexpr int V = decltype(vectors)::count;
    const int64_t v = begin + i;
    for_each_tile(rows, [&](auto tile, int64_t r) {
      sum_tile<decltype(tile)::count, V>(Factors<A>{factors.data + r * factors.row, factors.row, factors.summand},
                                         from(v), count, Matrix<A>{out.row(r) + v * kLanes<A>, out.stride});
    });
  });
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
