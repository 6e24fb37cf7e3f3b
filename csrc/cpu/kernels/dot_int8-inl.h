// Products of skinny batches with int8 weights, in integers: a row of activations becomes 15-bit integers with one
// scale. Their rounding error, max |row| / 32766, is 1/129 of that of the weights.
//
// Vectors of 16 bytes (kIntegerDot false) multiply in float32 instead, by dot_rows.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/isa/region.h"
#include "cpu/kernels/dot-inl.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/row_weight.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

constexpr bool kIntegerDot = FASTSEQ_VECTOR_BYTES > 16;
// True if has_vnni() chooses between two instructions with the same results.
constexpr bool kVectorVnni = FASTSEQ_VECTOR_BYTES == 64;

typedef int32_t VInteger __attribute__((vector_size(FASTSEQ_VECTOR_BYTES), may_alias));
typedef int16_t VSigned __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2), may_alias));

// Depths of one vector of 16-bit integers.
constexpr int64_t kIntegerStep = FASTSEQ_VECTOR_BYTES / 2;
// Largest depth whose sums fit in 32 bits: a lane adds kIntegerDepth / kIntegerStep pairs of products below 2^21.
constexpr int64_t kIntegerDepth = 512 * kIntegerStep;
constexpr float kLargestInteger = 16383;
// Rows between the row in use and the one that is prefetched, for one row of activations: more rows, in several tiles,
// find it in a cache.
constexpr int64_t kRowsAhead = 16;

FASTSEQ_INLINE int64_t integer_stride(int64_t K) { return (K + kIntegerStep - 1) / kIntegerStep * kIntegerStep; }

// Rounds a row of K elements to out (integer_stride(K)), padded with zeros. Returns the scale: NaN if an element is
// not finite.
FASTSEQ_INLINE float quantize_row(const float* row, int64_t K, int16_t* out) {
  VFloat largest{}, finite{};
  for (int64_t k = 0; k < K; k += kLanes<float>) {
    const VFloat x = vload(row + k, K - k);
    largest = vmax(vabs(x), largest);
    finite += x - x;  // NaN for an infinity and for NaN
  }
  float most = 0, check = 0;
  for (int l = 0; l < kLanes<float>; ++l) {
    most = largest[l] > most ? largest[l] : most;
    check += finite[l];
  }
  const float scale = most / kLargestInteger + check, factor = most > 0x1p-100f ? kLargestInteger / most : 0.0f;
  const int64_t padded = integer_stride(K);
  for (int64_t k = 0; k < padded; k += kLanes<float>) {
    const VFloat x = k < K ? vload(row + k, K - k) : VFloat{};
    const VFloat shifted = x * factor + splat(12582912.0f);  // rounds to an integer, kept in the low mantissa bits
    const VInteger integers = (VInteger)shifted - (VInteger)splat(12582912.0f);
    const auto narrow = __builtin_convertvector(integers, VSigned);
    std::memcpy(out + k, &narrow, sizeof narrow);
  }
  return scale;
}

// Adds the products of neighbouring depths to the 32-bit lanes of sum.
#if FASTSEQ_VECTOR_BYTES == 64
FASTSEQ_INLINE VInteger widen_bytes(const int8_t* w) {
  return (VInteger)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
}
template <bool VNNI>
FASTSEQ_INLINE VInteger multiply_integers(VInteger a, VInteger w, VInteger sum) {
  if constexpr (VNNI) {
    // By the assembler: the region is compiled for processors without VNNI, too, which never come here.
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w));
    return sum;
  } else {
    return sum + (VInteger)_mm512_madd_epi16((__m512i)a, (__m512i)w);
  }
}
#elif FASTSEQ_VECTOR_BYTES == 32
FASTSEQ_INLINE VInteger widen_bytes(const int8_t* w) {
  return (VInteger)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}
template <bool VNNI>
FASTSEQ_INLINE VInteger multiply_integers(VInteger a, VInteger w, VInteger sum) {
  return sum + (VInteger)_mm256_madd_epi16((__m256i)a, (__m256i)w);
}
#else
FASTSEQ_INLINE VInteger widen_bytes(const int8_t*) { return VInteger{}; }
template <bool VNNI>
FASTSEQ_INLINE VInteger multiply_integers(VInteger, VInteger, VInteger sum) {
  return sum;
}
#endif

// Quantised rows of activations.
struct IntegerRows {
  const int16_t* values;  // (rows, integer_stride(K))
  const float* scale;     // (rows,)

  IntegerRows from(int64_t row, int64_t K) const { return {values + row * integer_stride(K), scale + row}; }
};

// Row r times `count` rows of W from `weight` on, one in each lane, without the scales of W. Lanes past the last row
// repeat it.
template <bool VNNI, int ROWS>
FASTSEQ_NOINLINE void dot_rows_int8(IntegerRows a,
                                    const int8_t* weight,  // (count, K)
                                    int64_t K,
                                    int64_t count,
                                    VFloat (&result)[ROWS]) {
  constexpr int GROUP = dot_group<float>(ROWS);
  const int64_t stride = integer_stride(K);
  for (int r = 0; r < ROWS; ++r) result[r] = VFloat{};
  for (int64_t begin = 0; begin < K; begin += kIntegerDepth) {
    const int64_t depth = K - begin < kIntegerDepth ? K - begin : kIntegerDepth;
    VInteger sums[ROWS][kLanes<float>];
    for (int group = 0; group < kLanes<float> / GROUP; ++group) {
      const int8_t* row[GROUP];
      for (int g = 0; g < GROUP; ++g) {
        const int64_t n = group * GROUP + g;
        row[g] = weight + (n < count ? n : count - 1) * K + begin;
      }
      VInteger sum[ROWS][GROUP] = {};
      const auto step = [&](int64_t k, auto load) FASTSEQ_LAMBDA_INLINE {
        VInteger x[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) x[r] = load_bytes<VInteger>(a.values + r * stride + begin + k);
#pragma GCC unroll 16
        for (int g = 0; g < GROUP; ++g) {
          const VInteger w = load(row[g] + k);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; ++r) sum[r][g] = multiply_integers<VNNI>(x[r], w, sum[r][g]);
        }
      };
      int64_t k = 0;
      const int8_t* const ahead = row[0] + kRowsAhead * K;  // the next rows of W follow in memory
      for (; k + kIntegerStep <= depth; k += kIntegerStep) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < GROUP * kIntegerStep && ROWS == 1; i += 64)
          __builtin_prefetch(ahead + k * GROUP + i, 0, 2);
        step(k, [](const int8_t* w) FASTSEQ_LAMBDA_INLINE { return widen_bytes(w); });
      }
      if (k < depth) {
        step(k, [=](const int8_t* w) FASTSEQ_LAMBDA_INLINE {
          int8_t bytes[kIntegerStep] = {};
          std::memcpy(bytes, w, depth - k);
          return widen_bytes(bytes);
        });
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 16
        for (int g = 0; g < GROUP; ++g) sums[r][group * GROUP + g] = sum[r][g];
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      result[r] += __builtin_convertvector(reduce_lanes<kLanes<float> / 2>(sums[r]), VFloat);
    }
  }
  for (int r = 0; r < ROWS; ++r) result[r] *= a.scale[r];
}

// True if products with this weight take quantised activations.
template <class S>
FASTSEQ_INLINE bool takes_integers(const RowWeight<S>& weight) {
  return kIntegerDot && std::is_same_v<S, float> && weight.type == WeightType::kInt8;
}

// Row r of a times rows [first, first + count) of W, one in each lane.
template <class S, int ROWS>
FASTSEQ_INLINE void multiply_weight(const Operand<S>* const* a,
                                    IntegerRows integers,  // the same rows, if takes_integers(weight)
                                    const RowWeight<S>& weight,
                                    int64_t K,
                                    int64_t first,
                                    int64_t count,
                                    Vec<Acc<S>> (&result)[ROWS]) {
  if constexpr (kIntegerDot && std::is_same_v<S, float>) {
    if (weight.type == WeightType::kInt8) {
      const auto* const rows = static_cast<const int8_t*>(weight.rows) + first * K;
      if (kVectorVnni && has_vnni()) {
        dot_rows_int8<kVectorVnni, ROWS>(integers, rows, K, count, result);
      } else {
        dot_rows_int8<false, ROWS>(integers, rows, K, count, result);
      }
    } else if (weight.type == WeightType::kBFloat16) {
      dot_rows<S, ROWS>(a, static_cast<const BFloat16*>(weight.rows) + first * K, K, count, result);
    } else {
      dot_rows<S, ROWS>(a, static_cast<const S*>(weight.rows) + first * K, K, count, result);
    }
  } else {
    with_weight<S>(weight.rows, weight.type,
                   [&](const auto* w) { dot_rows<S, ROWS>(a, w + first * K, K, count, result); });
  }
  if (!weight.scale) return;
  const Vec<Acc<S>> factor = vload(weight.scale + first, count);
  for (int r = 0; r < ROWS; ++r) result[r] *= factor;
}

// As multiply_weight, for the four gates of `units` hidden units from `unit` on.
template <class S, int ROWS>
FASTSEQ_INLINE void multiply_gate_rows(const Operand<S>* const* a,
                                       IntegerRows integers,
                                       const RowWeight<S>& weight,  // (4H, K)
                                       int64_t H,
                                       int64_t K,
                                       int64_t unit,
                                       int64_t units,
                                       Vec<Acc<S>> (&gates)[ROWS][4]) {
  for (int64_t q = 0; q < 4; ++q) {
    Vec<Acc<S>> result[ROWS];
    multiply_weight<S, ROWS>(a, integers, weight, K, q * H + unit, units, result);
    for (int r = 0; r < ROWS; ++r) gates[r][q] = result[r];
  }
}

// Quantises `count` rows of K elements, if takes_integers(weight).
template <class S>
FASTSEQ_INLINE IntegerRows quantize_rows(const RowWeight<S>& weight,
                                         const Operand<S>* const* rows,
                                         int64_t count,
                                         int64_t K,
                                         int16_t* values,  // (count, integer_stride(K))
                                         float* scale) {   // (count,)
  if constexpr (std::is_same_v<S, float>) {
    for (int64_t r = 0; r < count && takes_integers(weight); ++r) {
      scale[r] = quantize_row(rows[r], K, values + r * integer_stride(K));
    }
  }
  return {values, scale};
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
