// Parameters of the pointwise LSTM cell on the GPU. No CUDA header, no torch.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/common/types.h"

namespace fastseq::cuda {

// acc: float; double if the tensors are double.
struct CellForwardParams {
  int64_t batch, hidden;
  const void* gates;  // (B, 4H) pre-activations, order i f g o
  const void* c;      // (B, H)
  void* h;            // (B, H)
  void* c_n;          // (B, H)
  void* activations;  // (B, 4H) acc
};

struct CellBackwardParams {
  int64_t batch, hidden;
  const void* activations;  // (B, 4H) acc
  const void* c;            // (B, H)
  const void* c_n;          // (B, H)
  const void* grad_h;       // (B, H) or null
  const void* grad_c_n;     // (B, H) or null
  void* grad_gates;         // (B, 4H)
  void* grad_c;             // (B, H)
};

// Each returns the error, or "".
std::string launch_lstm_cell_forward(const CellForwardParams& p, Type type, Stream stream);
std::string launch_lstm_cell_backward(const CellBackwardParams& p, Type type, Stream stream);

// Returns why the current device cannot run the library's kernels, or "". Checks the smallest kernel.
std::string device_problem();

}  // namespace fastseq::cuda
