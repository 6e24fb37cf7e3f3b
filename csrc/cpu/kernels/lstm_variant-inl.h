// Shared by forward and backward of the LSTM variants: zoneout, layer normalisation, products of a step.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/isa/region.h"
#include "cpu/kernels/lstm_variant_params.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Positive in the first n lanes where the byte is 1, else 0.
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> load_keep(const uint8_t* keep, int64_t n) {
  if constexpr (std::is_same_v<Acc<S>, float>) {
    return vload(reinterpret_cast<const int8_t*>(keep), n);
  } else {
    Vec<Acc<S>> lanes{};
    for (int64_t i = 0; i < kLanes<S> && i < n; ++i) lanes[i] = keep[i];
    return lanes;
  }
}

// A state after a step, from its new and its old value.
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> zone_out(
    const Zoneout<S>& zoneout, int64_t at, int64_t n, Vec<Acc<S>> fresh, Vec<Acc<S>> old) {
  if (zoneout.keep) return load_keep<S>(zoneout.keep + at, n) > Vec<Acc<S>>{} ? old : fresh;
  if (zoneout.rate == 0) return fresh;
  return fma(splat(zoneout.rate), old, splat(1 - zoneout.rate) * fresh);
}

// Splits the gradient of a state between its new value, which is returned, and its old one.
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> split_gradient(
    const Zoneout<S>& zoneout, int64_t at, int64_t n, Vec<Acc<S>> grad, Vec<Acc<S>>& old) {
  const Vec<Acc<S>> zero{};
  if (zoneout.keep) {
    const auto kept = load_keep<S>(zoneout.keep + at, n) > zero;
    old = kept ? grad : zero;
    return kept ? zero : grad;
  }
  old = splat(zoneout.rate) * grad;
  return splat(1 - zoneout.rate) * grad;
}

// The first n lanes; zeros in the others, which hold anything.
template <class A>
FASTSEQ_INLINE Vec<A> first_of(Vec<A> v, int64_t n) {
  if (n >= kLanes<A>) return v;
  A lanes[kLanes<A>];
  vstore(v, lanes);
  return load_part(lanes, n);
}

// Mean and 1 / deviation of a row.
template <class A>
struct Moments {
  A mean, scale;
};

// Moments of `count` values. for_each(add) calls add(vector, n) for vectors of n values, twice.
template <class A, class ForEach>
FASTSEQ_INLINE Moments<A> moments(int64_t count, const ForEach& for_each) {
  Vec<A> sum{};
  for_each([&](Vec<A> v, int64_t n) FASTSEQ_LAMBDA_INLINE { sum += first_of<A>(v, n); });
  const A mean = sum_lanes(sum) / A(count);
  Vec<A> squares{};
  for_each([&](Vec<A> v, int64_t n) FASTSEQ_LAMBDA_INLINE {
    const Vec<A> centred = first_of<A>(v - splat(mean), n);
    squares = fma(centred, centred, squares);
  });
  return {mean, A(1) / std::sqrt(sum_lanes(squares) / A(count) + A(kNormEpsilon))};
}

template <class A>
FASTSEQ_INLINE Vec<A> normalise(const Moments<A>& m, Vec<A> x) {
  return (x - splat(m.mean)) * splat(m.scale);
}

// Sums over a row that its normalisation's backward needs: of the gradient, and of the gradient times the normal row.
template <class A>
struct NormSums {
  Vec<A> grad{}, along{};

  FASTSEQ_INLINE void add(Vec<A> g, Vec<A> normal) {
    grad += g;
    along = fma(g, normal, along);
  }
  FASTSEQ_INLINE void divide(int64_t count) {  // to means, in every lane
    grad = splat(sum_lanes(grad) / A(count));
    along = splat(sum_lanes(along) / A(count));
  }
  // Gradient of the row before its normalisation.
  FASTSEQ_INLINE Vec<A> before(A scale, Vec<A> g, Vec<A> normal) const {
    return splat(scale) * (g - grad - normal * along);
  }
};

template <class S>
FASTSEQ_INLINE int64_t panels_of(int64_t H) {
  return (H + kLanes<S> - 1) / kLanes<S>;
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
