// Parameters and plans of the recurrence of one LSTM layer on the GPU. No CUDA header, no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>

#include "cuda/common/types.h"

namespace fastseq::cuda {

// One layer of D directions; if D = 2, the second is reversed. All tensors are contiguous and 16-byte aligned.
struct LstmShape {
  int64_t steps, batch, directions, hidden;  // T, B, D, H
  const int64_t* lengths;                    // (B,) on the device, or null: every length is T
  bool reverse;                              // D = 1: run from the last step to the first
  bool tf32;                                 // float operands of products may be rounded to TF32
  unsigned spin_limit = 0;                   // SpinLimit::units
  bool beside = false;                       // other recurrences hold the rest of the device
  bool wide_states = false;                  // c0, c_n and the gradients of the initial and final states are float
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
  void* activations;      // (T, B, D, 4H) or null; not written past the lengths
  float* cell_states;     // (T, B, D, H) or null; not written past the lengths
  void* workspace;        // LstmPlan::workspace bytes, zeroed by the caller
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
  void* workspace;               // LstmPlan::workspace bytes, zeroed by the caller
};

// A kernel's plan for one shape on the current device. P: LstmForwardParams or LstmBackwardParams.
template <class P>
struct LstmPlan {
  size_t workspace;     // bytes of P::workspace
  double microseconds;  // of a step, modelled: cost.h
  double share;         // of the device that it holds while it runs: above 1 it runs in rounds
  std::function<Outcome(const P&, Stream)> launch;
};

// Each returns its kernel's plan, or nullopt if the kernel does not fit the device.
//
// Grid: one cooperative grid over the device; blocks split the hidden units and exchange h through L2 (grid_*.cuh).
std::optional<LstmPlan<LstmForwardParams>> plan_lstm_grid_forward(const LstmShape& s, Type type);
std::optional<LstmPlan<LstmBackwardParams>> plan_lstm_grid_backward(const LstmShape& s, Type type);

// Cluster (sm_90 and newer): one thread block cluster per tile of the batch; its blocks exchange h through distributed
// shared memory (cluster_*.cuh).
std::optional<LstmPlan<LstmForwardParams>> plan_lstm_cluster_forward(const LstmShape& s, Type type);
std::optional<LstmPlan<LstmBackwardParams>> plan_lstm_cluster_backward(const LstmShape& s, Type type);

}  // namespace fastseq::cuda
