// The best continuations of each sentence: C largest of score + log_softmax(logits) over its K rows and V columns.
//
// A row is read three times: its largest elements by blocks, the sum of exponentials, and then only the blocks that can
// hold a candidate. Rounding is monotone, so the total of a block's largest element bounds the totals of the block.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/isa/region.h"
#include "cpu/kernels/candidates_params.h"
#include "cpu/kernels/cross_entropy-inl.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

constexpr int64_t kMostBlocks = 512;
constexpr int64_t kBlockVectors = 8;  // at least

template <class A>
FASTSEQ_INLINE A minus_infinity() {
  return -std::numeric_limits<A>::infinity();
}

// NaN ranks first, as in torch's sorts.
template <class A>
FASTSEQ_INLINE bool ranks_above(A a, A b) {
  return a > b || (a != a && b == b);
}

// The best `count` continuations so far, best first; of equals the one that was added first.
template <class A>
struct BestCandidates {
  int64_t count, filled;
  A* totals;         // (count,)
  int64_t* parents;  // (count,)
  int64_t* tokens;   // (count,)

  FASTSEQ_INLINE bool admits(A total) const { return filled < count || ranks_above(total, totals[count - 1]); }

  FASTSEQ_INLINE void add(A total, int64_t parent, int64_t token) {
    int64_t i = filled < count ? filled++ : count - 1;
    for (; i > 0 && ranks_above(total, totals[i - 1]); --i) {
      totals[i] = totals[i - 1];
      parents[i] = parents[i - 1];
      tokens[i] = tokens[i - 1];
    }
    totals[i] = total;
    parents[i] = parent;
    tokens[i] = token;
  }
};

// Columns of one row that may not be taken.
struct ForbiddenColumns {
  const int64_t* columns;  // (count,)
  int64_t count;
  int64_t exempt;  // the one column that is allowed all the same, or -1

  FASTSEQ_INLINE bool holds(int64_t column) const {
    for (int64_t i = 0; i < count; ++i) {
      if (columns[i] == column) return column != exempt;
    }
    return false;
  }
};

template <class S>
ForbiddenColumns forbidden_columns(const CandidatesParams<S>& p, int64_t row) {
  ForbiddenColumns result{p.forbidden + row * p.forbidden_stride, p.forbidden_count, -1};
  bool all = result.count >= p.vocab;
  for (int64_t v = 0; all && v < p.vocab; ++v) all = result.holds(v);
  if (all) result.exempt = p.last_resort;
  return result;
}

// Sum of exp(x - shift) over n elements; NaN if one of them is.
template <class S>
FASTSEQ_INLINE Acc<S> sum_exponentials(const S* x, int64_t n, Acc<S> shift) {
  using V = Vec<Acc<S>>;
  V sum{}, second{};
  int64_t i = 0;
  for (; i + 2 * kLanes<S> <= n; i += 2 * kLanes<S>) {
    sum += vexp(vload(x + i) - splat(shift));
    second += vexp(vload(x + i + kLanes<S>) - splat(shift));
  }
  for (; i + kLanes<S> <= n; i += kLanes<S>) sum += vexp(vload(x + i) - splat(shift));
  if (i < n)
    second += vexp(load_tail(x + i, n - i, minus_infinity<Acc<S>>()) - splat(shift));  // at most 1.7e-38 a lane
  return sum_lanes(V(sum + second));
}

template <class S>
void add_row(const CandidatesParams<S>& p, int64_t sentence, int64_t beam, BestCandidates<Acc<S>>& best) {
  using A = Acc<S>;
  const int64_t row = sentence * p.beams + beam, V = p.vocab;
  const S* const x = p.logits + row * V;
  const int64_t least = kBlockVectors * kLanes<S>, even = (V + kMostBlocks - 1) / kMostBlocks;
  const int64_t block = even > least ? even : least, blocks = (V + block - 1) / block;
  const auto width = [&](int64_t k) { return V - k * block < block ? V - k * block : block; };

  A tops[kMostBlocks], top = minus_infinity<A>(), sum = 0;
  for (int64_t k = 0; k < blocks; ++k) {
    tops[k] = largest(x + k * block, width(k));
    top = tops[k] > top ? tops[k] : top;
  }
  for (int64_t k = 0; k < blocks; ++k) sum += sum_exponentials(x + k * block, width(k), top);
  const A log_sum = static_cast<A>(std::log(static_cast<double>(sum))), score = p.scores ? p.scores[row] : A(0);
  const auto total = [&](A logit) { return score + ((logit - top) - log_sum); };

  const ForbiddenColumns forbidden = forbidden_columns(p, row);
  for (int64_t k = 0; k < blocks; ++k) {
    if (!best.admits(total(tops[k]))) continue;
    for (int64_t v = k * block; v < k * block + width(k); ++v) {
      A candidate = total(load(x[v]));
      if (!best.admits(candidate)) continue;
      if (forbidden.holds(v)) candidate = minus_infinity<A>();
      if (best.admits(candidate)) best.add(candidate, beam, v);
    }
  }
}

// Sentences [begin, end). Places past the K * V continuations hold -inf, beam 0, token 0.
template <class S>
void candidates(const CandidatesParams<S>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b * p.count;
    BestCandidates<Acc<S>> best{p.count, 0, p.totals + at, p.parents + at, p.tokens + at};
    for (int64_t beam = 0; beam < p.beams; ++beam) add_row(p, b, beam, best);
    while (best.filled < p.count) best.add(minus_infinity<Acc<S>>(), 0, 0);
  }
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
