// LSTM kernels with the AVX-512 bfloat16 dot product. All other types, cells and attention use avx512.cpp.
#include "cpu/isa/isa.h"

#if FASTSEQ_X86

#define FASTSEQ_ISA avx512_bf16
#define FASTSEQ_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_BF16_DOT 1

#include "cpu/isa/kernel_table-inl.h"

namespace fastseq::cpu::FASTSEQ_ISA {

template void set_lstm_kernels(Kernels<BFloat16>&);

}  // namespace fastseq::cpu::FASTSEQ_ISA

#endif
