// Row positions of all sequences of a call, padded or packed, and how a batch is divided into blocks.
#pragma once

#include <cstdint>

namespace fastseq::cpu {

// Row (t, b) of a per-step tensor is offset[t] + b, in (T, B) padded or (N,) packed layout.
struct Sequences {
  int64_t steps;           // T
  int64_t batch;           // B
  int64_t rows;            // T * B, or N
  bool packed;             // no rows past the end of a sequence
  const int64_t* offset;   // (T,)
  const int64_t* lengths;  // (B,) valid steps, 0 .. T
  const int64_t* order;    // (B,) sequences, longest first
};

// The sequences order[index], order[index + blocks], ..., which one thread or team runs together. Every block gets long
// and short ones. Its rows are sorted longest first, so the rows still running at any step are a prefix.
struct SequenceBlock {
  const Sequences& seq;
  bool reverse;  // every sequence from its last valid step to its first
  int64_t index, blocks;

  int64_t rows() const { return seq.batch <= index ? 0 : (seq.batch - index + blocks - 1) / blocks; }
  int64_t sequence(int64_t row) const { return seq.order[index + row * blocks]; }
  int64_t length(int64_t row) const { return seq.lengths[sequence(row)]; }

  // Number of rows, of the first `candidates`, with more than `step` steps.
  int64_t running(int64_t step, int64_t candidates) const {
    while (candidates > 0 && length(candidates - 1) <= step) --candidates;
    return candidates;
  }

  // Row of a per-step tensor that holds the step-th processed step of `row`.
  int64_t position(int64_t row, int64_t step) const {
    const int64_t t = reverse ? length(row) - 1 - step : step;
    return seq.offset[t] + sequence(row);
  }
};

// All valid (step, sequence) rows, in any order, and the row of each one's previous hidden state.
struct ValidRows {
  int64_t count;
  const int64_t* position;     // (count,) rows of per-step tensors
  const int64_t* previous[2];  // (count,) per direction: rows of hidden_states
};

}  // namespace fastseq::cpu
