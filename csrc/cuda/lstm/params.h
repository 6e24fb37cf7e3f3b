// Parameters and plans of the recurrence of one LSTM layer on the GPU. No CUDA header, no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "cuda/common/types.h"

namespace fastseq::cuda {

// A layer of D directions; with two, the second is reversed. All tensors are contiguous and 16-byte aligned.
struct LstmShape {
  int64_t steps, batch, directions, hidden;  // T, B, D, H
  const int64_t* lengths;                    // (B,) on the device, or null: all T
  bool reverse;                              // a single direction is reversed
  bool tf32;                                 // products of floats may be rounded to TF32
  int64_t output_columns() const { return directions * hidden; }
  bool backwards(int64_t direction) const { return directions == 2 ? direction == 1 : reverse; }
};

struct LstmForwardParams {
  LstmShape shape;
  const void* gates;      // (T, B, D, 4H) = x W_ih^T + b, order i f g o
  const void* h0;         // (D, B, H)
  const void* c0;         // (D, B, H)
  const void* weight_hh;  // (D, 4H, H)
  void* output;           // (T, B, D, H), zero past the lengths
  void* h_n;              // (D, B, H)
  void* c_n;              // (D, B, H)
  void* activations;      // (T, B, D, 4H) or null; past the lengths: not written
  float* cell_states;     // (T, B, D, H) or null; past the lengths: not written
  void* workspace;        // LstmPlan::workspace bytes, zero
};

struct LstmBackwardParams {
  LstmShape shape;
  const void* grad_output;       // (T, B, D, H) or null
  const void* grad_h_n;          // (D, B, H) or null
  const void* grad_c_n;          // (D, B, H) or null
  const void* grad_cell_states;  // (T, B, D, H) or null
  const void* activations;       // (T, B, D, 4H)
  const float* cell_states;      // (T, B, D, H)
  const void* c0;                // (D, B, H)
  const void* weight_hh;         // (D, 4H, H)
  void* grad_gates;              // (T, B, D, 4H), zero past the lengths
  void* grad_h0;                 // (D, B, H)
  void* grad_c0;                 // (D, B, H)
  void* workspace;               // LstmPlan::workspace bytes, zero
};

// How one kernel runs a recurrence of some shape on the current device. P: LstmForwardParams or LstmBackwardParams.
template <class P>
struct LstmPlan {
  size_t workspace;                                     // bytes of P::workspace
  std::function<std::string(const P&, Stream)> launch;  // returns the error, or an empty string
};

// Each returns the plan of its kernel, or nothing where the kernel does not fit the device.
//
// Grid: it spans the device, a block for some hidden units, h exchanged through L2 (grid_*.cuh).
std::optional<LstmPlan<LstmForwardParams>> plan_lstm_grid_forward(const LstmShape& s, Type type);
std::optional<LstmPlan<LstmBackwardParams>> plan_lstm_grid_backward(const LstmShape& s, Type type);

// Cluster: one for a tile of the batch, h exchanged through distributed shared memory (cluster_*.cuh). sm_90 and up.
std::optional<LstmPlan<LstmForwardParams>> plan_lstm_cluster_forward(const LstmShape& s, Type type);
std::optional<LstmPlan<LstmBackwardParams>> plan_lstm_cluster_backward(const LstmShape& s, Type type);

}  // namespace fastseq::cuda
