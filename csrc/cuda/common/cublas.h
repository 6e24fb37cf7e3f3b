// float32 products by TF32 tensor cores through the cuBLAS that torch has loaded. No CUDA header, no torch.
#pragma once

#include <cstdint>
#include <string>

namespace fastseq::cuda {

// out (M, N) = op(a) op(b) + beta * out, all row-major and contiguous. op transposes if the flag is set: a is (M, K) or
// (K, M), b is (K, N) or (N, K).
struct Product {
  int64_t m, n, k;
  bool transpose_a, transpose_b;
  const float* a;
  const float* b;
  float beta;
  float* out;
};

// True if torch's CUDA build exports its cuBLAS handle and cublasGemmEx is found in this process.
bool tf32_products_available();

// Enqueues the product on the stream of torch's handle, which is the current stream. Returns the error, or "".
std::string run_tf32_product(const Product& p);

}  // namespace fastseq::cuda
