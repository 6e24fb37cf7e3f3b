// Portable kernels: 16-byte vectors, which the compiler maps to the target's own instructions.
#define FASTSEQ_ISA baseline
#define FASTSEQ_VECTOR_BYTES 16
#define FASTSEQ_BF16_DOT 0

#include "cpu/isa/kernel_table-inl.h"

namespace fastseq::cpu::FASTSEQ_ISA {

template Kernels<float> make_kernels();
template Kernels<double> make_kernels();
template Kernels<BFloat16> make_kernels();
template Kernels<Half> make_kernels();

}  // namespace fastseq::cpu::FASTSEQ_ISA
