// AVX-512 kernels (F, BW, DQ, VL).
#include "cpu/isa/isa.h"

#if FASTSEQ_X86

#define FASTSEQ_ISA avx512
#define FASTSEQ_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_BF16_DOT 0

#include "cpu/isa/kernel_table-inl.h"

namespace fastseq::cpu::FASTSEQ_ISA {

template Kernels<float> make_kernels();
template Kernels<double> make_kernels();
template Kernels<BFloat16> make_kernels();
template Kernels<Half> make_kernels();

}  // namespace fastseq::cpu::FASTSEQ_ISA

#endif
