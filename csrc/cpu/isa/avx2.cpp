// AVX2, FMA and F16C kernels.
#include "cpu/isa/isa.h"

#if FASTSEQ_X86

#define FASTSEQ_ISA avx2
#define FASTSEQ_TARGET "avx2,fma,f16c"
#define FASTSEQ_VECTOR_BYTES 32
#define FASTSEQ_BF16_DOT 0

#include "cpu/isa/kernel_table-inl.h"

namespace fastseq::cpu::FASTSEQ_ISA {

template Kernels<float> make_kernels();
template Kernels<double> make_kernels();
template Kernels<BFloat16> make_kernels();
template Kernels<Half> make_kernels();

}  // namespace fastseq::cpu::FASTSEQ_ISA

#endif
