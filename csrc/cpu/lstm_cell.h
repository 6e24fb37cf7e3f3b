// Kernels of one LSTM step, element by element. S: storage type, Acc<S>: the type computed in.
#pragma once

#include <cstdint>

#include "storage.h"

namespace fastseq {

template <class S>
struct CellForward {
  int64_t hidden;       // H
  const S* gates;       // (B, 4H) pre-activations, order i f g o
  const S* c;           // (B, H)
  S* h;                 // (B, H)
  S* c_n;               // (B, H)
  Acc<S>* activations;  // (B, 4H) gates after sigmoid and tanh
};

template <class S>
struct CellBackward {
  int64_t hidden;             // H
  const Acc<S>* activations;  // (B, 4H)
  const S* c;                 // (B, H) cell state before the step
  const S* c_n;               // (B, H) and after it
  const S* grad_h;            // (B, H) or null
  const S* grad_c_n;          // (B, H) or null
  S* grad_gates;              // (B, 4H)
  S* grad_c;                  // (B, H)
};

}  // namespace fastseq
