// Scores and gradients of the additive score with coverage: tanh(q + k + c w), c one number per step and position.
//
// The methods of attention_tanh-inl.h compose tanh(q + k) of a function of q and one of k. c w belongs to the pair, so
// each tanh is evaluated directly.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/attention_params.h"
#include "cpu/kernels/attention_products-inl.h"
#include "cpu/kernels/attention_rows-inl.h"
#include "cpu/kernels/attention_tanh-inl.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Operands of one sentence, in whole vectors of columns.
template <class A>
struct CoveredOperands {
  Matrix<const A> queries;   // (T, columns), bias added
  Matrix<const A> keys;      // (count, columns)
  const A* weight;           // v (columns)
  const A* coverage_weight;  // w (columns)
  A* coverage;               // (count) of one step: load_coverage
  int64_t columns;
};

template <class S>
CoveredOperands<Acc<S>> covered_operands(const AttentionInputParams<S>& in, int64_t b, Positions where, Arena& arena) {
  using A = Acc<S>;
  const A* weight = wide_vector(in.weight, in.size, arena);
  const A* coverage_weight = wide_vector(in.coverage_weight, in.size, arena);
  const Matrix<A> queries = biased_query(in, b, arena);
  const Matrix<const A> keys = wide_rows(in.keys, b, where, in.size, arena);
  A* coverage = arena.take<A>(where.count);
  return {{queries.data, queries.stride}, keys, weight, coverage_weight, coverage, padded_to_vectors<S>(in.size)};
}

// Loads the coverage of step t at the positions `where`.
template <class S>
void load_coverage(const AttentionInputParams<S>& in, int64_t b, int64_t t, Positions where, Acc<S>* coverage) {
  const S* row = in.coverage.data + b * in.coverage.batch + t * in.coverage.row;
  for (int64_t i = 0; i < where.count; ++i) coverage[i] = load(row[where[i] * in.coverage.column]);
}

// out[j] = scale * sum over the columns of v tanh(q + k_j + c_j w), for M positions.
template <int M, class A>
FASTSEQ_INLINE void covered_score_tile(const CoveredOperands<A>& x, int64_t t, int64_t first, A scale, A* out) {
  Vec<A> sum[M] = {};
  for (int64_t c = 0; c < x.columns; c += kLanes<A>) {
    const Vec<A> q = vload(x.queries.row(t) + c), w = vload(x.coverage_weight + c), v = vload(x.weight + c);
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) {
      const Vec<A> k = vload(x.keys.row(first + j) + c);
      sum[j] = fma(v, vtanh(fma(splat(x.coverage[first + j]), w, q + k)), sum[j]);
    }
  }
  store_sums(sum, scale, out);
}

template <class S>
void covered_scores(
    const AttentionInputParams<S>& in, int64_t b, Positions where, Arena arena, Matrix<Acc<S>> scores) {  // (T, count)
  const CoveredOperands<Acc<S>> x = covered_operands(in, b, where, arena);
  for (int64_t t = 0; t < in.steps; ++t) {
    load_coverage(in, b, t, where, x.coverage);
    in_groups<kGroup>(where.count, [&](auto group, int64_t i) {
      covered_score_tile<decltype(group)::count>(x, t, i, in.scale, scores.row(t) + i);
    });
  }
}

// Sums of one step, which the caller multiplies by weight[a]. With slope = g (1 - tanh^2), g the gradient of the score:
//   grad_query = sum_s slope      grad_keys[s] += slope      grad_coverage_weight += sum_s c_s slope
//   grad_weight += sum_s g tanh   products[s] = slope * weight * coverage_weight, summed over the columns but for lanes
template <class A>
void covered_gradient_step(const CoveredOperands<A>& x,
                           int64_t t,
                           const A* grads,  // (count) of the scores
                           int64_t count,
                           A* grad_query,            // (columns)
                           Matrix<A> grad_keys,      // (count, columns); set if t == 0, else added to
                           A* grad_weight,           // (columns), added to
                           A* grad_coverage_weight,  // (columns), added to
                           A* products) {            // (count, kLanes<A>), added to
  for (int64_t c = 0; c < x.columns; c += kLanes<A>) {
    const Vec<A> q = vload(x.queries.row(t) + c), w = vload(x.coverage_weight + c), vw = vload(x.weight + c) * w;
    Vec<A> dq{}, dv{}, dw{};
    for (int64_t i = 0; i < count; ++i) {
      const Vec<A> coverage = splat(x.coverage[i]), g = splat(grads[i]);
      const Vec<A> tanh = vtanh(fma(coverage, w, q + vload(x.keys.row(i) + c)));
      const Vec<A> slope = g * fnma(tanh, tanh, splat(A(1)));
      A *key = grad_keys.row(i) + c, *product = products + i * kLanes<A>;
      dq += slope;
      dv = fma(g, tanh, dv);
      dw = fma(coverage, slope, dw);
      vstore(t == 0 ? slope : vload(key) + slope, key);
      vstore(fma(slope, vw, vload(product)), product);
    }
    vstore(dq, grad_query + c);
    vstore(vload(grad_weight + c) + dv, grad_weight + c);
    vstore(vload(grad_coverage_weight + c) + dw, grad_coverage_weight + c);
  }
}

template <class S>
void covered_gradients(
    const AttentionBackwardParams<S>& p, int64_t b, Positions where, Matrix<const Acc<S>> grads, Arena arena) {
  using A = Acc<S>;
  const AttentionInputParams<S>& in = p.in;
  const int64_t whole = whole_columns(in.size);
  const CoveredOperands<A> x = covered_operands(in, b, where, arena);
  A *grad_query = arena.take<A>(whole), *products = arena.take<A>(where.count * kLanes<A>);
  const Matrix<A> grad_keys = arena.take_rows<A>(where.count, in.size);
  A *grad_weight = p.grad_weight + b * whole, *grad_bias = p.grad_bias + b * whole;
  A* grad_coverage_weight = p.grad_coverage_weight + b * whole;
  for (A* sum : {grad_weight, grad_bias, grad_coverage_weight}) std::memset(sum, 0, whole * sizeof(A));
  const auto weighted = [&](A* row) {
    for (int64_t c = 0; c < x.columns; c += kLanes<A>) vstore(vload(row + c) * vload(x.weight + c), row + c);
  };
  for (int64_t t = 0; t < in.steps; ++t) {
    load_coverage(in, b, t, where, x.coverage);
    std::memset(products, 0, where.count * kLanes<A> * sizeof(A));
    covered_gradient_step(x, t, grads.row(t), where.count, grad_query, grad_keys, grad_weight, grad_coverage_weight,
                          products);
    weighted(grad_query);
    store_row(grad_query, in.size, p.grad_query + (b * in.steps + t) * in.size);
    for (int64_t c = 0; c < x.columns; c += kLanes<A>) {
      vstore(vload(grad_bias + c) + vload(grad_query + c), grad_bias + c);
    }
    S* coverage = p.grad_coverage + (b * in.steps + t) * in.positions;
    std::memset(coverage, 0, in.positions * sizeof(S));
    for (int64_t i = 0; i < where.count; ++i) {
      store(sum_lanes(vload(products + i * kLanes<A>)), coverage + where[i]);
    }
  }
  weighted(grad_coverage_weight);
  S* key_data = p.grad_keys + b * in.positions * in.size;
  clear_other_rows(key_data, in.positions, in.size, where);
  for (int64_t i = 0; i < where.count; ++i) {
    weighted(grad_keys.row(i));
    store_row(grad_keys.row(i), in.size, key_data + where[i] * in.size);
  }
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
