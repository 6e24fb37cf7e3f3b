// Where the steps of every sequence of a call lie, in either layout, and how its rows are shared out.
#pragma once

#include <cstdint>

namespace fastseq {

// Row (t, b) of a per-step tensor is offset[t] + b: (T, B) padded, or (N,) packed.
struct Sequences {
  int64_t steps;           // T
  int64_t batch;           // B
  int64_t rows;            // T * B, or N
  bool packed;             // no rows past the end of a sequence
  const int64_t* offset;   // (T,)
  const int64_t* lengths;  // (B,) valid steps, 0 .. T
  const int64_t* order;    // (B,) sequences, longest first
};

// The sequences order[index], order[index + blocks], ... that one thread or team runs together, so that every block has
// long and short ones. Longest first: those that still run after some steps are a prefix.
struct Block {
  const Sequences& seq;
  bool reverse;  // every sequence from its last valid step to its first
  int64_t index, blocks;

  int64_t rows() const { return seq.batch <= index ? 0 : (seq.batch - index + blocks - 1) / blocks; }
  int64_t sequence(int64_t row) const { return seq.order[index + row * blocks]; }
  int64_t length(int64_t row) const { return seq.lengths[sequence(row)]; }

  // How many rows, of the first `candidates`, have more than `step` steps.
  int64_t running(int64_t step, int64_t candidates) const {
    while (candidates > 0 && length(candidates - 1) <= step) --candidates;
    return candidates;
  }

  // Where the step-th step, in the order of processing, of a row lies.
  int64_t position(int64_t row, int64_t step) const {
    const int64_t t = reverse ? length(row) - 1 - step : step;
    return seq.offset[t] + sequence(row);
  }
};

}  // namespace fastseq
