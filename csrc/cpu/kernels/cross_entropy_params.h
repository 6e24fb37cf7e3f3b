// Parameters of the softmax cross-entropy kernel. S: storage type of the logits; Acc<S>: type of the arithmetic.
#pragma once

#include <cstdint>

#include "cpu/runtime/storage.h"

namespace fastseq::cpu {

// Rows that one task computes, one after the other: their gradients are summed into one row of bias_sums.
constexpr int64_t kCrossEntropyRows = 32;

template <class S>
struct CrossEntropyParams {
  int64_t rows, classes;  // R, V
  S* logits;              // (R, V); replaced by the gradients if `gradients`
  const int64_t* target;  // (R,) in [0, V)
  Acc<S> smoothing;       // label smoothing s
  bool gradients;
  bool has_statistics;  // read peak and log_total instead of computing them, and the losses
  Acc<S>* peak;         // (R,) largest logit
  Acc<S>* log_total;    // (R,) log of the sum of exp(logit - peak)
  Acc<S>* losses;       // (R,), null if has_statistics
  const Acc<S>* scale;  // (R,) factors of the gradients, or null for 1
  Acc<S>* bias_sums;    // (R / kCrossEntropyRows rounded up, V) sums of the gradients, or null
};

}  // namespace fastseq::cpu
