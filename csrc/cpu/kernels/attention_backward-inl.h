// Backward of attention, one sentence at a time: gradients of the weights, scores, query, keys and values.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/attention_coverage-inl.h"
#include "cpu/kernels/attention_params.h"
#include "cpu/kernels/attention_products-inl.h"
#include "cpu/kernels/attention_rows-inl.h"
#include "cpu/kernels/attention_tanh-inl.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Replaces the gradient g of the weights by that of the scores: weights * (g - sum(weights * g)) * scale.
template <class A>
void softmax_backward(const A* weights, A scale, int64_t count, A* row) {
  const int64_t columns = padded_to_vectors<A>(count);
  for (int64_t c = count; c < columns; ++c) row[c] = 0;
  Vec<A> products{};
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    const Vec<A> w = vload(weights + c), g = vload(row + c);
    products = w == Vec<A>{} ? products : fma(w, g, products);  // g of an unattended position may be anything
  }
  const Vec<A> mean = splat(sum_lanes(products));
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    const Vec<A> w = vload(weights + c), g = vload(row + c);
    vstore(w == Vec<A>{} ? Vec<A>{} : w * (g - mean) * splat(scale), row + c);
  }
}

// Weights of one sentence at the attended positions, (T, count); rows padded with zeros.
template <class S>
Matrix<const Acc<S>> attended_weights(const AttentionBackwardParams<S>& p, int64_t b, Positions where, Arena& arena) {
  using A = Acc<S>;
  const Matrix<A> weights = arena.take_rows<A>(p.in.steps, where.count);
  for (int64_t t = 0; t < p.in.steps; ++t) {
    const A* row = p.weights + (b * p.in.steps + t) * p.in.positions;
    for (int64_t i = 0; i < where.count; ++i) weights.row(t)[i] = row[where[i]];
    for (int64_t i = where.count; i < padded_to_vectors<S>(where.count); ++i) weights.row(t)[i] = 0;
  }
  return {weights.data, weights.stride};
}

// Gradients of the scores, (T, count).
template <class S>
Matrix<const Acc<S>> score_gradients(const AttentionBackwardParams<S>& p,
                                     int64_t b,
                                     Positions where,
                                     Matrix<const Acc<S>> weights,
                                     Matrix<const Acc<S>> grad_context,  // (T, D)
                                     Arena& arena) {
  using A = Acc<S>;
  const AttentionInputParams<S>& in = p.in;
  const Matrix<A> grads = arena.take_rows<A>(in.steps, where.count);
  Arena values_arena = arena;
  const Matrix<const A> values = wide_rows(in.values, b, where, in.width, values_arena);
  scores_of<Product<A>>(grad_context, in.steps, values, where.count, static_cast<const A*>(nullptr),
                        padded_to_vectors<S>(in.width), A(1), grads);
  for (int64_t t = 0; t < in.steps; ++t) {
    if (p.grad_weights.data) {
      const S* row = p.grad_weights.data + b * p.grad_weights.batch + t * p.grad_weights.row;
      for (int64_t i = 0; i < where.count; ++i) grads.row(t)[i] += load(row[where[i] * p.grad_weights.column]);
    }
    softmax_backward(weights.row(t), in.scale, where.count, grads.row(t));
  }
  return {grads.data, grads.stride};
}

// Gradients of the additive score for N steps and V vectors of columns. The caller multiplies grad_query and grad_keys
// by weight[a]. With slope = 1 - tanh^2:
//   grad_query[t] += sum_s g(t, s) slope    grad_keys[s] += sum_t g(t, s) slope    grad_weight += sum_ts g(t, s) tanh
template <class Form, int N, int V, class A>
FASTSEQ_INLINE void gradient_tile(Matrix<const A> queries,  // (N, V vectors)
                                  Matrix<const A> keys,     // (count, V vectors)
                                  Matrix<const A> grads,    // (N, count) of the scores
                                  int64_t count,
                                  bool first,            // grad_keys is not set yet
                                  Matrix<A> grad_query,  // (N, V vectors), added to
                                  Matrix<A> grad_keys,   // (count, V vectors)
                                  A* grad_weight) {      // (V vectors), added to
  Vec<A> q[N][V], dq[N][V] = {}, dv[N][V] = {};
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) q[i][v] = vload(queries.row(i) + v * kLanes<A>);
  }
  for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<A> k = vload(keys.row(j) + v * kLanes<A>);
      A* out = grad_keys.row(j) + v * kLanes<A>;
      Vec<A> dk = first ? Vec<A>{} : vload(out);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        const Vec<A> g = splat(grads.row(i)[j]);
        const Vec<A> tanh = Form::tanh(q[i][v], k), slope = fnma(tanh, tanh, splat(A(1)));
        dv[i][v] = fma(g, tanh, dv[i][v]);
        dq[i][v] = fma(g, slope, dq[i][v]);
        dk = fma(g, slope, dk);
      }
      vstore(dk, out);
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) {
      A *query = grad_query.row(i) + v * kLanes<A>, *weight = grad_weight + v * kLanes<A>;
      vstore(vload(query) + dq[i][v], query);
      vstore(vload(weight) + dv[i][v], weight);
    }
  }
}

template <class Form, class A>
void additive_gradients_of(Matrix<const A> queries,  // (T, columns)
                           int64_t T,
                           Matrix<const A> keys,  // (count, columns)
                           int64_t columns,       // whole vectors
                           Matrix<const A> grads,
                           int64_t count,
                           Matrix<A> grad_query,
                           Matrix<A> grad_keys,
                           A* grad_weight) {
  const auto column_block = [&](auto vectors, int64_t c, auto steps, int64_t t) {
    gradient_tile<Form, decltype(steps)::count, decltype(vectors)::count>(
        Matrix<const A>{queries.row(t) + c, queries.stride}, Matrix<const A>{keys.data + c, keys.stride},
        Matrix<const A>{grads.row(t), grads.stride}, count, t == 0, Matrix<A>{grad_query.row(t) + c, grad_query.stride},
        Matrix<A>{grad_keys.data + c, grad_keys.stride}, grad_weight + c);
  };
  if (T == 1) {
    return in_groups<kGroup>(columns / kLanes<A>,
                             [&](auto vectors, int64_t v) { column_block(vectors, v * kLanes<A>, Rows<1>{}, 0); });
  }
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    in_groups<kGroup>(T, [&](auto steps, int64_t t) { column_block(Rows<1>{}, c, steps, t); });
  }
}

template <class S>
void additive_gradients(
    const AttentionBackwardParams<S>& p, int64_t b, Positions where, Matrix<const Acc<S>> grads, Arena arena) {
  using A = Acc<S>;
  const AttentionInputParams<S>& in = p.in;
  const int64_t columns = padded_to_vectors<S>(in.size);
  const A* weight = wide_vector(in.weight, in.size, arena);
  const Matrix<A> grad_query = arena.take_rows<A>(in.steps, in.size);
  A *grad_weight = p.grad_weight + b * whole_columns(in.size), *grad_bias = p.grad_bias + b * whole_columns(in.size);
  std::memset(grad_query.data, 0, in.steps * grad_query.stride * sizeof(A));
  std::memset(grad_weight, 0, whole_columns(in.size) * sizeof(A));
  std::memset(grad_bias, 0, whole_columns(in.size) * sizeof(A));
  S* key_data = p.grad_keys + b * in.positions * in.size;
  clear_other_rows(key_data, in.positions, in.size, where);
  const auto weighted = [&](A* row) {
    for (int64_t c = 0; c < columns; c += kLanes<A>) vstore(vload(row + c) * vload(weight + c), row + c);
  };
  with_tanh(
      in, b, where, arena,
      [&](auto form, Matrix<const A> queries, Matrix<const A> keys, Positions part, int64_t first, Arena block_arena) {
        const Matrix<A> grad_keys = block_arena.take_rows<A>(part.count, in.size);
        additive_gradients_of<decltype(form)>(queries, in.steps, keys, columns,
                                              Matrix<const A>{grads.data + first, grads.stride}, part.count, grad_query,
                                              grad_keys, grad_weight);
        for (int64_t i = 0; i < part.count; ++i) {
          weighted(grad_keys.row(i));
          store_row(grad_keys.row(i), in.size, key_data + part[i] * in.size);
        }
      });
  for (int64_t t = 0; t < in.steps; ++t) {
    weighted(grad_query.row(t));
    store_row(grad_query.row(t), in.size, p.grad_query + (b * in.steps + t) * in.size);
    for (int64_t c = 0; c < columns; c += kLanes<A>) {
      vstore(vload(grad_bias + c) + vload(grad_query.row(t) + c), grad_bias + c);
    }
  }
}

template <class S>
void dot_gradients(
    const AttentionBackwardParams<S>& p, int64_t b, Positions where, Matrix<const Acc<S>> grads, Arena arena) {
  using A = Acc<S>;
  const AttentionInputParams<S>& in = p.in;
  const Positions all_steps{in.steps, nullptr, 0};
  const int64_t columns = padded_to_vectors<S>(in.size);
  S* query_data = p.grad_query + b * in.steps * in.size;
  S* key_data = p.grad_keys + b * in.positions * in.size;
  const Matrix<const A> queries = wide_rows(in.query, b, all_steps, in.size, arena);
  const Matrix<const A> keys = wide_rows(in.keys, b, where, in.size, arena);
  const Matrix<A> grad_query = result_rows(query_data, in.size, all_steps, arena);
  const Matrix<A> grad_keys = result_rows(key_data, in.size, where, arena);
  weighted_sum(Factors<A>{grads.data, grads.stride, 1}, in.steps, keys, where.count, columns, grad_query);
  weighted_sum(Factors<A>{grads.data, 1, grads.stride}, where.count, queries, in.steps, columns, grad_keys);
  finish_rows(grad_query, query_data, in.steps, in.size, all_steps);
  finish_rows(grad_keys, key_data, in.positions, in.size, where);
}

template <class S>
void attention_backward_sentence(const AttentionBackwardParams<S>& p, int64_t b, Arena arena) {
  using A = Acc<S>;
  const AttentionInputParams<S>& in = p.in;
  const Positions all_steps{in.steps, nullptr, 0};
  const Positions where = in.steps ? attended(in, b, arena) : Positions{};  // no steps: all gradients are 0
  const Matrix<const A> weights = attended_weights(p, b, where, arena);
  const Matrix<const A> grad_context = wide_rows(p.grad_context, b, all_steps, in.width, arena);
  if (p.need_values) {
    Arena values_arena = arena;
    S* data = p.grad_values + b * in.positions * in.width;
    const Matrix<A> grad_values = result_rows(data, in.width, where, values_arena);
    weighted_sum(Factors<A>{weights.data, 1, weights.stride}, where.count, grad_context, in.steps,
                 padded_to_vectors<S>(in.width), grad_values);
    finish_rows(grad_values, data, in.positions, in.width, where);
  }
  if (!p.need_scores) return;
  const Matrix<const A> grads = score_gradients(p, b, where, weights, grad_context, arena);
  if (in.coverage.data) return covered_gradients(p, b, where, grads, arena);
  in.weight ? additive_gradients(p, b, where, grads, arena) : dot_gradients(p, b, where, grads, arena);
}

template <class S>
void attention_backward(const AttentionBackwardParams<S>& p, int64_t begin, int64_t end, void* scratch) {
  const FlushDenormals flush;
  for (int64_t b = begin; b < end; ++b) attention_backward_sentence(p, b, Arena{static_cast<char*>(scratch)});
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
