// Parameters of the LSTM kernels, for one layer. S: storage type; Acc<S>: type of the arithmetic.
//
// A layer has D = 1 or 2 directions over the same input. Per-step tensors of the layer hold both, side by side.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/kernels/row_weight.h"
#include "cpu/runtime/sequences.h"
#include "cpu/runtime/storage.h"

namespace fastseq::cpu {

// Largest number of rows in one block: their states stay in the L1 and L2 cache.
constexpr int64_t kBlockRows = 64;
// Rows of the input gradient that are computed with one panel of W_ih before the next panel is read.
constexpr int64_t kInputGradientRows = 48;
// Largest number of input rows that are multiplied with W_ih in one chunk.
constexpr int64_t kChunkRows = 256;
// Steps of all sequences that one chunk of the weight gradients covers on every instruction set; some cover more.
constexpr int64_t kGradientChunk = 512;
// float and double: sums need no wider type than the tensors.
template <class S>
constexpr bool kIsSummedInPlace = std::is_same_v<S, Acc<S>>;

// True if the transpose of W_ih (4H, 1) is one row, which the gradient of the input then reads in place, not packed.
template <class S>
constexpr bool is_one_row(int64_t input_size) {
  return kIsSummedInPlace<S> && input_size == 1;
}

// Largest skinny batch of any instruction set; see Kernels::skinny_rows.
constexpr int kSkinnyRows = 4;

// Fields of both passes: one direction, and the layer.
template <class S>
struct LstmDirection {
  bool reverse;
  const S* weight_ih;  // (4H, I)
  const S* weight_hh;  // (4H, P)
  const S* weight_hr;  // (P, H) projection, or null: P = H
  const S *h0, *c0;    // (B, P), (B, H)
};

template <class S>
struct LstmLayerParams {
  Sequences seq;
  int64_t input_size, hidden, outputs, directions;  // I, H, P, D
  bool projected;                                   // h = W_hr (o tanh(c)); else P = H
  int64_t saved;   // elements of a row and direction in `activations`: 4H gates, then h if projected
  const S* input;  // (rows, I)
  int64_t blocks;  // number of blocks that the batch is divided into
};

// A weight (4H, K) of the forward.
template <class S>
struct GateWeight : RowWeight<S> {
  const void* packed;  // by pack_gates, or null: rows are read in place
};

template <class S>
struct LstmForwardDirection : LstmDirection<S> {
  GateWeight<S> ih, hh;   // W_ih, W_hh
  const void* packed_hr;  // W_hr by pack_rows, or null: rows are read in place
  const Acc<S>* bias;     // (4H,) b_ih + b_hh
  S *h_n, *c_n;           // (B, P), (B, H)
};

template <class S>
struct LstmForwardParams : LstmLayerParams<S> {
  S* output;            // (rows, D * P)
  S* activations;       // (rows, D * saved) or null
  Acc<S>* cell_states;  // (rows, D * H) or null
  LstmForwardDirection<S> direction[2];
  int64_t chunk_rows;  // block rows .. kChunkRows
};

template <class S>
struct LstmBackwardDirection : LstmDirection<S> {
  void* packed_ih;               // W_ih by pack_columns, or null if grad_input is not needed
  void* packed_hh;               // W_hh by pack_columns
  void* packed_hr;               // W_hr by pack_columns
  const S *grad_h_n, *grad_c_n;  // (B, P), (B, H) or null
  S *grad_h0, *grad_c0;          // (B, P), (B, H)
  S *grad_ih, *grad_hh;          // (4H, I), (4H, P) gradients of the weights
  S* grad_hr;                    // (P, H)
  Acc<S>* sums_ih;               // (4H, I) gradient of W_ih before rounding; see Factor
  Acc<S>* sums_hh;               // (4H, P) gradient of W_hh before rounding
  Acc<S>* sums_hr;               // (P, H) gradient of W_hr before rounding
  S* grad_bias;                  // (4H,)
  void* grad_gates;              // (rows, gates_stride) operands, scratch
  void* hidden_states;           // (rows + B, P) operands, scratch: h of every step, then h0
  void* grad_hidden;             // (rows, hidden_stride) operands, scratch, if projected: gradients of h
  void* unprojected;             // (rows, H) operands, scratch, if projected: o tanh(c)
};

template <class S>
struct LstmBackwardParams : LstmLayerParams<S> {
  const S* grad_output;       // (rows, D * P) or null
  const S* grad_cell_states;  // (rows, D * H) or null
  const S* activations;       // (rows, D * saved)
  const Acc<S>* cell_states;  // (rows, D * H)
  S* grad_input;              // (rows, I) or null
  LstmBackwardDirection<S> direction[2];
  int64_t gates_stride;   // elements between rows of grad_gates
  int64_t hidden_stride;  // elements between rows of grad_hidden
};

}  // namespace fastseq::cpu
