#include "cpu/isa/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if FASTSEQ_X86
#include <cpuid.h>
#endif

namespace fastseq::cpu {
namespace {

constexpr Isa kAll[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

#if FASTSEQ_X86
// Conversions of float16. Clang 14 does not know the name "f16c".
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The widest set that this machine supports.
Isa supported() {
#if FASTSEQ_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (!avx2) return Isa::kBaseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

// The fastest supported set. Intel's bfloat16 dot product (Emerald Rapids) takes two cycles: 95 GFLOP/s were measured
// on a thread that reaches 190 by converting to float32. AMD's (Zen 4) is twice as fast as float32.
Isa preferred() {
#if FASTSEQ_X86
  if (supported() == Isa::kAvx512Bf16 && __builtin_cpu_is("intel")) return Isa::kAvx512;
#endif
  return supported();
}

// The set named by $FASTSEQ_CPU_ISA; null if it is unset or unknown.
const Isa* requested() {
  const char* name = std::getenv("FASTSEQ_CPU_ISA");
  if (!name) return nullptr;
  for (const Isa& isa : kAll) {
    if (std::strcmp(name, isa_name(isa)) == 0) return &isa;
  }
  return nullptr;
}

// The widest built set up to `limit`; null if there is none.
const Isa* widest_built(Isa limit) {
  const Isa* widest = nullptr;
  for (const Isa& isa : kAll) {
    if (isa <= limit && is_built(isa)) widest = &isa;
  }
  return widest;
}

const Isa* chosen() { return widest_built(requested() ? std::min(*requested(), supported()) : preferred()); }

}  // namespace

bool has_vnni() {
#if FASTSEQ_X86
  static const bool found = supported() >= Isa::kAvx512 && __builtin_cpu_supports("avx512vnni");
  return found;
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

const char* isa_problem() {
  const char* name = std::getenv("FASTSEQ_CPU_ISA");
  if (name && *name && !requested()) {
    return "FASTSEQ_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or unset";
  }
  if (chosen()) return nullptr;
  return "the library was built (FASTSEQ_CPU_KERNELS) without kernels for this processor and FASTSEQ_CPU_ISA; build it "
         "with baseline among them";
}

Isa machine_isa() {
  static const Isa isa = *chosen();
  return isa;
}

}  // namespace fastseq::cpu
