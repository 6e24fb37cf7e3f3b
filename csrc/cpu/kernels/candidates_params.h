// Parameters of the candidates kernel. S: storage type; Acc<S>: type of the arithmetic.
#pragma once

#include <cstdint>

#include "cpu/runtime/storage.h"

namespace fastseq::cpu {

template <class S>
struct CandidatesParams {
  int64_t beams, vocab, count;  // K, V, C
  const S* logits;              // (B * K, V)
  const Acc<S>* scores;         // (B, K), or null for zeros
  const int64_t* forbidden;     // (F,) or (B * K, F) columns; values outside 0 .. V - 1 forbid nothing
  int64_t forbidden_count;      // F
  int64_t forbidden_stride;     // between rows of forbidden: 0 or F
  int64_t last_resort;          // column that is allowed in a row where every column is forbidden; -1: none
  Acc<S>* totals;               // (B, C)
  int64_t* parents;             // (B, C)
  int64_t* tokens;              // (B, C)
};

}  // namespace fastseq::cpu
