// Runs on any device that torch multiplies on. It is slower than one kernel for all steps: three launches a step.
#include "cuda/lstm/step_loop.h"

#include <array>

#include "cuda/common/cublas.h"
#include "cuda/lstm/steps.h"

namespace fastseq::cuda {
namespace {

// out = a op(b): a (M, K), b (K, N), or (N, K) if transposed. aten::mm.out is not cast under autocast.
void multiply(
    const char* op, const LstmShape& s, Type type, const Tensor& a, const Tensor& b, bool transpose_b, Tensor& out) {
  if (type == Type::kFloat && s.tf32 && tf32_products_available()) {
    return check_launch(op, run_tf32_product({.m = a.size(0),
                                              .n = out.size(1),
                                              .k = a.size(1),
                                              .transpose_a = false,
                                              .transpose_b = transpose_b,
                                              .a = static_cast<const float*>(read(a)),
                                              .b = static_cast<const float*>(read(b)),
                                              .beta = 0,
                                              .out = static_cast<float*>(write(out))}));
  }
  using torch::stable::detail::from;
  const Tensor factor = transpose_b ? torch::stable::transpose(b, 0, 1) : b;
  std::array<StableIValue, 3> stack{from(a), from(factor), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // takes the reference that the call returns
}

Tensor row_of(const Tensor& t, int64_t index) { return torch::stable::select(t, 0, index); }

}  // namespace

void run_lstm_forward_steps(const char* op,
                            const LstmForwardParams& p,
                            Type type,
                            const Tensor& h0,
                            const Tensor& c0,
                            const Tensor& weight_hh,
                            Tensor h_n,
                            Tensor c_n,
                            Stream stream) {
  const LstmShape& s = p.shape;
  Tensor product = empty(h0, {s.batch, 4 * s.hidden}, h0.scalar_type());
  Tensor c = empty(c0, {1, s.batch, s.hidden}, ScalarType::Float);
  torch::stable::copy_(h_n, h0);
  torch::stable::copy_(c_n, c0);
  torch::stable::copy_(c, c0);
  const Tensor h = row_of(h_n, 0), weight = row_of(weight_hh, 0);
  for (int64_t k = 0; k < s.steps; ++k) {
    const int64_t time = s.reverse ? s.steps - 1 - k : k;
    multiply(op, s, type, h, weight, true, product);
    check_launch(op, launch_lstm_forward_step(p, time, read(product), static_cast<float*>(write(c)), type, stream));
  }
}

void run_lstm_backward_steps(const char* op,
                             const LstmBackwardParams& p,
                             Type type,
                             const OptionalTensor& grad_h_n,
                             const OptionalTensor& grad_c_n,
                             const Tensor& weight_hh,
                             const Tensor& grad_gates,
                             Stream stream) {
  const LstmShape& s = p.shape;
  Tensor product = empty(weight_hh, {s.batch, s.hidden}, weight_hh.scalar_type());
  Tensor carry = empty(weight_hh, {2, s.batch, s.hidden}, ScalarType::Float);
  torch::stable::zero_(product);
  torch::stable::zero_(carry);
  Tensor carried_h = row_of(carry, 0), carried_c = row_of(carry, 1);
  if (grad_h_n) torch::stable::copy_(carried_h, row_of(*grad_h_n, 0));
  if (grad_c_n) torch::stable::copy_(carried_c, row_of(*grad_c_n, 0));
  const Tensor weight = row_of(weight_hh, 0);
  for (int64_t k = 0; k <= s.steps; ++k) {  // the last round writes the gradients of the initial states
    const int64_t time = s.reverse ? k : s.steps - 1 - k;
    check_launch(op,
                 launch_lstm_backward_step(p, time, read(product), static_cast<float*>(write(carry)), type, stream));
    if (k < s.steps) multiply(op, s, type, row_of(grad_gates, time), weight, false, product);
  }
}

}  // namespace fastseq::cuda
