// Parameters of one decoding step on the GPU: both products and the cell. No CUDA header, no torch.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/common/types.h"

namespace fastseq::cuda {

struct StepParams {
  int64_t batch, input_size, hidden;  // B, I, H
  bool narrow;                        // float tensors with bfloat16 weights
  int64_t bias_stride;                // row stride of bias_ih: 4H, or 0 for (4H,)
  const void* input;                  // (B, I)
  const void* h;                      // (B, H)
  const void* c;                      // (B, H)
  const void* weight_ih;              // (4H, I), order i f g o
  const void* weight_hh;              // (4H, H)
  const void* bias_ih;                // (4H,) or (B, 4H), or null
  const void* bias_hh;                // (4H,) or null
  void* h_n;                          // (B, H)
  void* c_n;                          // (B, H)
};

// Returns the error, or "".
std::string launch_lstm_step(const StepParams& p, Type type, Stream stream);

}  // namespace fastseq::cuda
