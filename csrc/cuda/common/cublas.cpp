// torch's flags for matmul and for cuDNN's RNNs differ by default: full float32 and TF32. The products of an LSTM layer
// follow the second one, as nn.LSTM's do. torch's flag is a global of the process, which other threads read, so it
// stays as it is: these products name their compute type in the call.
#include "cuda/common/cublas.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <limits>

#ifdef FASTSEQ_HOST_DEVICE
#include <cstring>
#else
#include <dlfcn.h>
#endif

namespace fastseq::cuda {

#ifdef FASTSEQ_HOST_DEVICE

namespace {

// The nearest number with 10 bits of mantissa.
float to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

}  // namespace

bool tf32_products_available() { return true; }

std::string run_tf32_product(const Product& p) {
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = 0; j < p.n; ++j) {
      float sum = p.beta == 0 ? 0 : p.beta * p.out[i * p.n + j];
      for (int64_t k = 0; k < p.k; ++k) {
        const float x = p.a[p.transpose_a ? k * p.m + i : i * p.k + k];
        const float y = p.b[p.transpose_b ? j * p.k + k : k * p.n + j];
        sum += to_tf32(x) * to_tf32(y);
      }
      p.out[i * p.n + j] = sum;
    }
  }
  return {};
}

#else

// Defined in libtorch_cuda, which a CPU build of torch lacks.
extern "C" __attribute__((weak)) AOTITorchError torch_get_current_cuda_blas_handle(void**);

namespace {

// cublasGemmEx of the cuBLAS headers, the same in CUDA 11, 12 and 13. Matrices are column-major.
using GemmEx = int (*)(void* handle,
                       int transpose_a,
                       int transpose_b,
                       int m,
                       int n,
                       int k,
                       const void* alpha,
                       const void* a,
                       int a_type,
                       int lda,
                       const void* b,
                       int b_type,
                       int ldb,
                       const void* beta,
                       void* c,
                       int c_type,
                       int ldc,
                       int compute_type,
                       int algorithm);
constexpr int kFloat = 0;              // CUDA_R_32F
constexpr int kFastTf32 = 77;          // CUBLAS_COMPUTE_32F_FAST_TF32
constexpr int kDefaultAlgorithm = -1;  // CUBLAS_GEMM_DEFAULT

// The library is torch's dependency: RTLD_NOLOAD finds it without loading another one.
GemmEx find_gemm() {
  for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11"}) {
    void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (void* symbol = library ? dlsym(library, "cublasGemmEx") : nullptr) return reinterpret_cast<GemmEx>(symbol);
  }
  return nullptr;
}

GemmEx gemm() {
  static const GemmEx found = find_gemm();
  return found;
}

}  // namespace

bool tf32_products_available() { return torch_get_current_cuda_blas_handle && gemm(); }

std::string run_tf32_product(const Product& p) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (std::max({p.m, p.n, p.k}) > kMost) return "a product of more than 2^31 - 1 rows or columns";
  void* handle = nullptr;
  if (torch_get_current_cuda_blas_handle(&handle)) return "torch has no cuBLAS handle";
  // Row-major out = op(a) op(b) is column-major out^T = op(b)^T op(a)^T.
  const float alpha = 1;
  const int m = static_cast<int>(p.m), n = static_cast<int>(p.n), k = static_cast<int>(p.k);
  const int status =
      gemm()(handle, p.transpose_b, p.transpose_a, n, m, k, &alpha, p.b, kFloat, p.transpose_b ? k : n, p.a, kFloat,
             p.transpose_a ? m : k, &p.beta, p.out, kFloat, n, kFastTf32, kDefaultAlgorithm);
  return status ? "cublasGemmEx returned " + std::to_string(status) : "";
}

#endif

}  // namespace fastseq::cuda
