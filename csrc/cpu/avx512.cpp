// The AVX-512 instantiation of every CPU kernel.
#include "region.h"

#if FASTSEQ_X86

#define FASTSEQ_ISA avx512
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_BF16_DOT 0

FASTSEQ_REGION_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")

#include "kernels.inc"

namespace fastseq {
namespace avx512 {
template Kernels<float> make_kernels();
template Kernels<double> make_kernels();
template Kernels<BFloat16> make_kernels();
template Kernels<Half> make_kernels();
}  // namespace avx512
}  // namespace fastseq

FASTSEQ_REGION_END

#endif
