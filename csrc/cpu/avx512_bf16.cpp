// The bfloat16 kernels with AVX-512's bfloat16 dot product; all other types are served by avx512.cpp.
#include "region.h"

#if FASTSEQ_X86

#define FASTSEQ_ISA avx512_bf16
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_BF16_DOT 1

FASTSEQ_REGION_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

#include "kernels.inc"

namespace fastseq {
namespace avx512_bf16 {
template Kernels<BFloat16> make_kernels();
}  // namespace avx512_bf16
}  // namespace fastseq

FASTSEQ_REGION_END

#endif
