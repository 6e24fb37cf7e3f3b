// Words of 32 bits that blocks exchange through L2, and their bits as numbers. Part of device.cuh.
#pragma once

#include "cuda/common/device.cuh"

namespace fastseq::cuda {

FASTSEQ_DEVICE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FASTSEQ_DEVICE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Words that carry their own sequence tag. Reading the new value of one word does not order any other word. A
// thread never reads an older value of a word after a newer one. load_relaxed leaves `words` unchanged if `wanted` is
// false (a predicated load: a branch would cost a second set of registers). p is 16-byte aligned.
FASTSEQ_DEVICE void load_relaxed(uint32_t (&words)[4], const uint32_t* p, bool wanted) {
#ifdef FASTSEQ_HOST_DEVICE
  if (!wanted) return;
  host::poll();
  for (int k = 0; k < 4; ++k) words[k] = __atomic_load_n(p + k, __ATOMIC_RELAXED);
#else
  asm volatile(
      "{\n.reg .pred wanted;\n"
      "setp.ne.u32 wanted, %5, 0;\n"
      "@wanted ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
      : "l"(p), "r"(static_cast<unsigned>(wanted))
      : "memory");
#endif
}

FASTSEQ_DEVICE void store_relaxed(uint32_t* p, uint32_t x) {
#ifdef FASTSEQ_HOST_DEVICE
  __atomic_store_n(p, x, __ATOMIC_RELAXED);
  host::note_progress();
#else
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
#endif
}

// As load_relaxed and store_relaxed, with one tag for 8 bytes: each pair of words is read and written at once. p is
// aligned to all pairs. (PTX ISA, "Vector Data-types": such an access is one of 64 bits for each element.)
FASTSEQ_DEVICE void load_relaxed(uint64_t (&pairs)[2], const uint64_t* p, bool wanted) {
#ifdef FASTSEQ_HOST_DEVICE
  if (!wanted) return;
  host::poll();
  for (int k = 0; k < 2; ++k) pairs[k] = __atomic_load_n(p + k, __ATOMIC_RELAXED);
#else
  asm volatile(
      "{\n.reg .pred wanted;\n"
      "setp.ne.u32 wanted, %3, 0;\n"
      "@wanted ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];\n}"
      : "+l"(pairs[0]), "+l"(pairs[1])
      : "l"(p), "r"(static_cast<unsigned>(wanted))
      : "memory");
#endif
}

// N: 1 or 2.
template <int N>
FASTSEQ_DEVICE void store_relaxed(uint64_t* p, const uint64_t (&pairs)[N]) {
#ifdef FASTSEQ_HOST_DEVICE
  for (int k = 0; k < N; ++k) __atomic_store_n(p + k, pairs[k], __ATOMIC_RELAXED);
  host::note_progress();
#else
  if constexpr (N == 1)
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(pairs[0]) : "memory");
  else
    asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(p), "l"(pairs[0]), "l"(pairs[1]) : "memory");
#endif
}

}  // namespace fastseq::cuda
