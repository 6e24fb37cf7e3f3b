// Vectors of one instruction set, FASTSEQ_VECTOR_BYTES wide: loads, stores, arithmetic, sigmoid, tanh, exp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/runtime/storage.h"
#include "lstm_math.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

typedef float VFloat __attribute__((vector_size(FASTSEQ_VECTOR_BYTES), may_alias));
typedef double VDouble __attribute__((vector_size(FASTSEQ_VECTOR_BYTES), may_alias));
typedef uint32_t VWord __attribute__((vector_size(FASTSEQ_VECTOR_BYTES), may_alias));
typedef uint16_t VShort __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2), may_alias));

template <class A>
struct VectorOf {
  using type = VFloat;
};
template <>
struct VectorOf<double> {
  using type = VDouble;
};
template <class A>
using Vec = typename VectorOf<A>::type;

// Elements of Acc<S> in one vector.
template <class S>
constexpr int kLanes = FASTSEQ_VECTOR_BYTES / sizeof(Acc<S>);

// Flushes denormal numbers (below 1.2e-38 in float32) to zero in this thread while it lives. An operation on them may
// take 150 cycles, and gradients that vanish over many steps are full of them.
class FlushDenormals {
 public:
  FlushDenormals() : before_(mode()) { set_mode(before_ | kFlush); }
  ~FlushDenormals() { set_mode(before_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
#if FASTSEQ_X86
  using Mode = uint32_t;
  static constexpr Mode kFlush = 0x8040;  // results and operands
  static Mode mode() { return _mm_getcsr(); }
  static void set_mode(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kFlush = 1 << 24;
  static Mode mode() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(Mode mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }
#else
  using Mode = int;
  static constexpr Mode kFlush = 0;
  static Mode mode() { return 0; }
  static void set_mode(Mode) {}
#endif
  const Mode before_;
};

template <class V, class T>
FASTSEQ_INLINE V load_bytes(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
FASTSEQ_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};
}

// fma: a b + c, fnma: c - a b, rounded once where the instruction set has them. Contraction by the compiler is off
// (-ffp-contract=off in setup.py): it contracts some copies of an expression and not others, so a row would differ
// between a tile of two rows and one of three.
#if FASTSEQ_VECTOR_BYTES == 64
FASTSEQ_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) {
  return (VFloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FASTSEQ_INLINE VDouble fma(VDouble a, VDouble b, VDouble c) {
  return (VDouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
FASTSEQ_INLINE VFloat fnma(VFloat a, VFloat b, VFloat c) {
  return (VFloat)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FASTSEQ_INLINE VDouble fnma(VDouble a, VDouble b, VDouble c) {
  return (VDouble)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif FASTSEQ_VECTOR_BYTES == 32
FASTSEQ_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) {
  return (VFloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FASTSEQ_INLINE VDouble fma(VDouble a, VDouble b, VDouble c) {
  return (VDouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
FASTSEQ_INLINE VFloat fnma(VFloat a, VFloat b, VFloat c) {
  return (VFloat)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FASTSEQ_INLINE VDouble fnma(VDouble a, VDouble b, VDouble c) {
  return (VDouble)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
FASTSEQ_INLINE VFloat fma(VFloat a, VFloat b, VFloat c) {
  return (VFloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FASTSEQ_INLINE VDouble fma(VDouble a, VDouble b, VDouble c) {
  return (VDouble)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
FASTSEQ_INLINE VFloat fnma(VFloat a, VFloat b, VFloat c) {
  return (VFloat)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FASTSEQ_INLINE VDouble fnma(VDouble a, VDouble b, VDouble c) {
  return (VDouble)vfmsq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
template <class V>
FASTSEQ_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
template <class V>
FASTSEQ_INLINE V fnma(V a, V b, V c) {
  return c - a * b;
}
#endif

FASTSEQ_INLINE VFloat vmin(VFloat a, VFloat b) { return a < b ? a : b; }  // NaN in a: b
FASTSEQ_INLINE VFloat vmax(VFloat a, VFloat b) { return a > b ? a : b; }

// Full vectors, at any alignment, of every storage type.
FASTSEQ_INLINE VFloat vload(const float* p) { return load_bytes<VFloat>(p); }
FASTSEQ_INLINE VDouble vload(const double* p) { return load_bytes<VDouble>(p); }
#if FASTSEQ_VECTOR_BYTES == 64  // GCC compiles the portable lines to up to three times as many instructions
FASTSEQ_INLINE VFloat vload(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (VFloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
FASTSEQ_INLINE VFloat vload(const Half* p) {
  return (VFloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FASTSEQ_INLINE VFloat vload(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (VFloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
#elif FASTSEQ_VECTOR_BYTES == 32
FASTSEQ_INLINE VFloat vload(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (VFloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
FASTSEQ_INLINE VFloat vload(const Half* p) {
  return (VFloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTSEQ_INLINE VFloat vload(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (VFloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
#else
FASTSEQ_INLINE VFloat vload(const BFloat16* p) {
  return (VFloat)(__builtin_convertvector(load_bytes<VShort>(p), VWord) << 16);
}
FASTSEQ_INLINE VFloat vload(const int8_t* p) {
  typedef int8_t Bytes __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 4)));
  return __builtin_convertvector(load_bytes<Bytes>(p), VFloat);
}
#if defined(__aarch64__)
FASTSEQ_INLINE VFloat vload(const Half* p) { return (VFloat)vcvt_f32_f16(load_bytes<float16x4_t>(p)); }
#else
FASTSEQ_INLINE VFloat vload(const Half* p) {
  const VWord bits = __builtin_convertvector(load_bytes<VShort>(p), VWord);
  const VWord sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const VWord special = (VWord)(magnitude >= 0x0f800000u) & 0x38000000u;  // infinity and NaN: all exponent bits set
  const VWord normal = magnitude + 0x38000000u + special;
  const VWord subnormal = (VWord)((VFloat)(magnitude + 0x38800000u) - splat(0x1p-14f));
  return (VFloat)((magnitude < 0x00800000u ? subnormal : normal) | sign);
}
#endif
#endif

FASTSEQ_INLINE void vstore(VFloat v, float* p) { std::memcpy(p, &v, sizeof v); }
FASTSEQ_INLINE void vstore(VDouble v, double* p) { std::memcpy(p, &v, sizeof v); }
FASTSEQ_INLINE void store_low_halves(VWord bits, void* p) {
  const VShort low = __builtin_convertvector(bits, VShort);
  std::memcpy(p, &low, sizeof low);
}
FASTSEQ_INLINE void vstore(VFloat v, BFloat16* p) {  // as store() in storage.h
  const VWord bits = (VWord)v;
  const VWord rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_low_halves((bits & 0x7fffffffu) > 0x7f800000u ? VWord{} + 0x7fc0u : rounded, p);
}
#if FASTSEQ_VECTOR_BYTES == 64
FASTSEQ_INLINE void vstore(VFloat v, Half* p) {
  const __m256i bits = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
#elif FASTSEQ_VECTOR_BYTES == 32
FASTSEQ_INLINE void vstore(VFloat v, Half* p) {
  const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}
#elif defined(__aarch64__)
FASTSEQ_INLINE void vstore(VFloat v, Half* p) {
  const float16x4_t bits = vcvt_f16_f32((float32x4_t)v);
  std::memcpy(p, &bits, sizeof bits);
}
#else
FASTSEQ_INLINE void vstore(VFloat v, Half* p) {  // as store() in storage.h
  const VWord sign = ((VWord)v >> 16) & 0x8000u, magnitude = (VWord)v & 0x7fffffffu;
  const VWord normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const VWord subnormal = (VWord)((VFloat)magnitude + splat(0.5f)) - 0x3f000000u;
  const VWord overflow = magnitude > 0x7f800000u ? VWord{} + 0x7e00u : VWord{} + 0x7c00u;
  VWord bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x477ff000u ? overflow : bits;
  store_low_halves(bits | sign, p);
}
#endif

// The first n lanes. Other lanes load as 0; their memory is neither read nor written.
#if FASTSEQ_VECTOR_BYTES == 64
FASTSEQ_INLINE uint32_t first_lanes(int64_t n) { return n > 0 ? (1u << n) - 1 : 0; }  // n < 32
FASTSEQ_INLINE VFloat load_part(const float* p, int64_t n) { return (VFloat)_mm512_maskz_loadu_ps(first_lanes(n), p); }
FASTSEQ_INLINE VDouble load_part(const double* p, int64_t n) {
  return (VDouble)_mm512_maskz_loadu_pd(first_lanes(n), p);
}
FASTSEQ_INLINE VFloat load_part(const BFloat16* p, int64_t n) {
  return (VFloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16);
}
FASTSEQ_INLINE VFloat load_part(const Half* p, int64_t n) {
  return (VFloat)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
FASTSEQ_INLINE VFloat load_part(const int8_t* p, int64_t n) {
  return (VFloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}
FASTSEQ_INLINE void store_part(VFloat v, float* p, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
FASTSEQ_INLINE void store_part(VDouble v, double* p, int64_t n) {
  _mm512_mask_storeu_pd(p, first_lanes(n), (__m512d)v);
}
template <class S>
FASTSEQ_INLINE void store_part(VFloat v, S* p, int64_t n) {
  S lanes[kLanes<S>];
  vstore(v, lanes);
  _mm256_mask_storeu_epi16(p, first_lanes(n), load_bytes<__m256i>(lanes));
}
#else
#if FASTSEQ_VECTOR_BYTES == 32
constexpr int32_t kLaneMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
// Mask of the first n lanes of `words` 32-bit words each.
FASTSEQ_INLINE __m256i first_lanes(int64_t n, int64_t words) {
  return load_bytes<__m256i>(kLaneMasks + 8 - (n > 0 ? n : 0) * words);
}
FASTSEQ_INLINE VFloat load_part(const float* p, int64_t n) { return (VFloat)_mm256_maskload_ps(p, first_lanes(n, 1)); }
FASTSEQ_INLINE VDouble load_part(const double* p, int64_t n) {
  return (VDouble)_mm256_maskload_pd(p, first_lanes(n, 2));
}
FASTSEQ_INLINE void store_part(VFloat v, float* p, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n, 1), (__m256)v); }
FASTSEQ_INLINE void store_part(VDouble v, double* p, int64_t n) {
  _mm256_maskstore_pd(p, first_lanes(n, 2), (__m256d)v);
}
#endif
// One function for each type, since the code of every call would be as long as that of whole vectors.
template <class S>
FASTSEQ_NOINLINE Vec<Acc<S>> load_part(const S* p, int64_t n) {
  S lanes[kLanes<S>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return vload(lanes);
}
template <class S>
FASTSEQ_NOINLINE void store_part(Vec<Acc<S>> v, S* p, int64_t n) {
  S lanes[kLanes<S>];
  vstore(v, lanes);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
#endif
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> vload(const S* p, int64_t n) {
  return n >= kLanes<S> ? vload(p) : load_part(p, n);
}
template <class S>
FASTSEQ_INLINE void vstore(Vec<Acc<S>> v, S* p, int64_t n) {
  n >= kLanes<S> ? vstore(v, p) : store_part(v, p, n);
}

// Pairwise sum of the lanes: log2(lanes) additions deep.
template <class V>
FASTSEQ_INLINE auto sum_lanes(V v) {
  using T = decltype(v[0] + v[0]);
  if constexpr (sizeof(V) == 2 * sizeof(T)) {
    return v[0] + v[1];
  } else {
    typedef T HalfVector __attribute__((vector_size(sizeof(V) / 2)));
    HalfVector low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum_lanes(HalfVector(low + high));
  }
}

// Largest lane; a NaN may be passed over.
template <class V>
FASTSEQ_INLINE auto max_lanes(V v) {
  using T = decltype(v[0] + v[0]);
  if constexpr (sizeof(V) == 2 * sizeof(T)) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    typedef T HalfVector __attribute__((vector_size(sizeof(V) / 2)));
    HalfVector low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return max_lanes(HalfVector(low > high ? low : high));
  }
}

FASTSEQ_INLINE VFloat reciprocal(VFloat x) {
#if FASTSEQ_VECTOR_BYTES == 64
  // One Newton step from 14 bits: within one rounding, in a third of the time of a division. NaN for 0 and infinity.
  const VFloat r = (VFloat)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return r * fnma(x, r, splat(2.0f));
#else
  return splat(1.0f) / x;
#endif
}

// a / b. Exactly 1 for a == b, independent of the 14 bits of 1 / b, which differ between processors.
FASTSEQ_INLINE VFloat divide(VFloat a, VFloat b) {
#if FASTSEQ_VECTOR_BYTES == 64
  const VFloat r = reciprocal(b), q = a * r;
  return fma(fnma(q, b, a), r, q);
#else
  return a / b;
#endif
}

// e^x = scale * (1 + fraction), split so that e^x - 1 loses no digits near 0. See split_exp in lstm_math.h.
struct VSplitExp {
  VFloat scale, fraction;
};

// x limited to +-limit; NaN passes through.
FASTSEQ_INLINE VFloat clamp(VFloat x, float limit) {
#if FASTSEQ_VECTOR_BYTES == 64
  return (VFloat)_mm512_min_ps((__m512)splat(limit), _mm512_max_ps((__m512)splat(-limit), (__m512)x));
#elif FASTSEQ_VECTOR_BYTES == 32
  return (VFloat)_mm256_min_ps((__m256)splat(limit), _mm256_max_ps((__m256)splat(-limit), (__m256)x));
#else
  x = x < splat(-limit) ? splat(-limit) : x;
  return x > splat(limit) ? splat(limit) : x;
#endif
}

// Requires |x| <= 87, where e^x is still a normal number.
FASTSEQ_INLINE VSplitExp split_exp(VFloat x) {
  constexpr float kRound = 12582912.0f;
  const VFloat shifted = fma(x, splat(1.44269504f), splat(kRound));
  const VFloat n = shifted - splat(kRound);
  VFloat r = fnma(n, splat(0x1.62ep-1f), x);
  r = fnma(n, splat(0x1.0bfbe8p-15f), r);
  VFloat p = splat(0x1.a1256cp-13f);
  p = fma(p, r, splat(0x1.6d43bp-10f));
  p = fma(p, r, splat(0x1.1110ep-7f));
  p = fma(p, r, splat(0x1.5554e8p-5f));
  p = fma(p, r, splat(0x1.555556p-3f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r * r, r);
  return {(VFloat)(((VWord)shifted << 23) + 0x3f800000u), p};
}

FASTSEQ_INLINE VFloat vexp(VFloat x) {
  const VSplitExp e = split_exp(clamp(x, 87.0f));
  return fma(e.scale, e.fraction, e.scale);
}

FASTSEQ_INLINE VFloat vsigmoid(VFloat x) { return reciprocal(splat(1.0f) + vexp(-x)); }

FASTSEQ_INLINE VFloat vtanh(VFloat x) {
  x = clamp(x, 9.02f);  // beyond it tanh rounds to +-1 in float32
  const VSplitExp e = split_exp(x + x);
  const VFloat expm1 = fma(e.scale, e.fraction, e.scale - splat(1.0f));
  return divide(expm1, expm1 + splat(2.0f));
}

FASTSEQ_INLINE VDouble vsigmoid(VDouble x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = sigmoid(x[i]);
  return x;
}
FASTSEQ_INLINE VDouble vtanh(VDouble x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = tanh(x[i]);
  return x;
}

FASTSEQ_INLINE VDouble reciprocal(VDouble x) { return splat(1.0) / x; }
FASTSEQ_INLINE VDouble vexp(VDouble x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
FASTSEQ_INLINE VFloat vabs(VFloat x) { return (VFloat)((VWord)x & 0x7fffffffu); }
FASTSEQ_INLINE VDouble vabs(VDouble x) { return x < splat(0.0) ? -x : x; }

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
