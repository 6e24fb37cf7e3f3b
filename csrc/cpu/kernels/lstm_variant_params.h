// Parameters of the LSTM variants: one direction of a layer, whose product with W_ih is given. S: storage type; Acc<S>:
// type of the arithmetic. Per-step tensors are (T, B, ...).
#pragma once

#include <cstdint>

#include "cpu/kernels/lstm_params.h"
#include "cpu/runtime/sequences.h"
#include "cpu/runtime/storage.h"

namespace fastseq::cpu {

// Added to a variance, as in torch.nn.LayerNorm.
constexpr double kNormEpsilon = 1e-5;
// Statistics of a row at a step: 1 / deviation of W_hh h; mean and 1 / deviation of c.
constexpr int64_t kStatistics = 3;

// Share of its old value that a state keeps over a step: a mask, else a rate.
template <class S>
struct Zoneout {
  const uint8_t* keep;  // (T, B, H), 1 where the old value stays, or null
  Acc<S> rate;          // 0..1, used without a mask
};

template <class S>
struct LstmVariantParams {
  Sequences seq;
  int64_t hidden, blocks;  // H; number of blocks that the batch is divided into
  bool reverse;
  const S* c0;                              // (B, H)
  const S *norm_hh, *norm_c, *norm_c_bias;  // (4H,), (H,), (H,), or all null
  const Acc<S>* hidden_mask;                // (B, H) or null
  Zoneout<S> zoneout_h, zoneout_c;
};

template <class S>
struct LstmVariantForwardParams : LstmVariantParams<S> {
  const S* gates;         // (T, B, 4H)
  const S* h0;            // (B, H)
  GateWeight<S> hh;       // (4H, H)
  S *output, *h_n, *c_n;  // (T, B, H), (B, H), (B, H)
  Acc<S>* cell_states;    // (T, B, H) or null
  S* activations;         // (T, B, 4H) or null; the next three then, too
  S* operands;            // (T, B, H) the masked h before each step
  S* normal;              // (T, B, 4H) normalised W_hh h, or null without norms
  Acc<S>* statistics;     // (T, B, kStatistics), or null without norms
};

template <class S>
struct LstmVariantBackwardParams : LstmVariantParams<S> {
  const void* packed_hh;                    // W_hh by pack_columns
  const S *grad_output, *grad_cell_states;  // (T, B, H) or null
  const S *grad_h_n, *grad_c_n;             // (B, H) or null
  const Acc<S>* cell_states;                // (T, B, H)
  const S *activations, *normal;            // as in the forward
  const Acc<S>* statistics;
  S* grad_gates;         // (T, B, 4H)
  S* grad_products;      // (T, B, 4H) gradient of W_hh h; null without norms, where it is grad_gates
  S *grad_h0, *grad_c0;  // (B, H)
  Acc<S>* grad_norms;    // (blocks, 6H) partial sums of norm_hh, norm_c, norm_c_bias, zeros at first; or null
};

}  // namespace fastseq::cpu
