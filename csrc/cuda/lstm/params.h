// The recurrence of one LSTM layer on the GPU: what its launchers take. No CUDA header, no torch.
#pragma once

#include <cstddef>
#include <cstdint>
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

struct LstmForward {
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
  void* workspace;        // as many bytes as the launcher asks for, zero
};

struct LstmBackward {
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
  void* workspace;               // likewise
};

// A grid that spans the device: a block for some hidden units, h exchanged through L2 (lstm_grid_*.cuh).
bool lstm_grid_forward_fits(const LstmShape& s, Type type);
size_t lstm_grid_forward_workspace(const LstmShape& s, Type type);
std::string launch_lstm_grid_forward(const LstmForward& p, Type type, Stream stream);

bool lstm_grid_backward_fits(const LstmShape& s, Type type);
size_t lstm_grid_backward_workspace(const LstmShape& s, Type type);
std::string launch_lstm_grid_backward(const LstmBackward& p, Type type, Stream stream);

// A cluster for a tile of the batch: h exchanged through distributed shared memory (lstm_cluster_*.cuh). sm_90 and up.
bool lstm_cluster_forward_fits(const LstmShape& s, Type type);
size_t lstm_cluster_forward_workspace(const LstmShape& s, Type type);
std::string launch_lstm_cluster_forward(const LstmForward& p, Type type, Stream stream);

bool lstm_cluster_backward_fits(const LstmShape& s, Type type);
size_t lstm_cluster_backward_workspace(const LstmShape& s, Type type);
std::string launch_lstm_cluster_backward(const LstmBackward& p, Type type, Stream stream);

}  // namespace fastseq::cuda
