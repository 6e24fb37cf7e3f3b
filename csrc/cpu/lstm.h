// What the kernels of one LSTM layer are given. S: storage type, Acc<S>: the type computed in.
//
// A layer has D = 1 or 2 directions over the same input. Per-step tensors of the layer hold both, side by side.
#pragma once

#include <cstdint>

#include "sequences.h"
#include "storage.h"
#include "team.h"

namespace fastseq {

// Rows of one block, at most: their states stay in the L1 and L2 cache.
constexpr int64_t kBlockRows = 64;
// Rows of the input gradient that one panel of W_ih is used for before the next one comes.
constexpr int64_t kInputGradientRows = 48;
// Input rows whose products with W_ih are computed in one go, at most.
constexpr int64_t kChunkRows = 256;
// Up to this batch size the rows of W are read where they lie, and not packed: each is needed only a few times a step.
constexpr int64_t kFewRows = 4;

// What both passes are given of a direction and of the layer.
template <class S>
struct LstmDirection {
  bool reverse;
  const S* weight_ih;  // (4H, I)
  const S* weight_hh;  // (4H, H)
  const S *h0, *c0;    // (B, H)
};

template <class S>
struct LstmLayer {
  Sequences seq;
  int64_t input_size, hidden, directions;  // I, H, D
  const S* input;                          // (rows, I)
  int64_t blocks;                          // the batch is shared out as that many blocks
};

template <class S>
struct LstmForwardDirection : LstmDirection<S> {
  const void* packed_ih;  // by pack_gates, or null: the rows of weight_ih are read
  const void* packed_hh;  // by pack_gates, or null: the rows of weight_hh are read
  const Acc<S>* bias;     // (4H,) b_ih + b_hh
  S *h_n, *c_n;           // (B, H)
};

template <class S>
struct LstmForward : LstmLayer<S> {
  S* output;            // (rows, D * H)
  S* activations;       // (rows, D * 4H) or null
  Acc<S>* cell_states;  // (rows, D * H) or null
  LstmForwardDirection<S> direction[2];
  int64_t chunk_rows;  // block rows .. kChunkRows
};

template <class S>
struct LstmBackwardDirection : LstmDirection<S> {
  void* packed_ih;               // W_ih by pack_columns, or null if grad_input is not needed
  void* packed_hh;               // W_hh by pack_columns
  const S *grad_h_n, *grad_c_n;  // (B, H) or null
  S *grad_h0, *grad_c0;          // (B, H)
  Acc<S>* sums_ih;               // (4H, I) gradient of W_ih, before it is rounded
  Acc<S>* sums_hh;               // (4H, H) gradient of W_hh, likewise
  S* grad_bias;                  // (4H,)
  void* grad_gates;              // (rows, gates_stride) operands, scratch
  void* hidden_states;           // (rows + B, H) operands, scratch: h of every step, then h0
};

template <class S>
struct LstmBackward : LstmLayer<S> {
  const S* grad_output;       // (rows, D * H) or null
  const S* grad_cell_states;  // (rows, D * H) or null
  const S* activations;       // (rows, D * 4H)
  const Acc<S>* cell_states;  // (rows, D * H)
  S* grad_input;              // (rows, I) or null
  LstmBackwardDirection<S> direction[2];
  int64_t gates_stride;  // elements between rows of grad_gates
};

// The steps of all sequences, in no matter what order, and the hidden state that each started from.
struct ValidRows {
  int64_t count;
  const int64_t* position;     // (count,) rows of per-step tensors
  const int64_t* previous[2];  // (count,) per direction: rows of hidden_states
};

}  // namespace fastseq
