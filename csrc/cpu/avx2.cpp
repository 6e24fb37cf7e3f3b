// The AVX2 and FMA instantiation of every CPU kernel.
#include "region.h"

#if FASTSEQ_X86

#define FASTSEQ_ISA avx2
#define FASTSEQ_VECTOR_BYTES 32
#define FASTSEQ_BF16_DOT 0

FASTSEQ_REGION_BEGIN("avx2,fma")

#include "kernels.inc"

namespace fastseq {
namespace avx2 {
template Kernels<float> make_kernels();
template Kernels<double> make_kernels();
template Kernels<BFloat16> make_kernels();
template Kernels<Half> make_kernels();
}  // namespace avx2
}  // namespace fastseq

FASTSEQ_REGION_END

#endif
