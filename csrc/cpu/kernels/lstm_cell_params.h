// Parameters of the kernels of one LSTM step. S: storage type; Acc<S>: type of the arithmetic.
#pragma once

#include <cstdint>

#include "cpu/kernels/row_weight.h"
#include "cpu/runtime/storage.h"

namespace fastseq::cpu {

template <class S>
struct LstmCellForwardParams {
  int64_t hidden;       // H
  const S* gates;       // (B, 4H) pre-activations, order i f g o
  const S* c;           // (B, H)
  S* h;                 // (B, H)
  S* c_n;               // (B, H)
  Acc<S>* activations;  // (B, 4H) gates after sigmoid and tanh
};

template <class S>
struct LstmCellBackwardParams {
  int64_t hidden;             // H
  const Acc<S>* activations;  // (B, 4H)
  const S* c;                 // (B, H) cell state before the step
  const S* c_n;               // (B, H) cell state after the step
  const S* grad_h;            // (B, H) or null
  const S* grad_c_n;          // (B, H) or null
  S* grad_gates;              // (B, 4H)
  S* grad_c;                  // (B, H)
};

// One step including both products, for inference: gates = x W_ih^T + b_ih + h W_hh^T + b_hh.
template <class S>
struct LstmStepParams {
  int64_t batch, input_size, hidden;  // B, I, H
  const S* input;                     // (B, I)
  const S *h, *c;                     // (B, H)
  RowWeight<S> weight_ih;             // (4H, I)
  RowWeight<S> weight_hh;             // (4H, H)
  const S* bias_ih;                   // (4H,), (B, 4H) or null
  int64_t bias_stride;                // between rows of bias_ih: 0 or 4H
  const S* bias_hh;                   // (4H,) or null
  S *h_n, *c_n;                       // (B, H)
};

// output = input W^T + bias of a skinny batch, with rows of W read in place.
template <class S>
struct LinearParams {
  int64_t batch, input_size, output_size;  // B, K, N
  const S* input;                          // (B, K)
  RowWeight<S> weight;                     // (N, K)
  const S* bias;                           // (N,) or null
  S* output;                               // (B, N)
};

}  // namespace fastseq::cpu
