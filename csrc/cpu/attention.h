// Kernels of attention, one sentence at a time. S: storage type, Acc<S>: the type computed in.
//
//   score(t, s) = scale * sum_a weight[a] * tanh(query[t][a] + bias[a] + keys[s][a])     or  scale * query[t] . keys[s]
//   weights = softmax of the scores over the positions that step t attends to            context = weights * values
#pragma once

#include <cstdint>

#include "storage.h"

namespace fastseq {

// (B, rows, columns) at any strides, counted in elements. Without data: not given.
template <class T>
struct Strided {
  T* data;
  int64_t batch, row, column;
};

template <class S>
struct AttentionInputs {
  int64_t steps, positions, size, width;  // T, S, A, D
  Strided<const S> query;                 // (B, T, A)
  Strided<const S> keys;                  // (B, S, A)
  Strided<const S> values;                // (B, S, D)
  const S* weight;                        // (A,) of the additive score, or null for the dot score
  const S* bias;                          // (A,) or null
  const int64_t* lengths;                 // (B,), taken as clamped to 0 .. S, or null
  Strided<const bool> mask;               // (B, T, S), true = attend; row stride 0 where all steps have the same
  const Acc<S>* prepared;                 // (B, S, prepared_columns(A)) of the additive score's keys, or null
  Acc<S> scale;
};

template <class S>
struct AttentionForward {
  AttentionInputs<S> in;
  S* context;       // (B, T, D)
  Acc<S>* weights;  // (B, T, S) or null
};

template <class S>
struct AttentionBackward {
  AttentionInputs<S> in;
  const Acc<S>* weights;          // (B, T, S)
  Strided<const S> grad_context;  // (B, T, D)
  Strided<const S> grad_weights;  // (B, T, S), or not given
  bool need_scores, need_values;  // what to compute: the next four; grad_values
  S* grad_query;                  // (B, T, A)
  S* grad_keys;                   // (B, S, A)
  Acc<S>* grad_weight;            // (B, whole_columns(A)), a row per sentence; additive score only
  Acc<S>* grad_bias;              // (B, whole_columns(A)), a row per sentence; additive score only
  S* grad_values;                 // (B, S, D)
};

template <class S>
struct AttentionPrepare {
  AttentionInputs<S> in;  // keys, lengths
  Acc<S>* prepared;       // (B, S, prepared_columns(A))
};

// Columns of a row in whole vectors of every instruction set.
constexpr int64_t whole_columns(int64_t columns) { return (columns + 15) / 16 * 16; }

// Columns of a row in scratch memory: an odd number of cache lines, so that a column of a matrix is spread over the
// sets of the cache.
constexpr int64_t spread_columns(int64_t columns) { return whole_columns(columns) | 16; }

// A prepared key: a function of k in whole vectors, then which one it is.
constexpr int64_t prepared_columns(int64_t size) { return whole_columns(size) + 16; }

// Keys that are prepared and used at a time.
constexpr int64_t kKeyBlock = 128;

// Bytes of scratch memory that one sentence takes at most; aligned to 64 bytes by the caller.
template <class S>
int64_t attention_scratch(const AttentionInputs<S>& in) {
  const int64_t a = spread_columns(in.size), d = spread_columns(in.width), s = spread_columns(in.positions);
  const int64_t step = 2 * a + 2 * d + 2 * s, position = 2 * a + 2 * d;
  const int64_t block = (in.positions < kKeyBlock ? in.positions : kKeyBlock) * 2 * a;
  const int64_t elements = in.steps * step + in.positions * position + block + 4 * a;
  return elements * static_cast<int64_t>(sizeof(Acc<S>)) + in.positions * static_cast<int64_t>(sizeof(int64_t)) + 1024;
}

}  // namespace fastseq
