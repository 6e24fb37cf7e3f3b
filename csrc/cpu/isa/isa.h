// Selects the instruction set of the CPU kernels: one kernel source, one instantiation per set, chosen at run time.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTSEQ_X86 1
#else
#define FASTSEQ_X86 0
#endif

namespace fastseq::cpu {

// kAvx512Bf16 differs from kAvx512 in the bfloat16 kernels only.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// True if the library contains kernels for `isa`. FASTSEQ_CPU_KERNELS of setup.py leaves sets out.
constexpr bool is_built(Isa isa) {
#ifdef FASTSEQ_WITHOUT_BASELINE
  if (isa == Isa::kBaseline) return false;
#endif
#ifdef FASTSEQ_WITHOUT_AVX2
  if (isa == Isa::kAvx2) return false;
#endif
#ifdef FASTSEQ_WITHOUT_AVX512
  if (isa == Isa::kAvx512) return false;
#endif
#ifdef FASTSEQ_WITHOUT_AVX512_BF16
  if (isa == Isa::kAvx512Bf16) return false;
#endif
  return FASTSEQ_X86 || isa == Isa::kBaseline;
}

// The instruction set in use: the fastest built one that this machine supports, at most $FASTSEQ_CPU_ISA if that is
// set. Requires isa_problem() == nullptr.
Isa machine_isa();

// True if the processor has AVX-512 VNNI: vpdpwssd, which multiplies 16-bit integers and adds to 32-bit ones.
bool has_vnni();

const char* isa_name(Isa isa);

// Null if machine_isa() can choose a set, else the reason as a sentence.
const char* isa_problem();

}  // namespace fastseq::cpu
