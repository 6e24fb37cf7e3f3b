// Tensor cores: D (16, 8) += A (16, K) * B (K, 8) by one warp, accumulated in float. Part of device.cuh.
//
// Lane 4 r + q holds, of A, rows r and r + 8; of B, column r; of D, rows r and r + 8 and columns 2 q and 2 q + 1:
//
//   K = 16, 16-bit pairs:  a[0..3] = A[r][2q..], A[r+8][2q..], A[r][2q+8..], A[r+8][2q+8..]
//                          b[0..1] = B[2q..][r], B[2q+8..][r]
//   K = 8, TF32:           a[0..3] = A[r][q], A[r+8][q], A[r][q+4], A[r+8][q+4]
//                          b[0..1] = B[q][r], B[q+4][r]
//   both:                  d[0..3] = D[r][2q], D[r][2q+1], D[r+8][2q], D[r+8][2q+1]
//
// (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8".)
#pragma once

#include "cuda/common/device.cuh"

namespace fastseq::cuda {

#ifdef FASTSEQ_HOST_DEVICE
struct Fragments {
  uint32_t a[4], b[2];
};

// Host fallback: each lane computes its four elements of D. element(word, k): element k of a word.
template <int K, class Element>
void multiply_on_host(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* name, Element element) {
  const Fragments operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto all = host::exchange(kAllLanes, operands, name);
  const int r = lane_id() / 4, q = lane_id() % 4, per_word = K / 8;
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * q + i % 2;
    float sum = 0;
    for (int k = 0; k < K; ++k) {
      const int lane = k % (K / 2) / per_word, half_of_k = k / (K / 2), within = k % per_word;
      sum += element(all[4 * r + lane].a[2 * half_of_k + upper], within) *
             element(all[4 * column + lane].b[half_of_k], within);
    }
    d[i] += sum;
  }
}
#endif

// A and B of type T (bf16 or half).
template <class T>
FASTSEQ_DEVICE void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FASTSEQ_HOST_DEVICE
  multiply_on_host<16>(d, a, b, "multiply_16x8x16",
                       [](uint32_t word, int k) { return to_float(T{static_cast<uint16_t>(word >> (16 * k))}); });
#else
  if constexpr (sizeof(T) != 2) {
    static_assert(sizeof(T) == 2, "16-bit types");
  } else if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Rounds to TF32 (float with 10 bits of mantissa), to nearest, ties away from zero.
FASTSEQ_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
#ifdef FASTSEQ_HOST_DEVICE
  memcpy(&bits, &x, sizeof bits);
  bits = x == x ? (bits + 0x1000u) & ~0x1fffu : 0x7fffffffu;
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
  return bits;
}

// A and B rounded by to_tf32().
FASTSEQ_DEVICE void multiply_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef FASTSEQ_HOST_DEVICE
  multiply_on_host<8>(d, a, b, "multiply_16x8x8_tf32", [](uint32_t word, int) {
    float x;
    memcpy(&x, &word, sizeof x);
    if (x == x && word & 0x1fffu) host::fail("multiply_16x8x8_tf32: an operand was not rounded by to_tf32");
    return x;
  });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace fastseq::cuda
