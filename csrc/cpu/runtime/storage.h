// Element types of tensors, and the type each is computed in. Conversions round to nearest, ties to even. Also used by
// the host fallbacks of the CUDA kernels, hence namespace fastseq.
#pragma once

#include <cstdint>
#include <cstring>

#include "lstm_math.h"

namespace fastseq {

FASTSEQ_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTSEQ_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// Type of a weight beside float32 tensors; kStorage: that of the tensors. kInt8: one scale for each row of the weight.
enum class WeightType { kStorage, kBFloat16, kInt8 };

template <class S>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
// Type that tensors of S are computed in: double for double, float for all others.
template <class S>
using Acc = typename Accumulate<S>::type;

FASTSEQ_INLINE float load(float x) { return x; }

FASTSEQ_INLINE double load(double x) { return x; }

FASTSEQ_INLINE float load(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

FASTSEQ_INLINE float load(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x38000000u : 0u;  // infinity and NaN: all exponent bits set
  const float normal = float_from_bits(magnitude + 0x38000000u + special);
  const float subnormal = float_from_bits(magnitude + 0x38800000u) - 0x1p-14f;
  const float value = magnitude < 0x00800000u ? subnormal : normal;
  return float_from_bits(float_bits(value) | sign);
}

FASTSEQ_INLINE void store(float x, float* out) { *out = x; }

FASTSEQ_INLINE void store(double x, double* out) { *out = x; }

FASTSEQ_INLINE void store(float x, BFloat16* out) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

FASTSEQ_INLINE void store(float x, Half* out) {
  const uint32_t sign = (float_bits(x) >> 16) & 0x8000u;
  const uint32_t magnitude = float_bits(x) & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 rounds to the subnormal half and leaves it in the low mantissa bits.
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x477ff000u ? overflow : bits;  // 65520 and above round to infinity
  out->bits = static_cast<uint16_t>(bits | sign);
}

template <class T>
FASTSEQ_INLINE void fill_zero(T* out, int64_t count) {
  std::memset(static_cast<void*>(out), 0, count * sizeof(T));
}

}  // namespace fastseq
