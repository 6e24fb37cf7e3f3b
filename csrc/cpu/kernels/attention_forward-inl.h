// Forward of attention, one sentence at a time: scores, softmax, weighted sum of the values (attention_params.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/isa/region.h"
#include "cpu/kernels/attention_coverage-inl.h"
#include "cpu/kernels/attention_params.h"
#include "cpu/kernels/attention_products-inl.h"
#include "cpu/kernels/attention_rows-inl.h"
#include "cpu/kernels/attention_tanh-inl.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

template <class S>
void compute_scores(
    const AttentionInputParams<S>& in, int64_t b, Positions where, Arena arena, Matrix<Acc<S>> scores) {  // (T, count)
  using A = Acc<S>;
  const int64_t columns = padded_to_vectors<S>(in.size);
  if (!in.weight) {
    const Matrix<const A> queries = wide_rows(in.query, b, Positions{in.steps, nullptr, 0}, in.size, arena);
    const Matrix<const A> keys = wide_rows(in.keys, b, where, in.size, arena);
    return scores_of<Product<A>>(queries, in.steps, keys, where.count, static_cast<const A*>(nullptr), columns,
                                 in.scale, scores);
  }
  if (in.coverage.data) return covered_scores(in, b, where, arena, scores);
  const A* weight = wide_vector(in.weight, in.size, arena);
  with_tanh(in, b, where, arena,
            [&](auto form, Matrix<const A> queries, Matrix<const A> keys, Positions part, int64_t first, Arena) {
              scores_of<decltype(form)>(queries, in.steps, keys, part.count, weight, columns, in.scale,
                                        Matrix<A>{scores.data + first, scores.stride});
            });
}

// Sets the scores of masked positions to -infinity. `where` leaves out positions that every step masks.
template <class S>
void hide_masked(const AttentionInputParams<S>& in, int64_t b, Positions where, Matrix<Acc<S>> scores) {
  if (!in.mask.data || in.mask.row == 0) return;
  for (int64_t t = 0; t < in.steps; ++t) {
    const bool* mask = in.mask.data + b * in.mask.batch + t * in.mask.row;
    for (int64_t i = 0; i < where.count; ++i) {
      if (!mask[where[i] * in.mask.column]) scores.row(t)[i] = -std::numeric_limits<Acc<S>>::infinity();
    }
  }
}

// Softmax of one row, in place. A row of -infinity becomes a row of zeros; a NaN makes the whole row NaN.
template <class A>
void softmax(A* row, int64_t count) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  constexpr A kNothing = sizeof(A) == 4 ? -80 : -700;  // e^x counts as 0 below it, so no result is denormal
  const int64_t columns = padded_to_vectors<A>(count);
  for (int64_t c = count; c < columns; ++c) row[c] = -kInfinity;
  Vec<A> largest = splat(-kInfinity), sum{};
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    const Vec<A> x = vload(row + c);
    largest = x > largest ? x : largest;
  }
  A top = largest[0];
  for (int i = 1; i < kLanes<A>; ++i) top = largest[i] > top ? largest[i] : top;
  top = top == -kInfinity ? 0 : top;
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    const Vec<A> x = vload(row + c) - splat(top);
    const Vec<A> e = x < splat(kNothing) ? Vec<A>{} : vexp(x);
    vstore(e, row + c);
    sum += e;
  }
  const A total = sum_lanes(sum);
  const Vec<A> divisor =
      splat(total == 0 ? A(1) : total);  // multiplying by its reciprocal would add one rounding to all weights
  for (int64_t c = 0; c < columns; c += kLanes<A>) vstore(vload(row + c) / divisor, row + c);
}

template <class S>
void attention_forward_sentence(const AttentionForwardParams<S>& p, int64_t b, Arena arena) {
  using A = Acc<S>;
  const AttentionInputParams<S>& in = p.in;
  const Positions where = attended(in, b, arena), all_steps{in.steps, nullptr, 0};
  const Matrix<A> scores = arena.take_rows<A>(in.steps, where.count);
  compute_scores(in, b, where, arena, scores);
  hide_masked(in, b, where, scores);
  for (int64_t t = 0; t < in.steps; ++t) {
    softmax(scores.row(t), where.count);
    if (!p.weights) continue;
    A* weights = p.weights + (b * in.steps + t) * in.positions;
    std::memset(weights, 0, in.positions * sizeof(A));
    for (int64_t i = 0; i < where.count; ++i) weights[where[i]] = scores.row(t)[i];
  }
  S* data = p.context + b * in.steps * in.width;
  const Matrix<A> context = result_rows(data, in.width, all_steps, arena);
  const Matrix<const A> values = wide_rows(in.values, b, where, in.width, arena);
  weighted_sum(Factors<A>{scores.data, scores.stride, 1}, in.steps, values, where.count, padded_to_vectors<S>(in.width),
               context);
  finish_rows(context, data, in.steps, in.width, all_steps);
}

// Sentences [begin, end). scratch: attention_scratch_bytes().
template <class S>
void attention_forward(const AttentionForwardParams<S>& p, int64_t begin, int64_t end, void* scratch) {
  const FlushDenormals flush;
  for (int64_t b = begin; b < end; ++b) attention_forward_sentence(p, b, Arena{static_cast<char*>(scratch)});
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
