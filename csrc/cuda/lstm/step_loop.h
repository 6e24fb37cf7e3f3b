// The loop over the steps of one direction: products by torch, cells by the kernels of steps.cuh.
#pragma once

#include "cuda/common/operators.h"
#include "cuda/lstm/params.h"

namespace fastseq::cuda {

// Tensors of the parameters of the same name.
void run_lstm_forward_steps(const char* op,
                            const LstmForwardParams& p,
                            Type type,
                            const Tensor& h0,
                            const Tensor& c0,
                            const Tensor& weight_hh,
                            Tensor h_n,
                            Tensor c_n,
                            Stream stream);

void run_lstm_backward_steps(const char* op,
                             const LstmBackwardParams& p,
                             Type type,
                             const OptionalTensor& grad_h_n,
                             const OptionalTensor& grad_c_n,
                             const Tensor& weight_hh,
                             const Tensor& grad_gates,
                             Stream stream);

}  // namespace fastseq::cuda
