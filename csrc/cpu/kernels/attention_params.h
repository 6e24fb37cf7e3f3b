// Parameters of the attention kernels. S: storage type; Acc<S>: type of the arithmetic. Sentence: one element of B.
//
//   score(t, s) = scale * sum_a weight[a] * tanh(query[t][a] + bias[a] + keys[s][a])     or  scale * query[t] . keys[s]
//   with coverage: + coverage[t][s] * coverage_weight[a] inside the tanh
//   weights = softmax of the scores over the positions that step t attends to            context = weights * values
#pragma once

#include <cstdint>

#include "cpu/runtime/storage.h"

namespace fastseq::cpu {

// A tensor (B, rows, columns) with any strides, in elements. data is null for a tensor that is not given.
template <class T>
struct Strided {
  T* data;
  int64_t batch, row, column;
};

template <class S>
struct AttentionInputParams {
  int64_t steps, positions, size, width;  // T, S, A, D
  Strided<const S> query;                 // (B, T, A)
  Strided<const S> keys;                  // (B, S, A)
  Strided<const S> values;                // (B, S, D)
  const S* weight;                        // (A,) of the additive score, or null for the dot score
  const S* bias;                          // (A,) or null
  const int64_t* lengths;                 // (B,), clamped to 0 .. S by the kernels, or null
  Strided<const bool> mask;               // (B, T, S), true = attend; row stride 0 if all steps share one
  const Acc<S>* prepared;                 // (B, S, prepared_columns(A)) of the additive score's keys, or null
  Acc<S> scale;
  Strided<const S> coverage;  // (B, T, S) of the additive score, or not given
  const S* coverage_weight;   // (A,), with coverage
};

template <class S>
struct AttentionForwardParams {
  AttentionInputParams<S> in;
  S* context;       // (B, T, D)
  Acc<S>* weights;  // (B, T, S) or null
};

template <class S>
struct AttentionBackwardParams {
  AttentionInputParams<S> in;
  const Acc<S>* weights;          // (B, T, S)
  Strided<const S> grad_context;  // (B, T, D)
  Strided<const S> grad_weights;  // (B, T, S), or not given
  bool need_scores;               // compute the next four
  bool need_values;               // compute grad_values
  S* grad_query;                  // (B, T, A)
  S* grad_keys;                   // (B, S, A)
  Acc<S>* grad_weight;            // (B, whole_columns(A)), a row per sentence; additive score only
  Acc<S>* grad_bias;              // (B, whole_columns(A)), a row per sentence; additive score only
  S* grad_values;                 // (B, S, D)
  S* grad_coverage;               // (B, T, S), with coverage
  Acc<S>* grad_coverage_weight;   // (B, whole_columns(A)), a row per sentence, with coverage
};

template <class S>
struct AttentionPrepareParams {
  AttentionInputParams<S> in;  // keys, lengths
  Acc<S>* prepared;            // (B, S, prepared_columns(A))
};

// Columns padded to whole vectors of every instruction set.
constexpr int64_t whole_columns(int64_t columns) { return (columns + 15) / 16 * 16; }

// Columns of a row in scratch memory, padded to an odd number of cache lines: a column of a matrix then spreads over
// all cache sets.
constexpr int64_t spread_columns(int64_t columns) { return whole_columns(columns) | 16; }

// Columns of a prepared key: the function of k in whole vectors, then the number of its TanhMethod.
constexpr int64_t prepared_columns(int64_t size) { return whole_columns(size) + 16; }

// Keys that are prepared and used in one block.
constexpr int64_t kKeyBlock = 128;

// Scratch bytes that one sentence needs at most. The caller aligns the memory to 64 bytes.
template <class S>
int64_t attention_scratch_bytes(const AttentionInputParams<S>& in) {
  const int64_t a = spread_columns(in.size), d = spread_columns(in.width), s = spread_columns(in.positions);
  const int64_t step = 2 * a + 2 * d + 2 * s, position = 2 * a + 2 * d;
  const int64_t block = (in.positions < kKeyBlock ? in.positions : kKeyBlock) * 2 * a;
  const int64_t covered = in.coverage.data ? s + whole_columns(1) * in.positions + 4 * a : 0;
  const int64_t elements = in.steps * step + in.positions * position + block + 4 * a + covered;
  return elements * static_cast<int64_t>(sizeof(Acc<S>)) + in.positions * static_cast<int64_t>(sizeof(int64_t)) + 1024;
}

}  // namespace fastseq::cpu
