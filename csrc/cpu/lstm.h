// Kernels of one LSTM layer in one direction. S: storage type, Acc<S>: the type computed in.
#pragma once

#include <cstdint>

#include "matmul.h"
#include "storage.h"

namespace fastseq {

// Where the steps of every sequence lie. Row (t, b) of gates and output is offset[t] + b.
struct Sequences {
  int64_t steps;           // T
  int64_t batch;           // B
  int64_t hidden;          // H
  bool packed;             // no rows past the end of a sequence
  bool reverse;            // from the last valid step to the first
  const int64_t* offset;   // (T,)
  const int64_t* lengths;  // (B,) valid steps, 0 .. T
  const int64_t* order;    // (B,) sequences, longest first
  int64_t blocks;          // block k runs the sequences order[k], order[k + blocks], ... together
  int64_t block_rows;      // the most sequences in one block
};

template <class S>
struct LstmForward {
  Sequences seq;
  const S* gates;        // (rows, 4H) x W_ih^T + b_ih + b_hh, order i f g o
  const S* h0;           // (B, H)
  const S* c0;           // (B, H)
  const Acc<S>* weight;  // W_hh^T (H, 4H), packed by pack_panel
  S* output;             // (rows, H), zeros past the length
  S* h_n;                // (B, H)
  S* c_n;                // (B, H)
  Acc<S>* activations;   // (rows, 4H) or null, zeros past the length
  Acc<S>* cell_states;   // (rows, H) or null, zeros past the length
  Acc<S>* scratch;       // (blocks, forward_scratch)
};

template <class S>
struct LstmBackward {
  Sequences seq;
  const S* grad_output;       // (rows, H) or null
  const S* grad_h_n;          // (B, H) or null
  const S* grad_c_n;          // (B, H) or null
  const S* grad_cell_states;  // (rows, H) or null
  const Acc<S>* activations;  // (rows, 4H)
  const Acc<S>* cell_states;  // (rows, H)
  const S* c0;                // (B, H)
  const Acc<S>* weight;       // W_hh (4H, H), packed by pack_panel
  S* grad_gates;              // (rows, 4H), zeros past the length
  S* grad_h0;                 // (B, H)
  S* grad_c0;                 // (B, H)
  Acc<S>* scratch;            // (blocks, backward_scratch)
};

// Elements of Acc<S> that one block needs, forward and backward.
template <class S>
int64_t forward_scratch(const Sequences& seq) {
  return seq.block_rows * (padded<Acc<S>>(4 * seq.hidden) + 2 * seq.hidden);
}
template <class S>
int64_t backward_scratch(const Sequences& seq) {
  return seq.block_rows * (5 * seq.hidden + padded<Acc<S>>(seq.hidden)) + seq.hidden;
}

// One block of sequences, all their steps.
template <class S>
void lstm_forward_block(const LstmForward<S>& p, int64_t block);
template <class S>
void lstm_backward_block(const LstmBackward<S>& p, int64_t block);

}  // namespace fastseq
