// The recurrence in steps: a product of matrices and a pointwise kernel for each step, where no kernel that runs all
// steps fits the device. One direction. No CUDA header, no torch.
#pragma once

#include <string>

#include "cuda/lstm/params.h"

namespace fastseq::cuda {

// Computes the cells of step `time` and replaces h in p.h_n, c in p.c_n and `c`. Rows past their length keep them.
std::string launch_lstm_forward_step(const LstmForwardParams& p,
                                     int64_t time,
                                     const void* product,  // (B, 4H) = h W_hh^T
                                     float* c,             // (B, H) before the step
                                     Type type,
                                     Stream stream);

// Computes the gradients of the gates of step `time`. carry: dL/dh and dL/dc after the step, without `product`; then
// before it. After the last step, at time = T or -1, it writes grad_h0 and grad_c0.
std::string launch_lstm_backward_step(const LstmBackwardParams& p,
                                      int64_t time,
                                      const void* product,  // (B, H) = dL/dgates W_hh of the step after `time`, or zero
                                      float* carry,         // (2, B, H)
                                      Type type,
                                      Stream stream);

// Modelled microseconds of a step with one product of all rows, forward or backward, on the current device: by
// step_loop.h, or by cuDNN.
double lstm_steps_microseconds(const LstmShape& s, Type type, bool backward);
double lstm_torch_microseconds(const LstmShape& s, Type type, bool backward);

}  // namespace fastseq::cuda
