// One kernel source, one instantiation per instruction set, chosen at run time. See region.h.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTSEQ_X86 1
#else
#define FASTSEQ_X86 0
#endif

namespace fastseq {

// kAvx512Bf16 differs from kAvx512 in the bfloat16 kernels only.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The widest instruction set of this machine that kernels are built for, or the one that $FASTSEQ_CPU_ISA lowers it to.
Isa machine_isa();

const char* isa_name(Isa isa);

// Whether $FASTSEQ_CPU_ISA is unset, empty or a known name.
bool requested_isa_is_known();

}  // namespace fastseq
