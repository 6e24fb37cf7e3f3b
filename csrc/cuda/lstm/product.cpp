// Operators tf32_product and tf32_products_available: the products of a float32 layer at the precision of cuDNN's RNNs.
#include "cuda/common/cublas.h"
#include "cuda/common/operators.h"

namespace fastseq::cuda {
namespace {

Tensor tf32_product_cuda(Tensor a, Tensor b, OptionalTensor bias, bool transpose_a, bool transpose_b) {
  const char* op = "tf32_product";
  check_rank(op, "a", a, 2, "(M, K), or (K, M) if transposed");
  check_rank(op, "b", b, 2, "(K, N), or (N, K) if transposed");
  const int64_t M = a.size(transpose_a), K = a.size(!transpose_a), N = b.size(!transpose_b);
  check_like(op, "a", a, transpose_a ? Shape{K, M} : Shape{M, K}, ScalarType::Float, a);
  check_like(op, "b", b, transpose_b ? Shape{N, K} : Shape{K, N}, ScalarType::Float, a);
  check_like(op, "bias", bias, {N}, ScalarType::Float, a);

  const OnDeviceOf device(a);
  Tensor out = empty(a, {M, N}, ScalarType::Float);
  if (bias) torch::stable::copy_(out, *bias);
  if (M * N * K == 0) return bias ? out : torch::stable::zero_(out);
  check_launch(op, run_tf32_product({.m = M,
                                     .n = N,
                                     .k = K,
                                     .transpose_a = transpose_a,
                                     .transpose_b = transpose_b,
                                     .a = static_cast<const float*>(read(a)),
                                     .b = static_cast<const float*>(read(b)),
                                     .beta = bias ? 1.0f : 0.0f,
                                     .out = static_cast<float*>(write(out))}));
  return out;
}

}  // namespace
}  // namespace fastseq::cuda

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_LIBRARY, FASTSEQ_DISPATCH, m) {
  m.impl("tf32_product", TORCH_BOX(&fastseq::cuda::tf32_product_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("tf32_products_available", TORCH_BOX(&fastseq::cuda::tf32_products_available));
}
