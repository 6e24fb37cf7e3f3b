// Softmax cross-entropy of rows of logits that lie in the cache, and the gradients of the logits in their place.
//
// With x the logits of a row, t its target, s the smoothing, m = max x and l = log sum exp(x - m):
//   loss = l - (1 - s) (x_t - m) - s mean(x - m)      dloss/dx = exp(x - m - l) - (1 - s) onehot(t) - s / V
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/cross_entropy_params.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Vectors in one step of a loop over a row: enough independent sums to hide the latency of an addition.
constexpr int64_t kRowUnroll = 4;

// The first n lanes of a row's last vector; other lanes are `fill`.
template <class S>
FASTSEQ_INLINE Vec<Acc<S>> load_tail(const S* x, int64_t n, Acc<S> fill) {
  Acc<S> lanes[kLanes<S>];
  vstore(splat(fill), lanes);
  for (int64_t i = 0; i < n; ++i) lanes[i] = load(x[i]);
  return vload(lanes);
}

// Calls step(vector, k) for all V elements of a row, with k in 0 .. kRowUnroll - 1; the last lanes are padded by
// `fill`.
template <class S, class Step>
FASTSEQ_INLINE void for_vectors(const S* x, int64_t V, Acc<S> fill, const Step& step) {
  constexpr int64_t kWidth = kLanes<S>;
  int64_t j = 0;
  for (; j + kRowUnroll * kWidth <= V; j += kRowUnroll * kWidth) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kRowUnroll; ++k) step(vload(x + j + k * kWidth), k);
  }
  for (; j + kWidth <= V; j += kWidth) step(vload(x + j), 0);
  if (j < V) step(load_tail(x + j, V - j, fill), 0);
}

template <class S>
FASTSEQ_INLINE Acc<S> largest(const S* x, int64_t V) {
  using V4 = Vec<Acc<S>>;
  const Acc<S> first = load(x[0]);
  V4 peaks[kRowUnroll];
  for (V4& peak : peaks) peak = splat(first);
  for_vectors<S>(x, V, first, [&](V4 v, int64_t k) FASTSEQ_LAMBDA_INLINE { peaks[k] = peaks[k] > v ? peaks[k] : v; });
  V4 peak = peaks[0];
  for (const V4& other : peaks) peak = other > peak ? other : peak;
  return max_lanes(peak);
}

// Sums of exp(x - peak) and of x - peak.
template <class S>
struct RowSums {
  Acc<S> exponentials, differences;
};

template <class S>
FASTSEQ_INLINE RowSums<S> row_sums(const S* x, int64_t V, Acc<S> peak) {
  using V4 = Vec<Acc<S>>;
  V4 exponentials[kRowUnroll] = {}, differences[kRowUnroll] = {};
  const V4 peaks = splat(peak);
  const int64_t whole = V / kLanes<S> * kLanes<S>;
  for_vectors<S>(x, whole, peak, [&](V4 v, int64_t k) FASTSEQ_LAMBDA_INLINE {
    exponentials[k] += vexp(v - peaks);
    differences[k] += v - peaks;
  });
  V4 e{}, d{};
  for (int64_t k = 0; k < kRowUnroll; ++k) e += exponentials[k], d += differences[k];
  RowSums<S> sums{sum_lanes(e), sum_lanes(d)};
  if (whole < V) {
    const V4 rest = load_tail(x + whole, V - whole, peak) - peaks, powers = vexp(rest);
    for (int64_t i = 0; i < V - whole; ++i) sums.exponentials += powers[i], sums.differences += rest[i];
  }
  return sums;
}

// exp(x) for x <= 0, and 0 below -60: smaller probabilities change no sum, but would make denormal numbers in products.
FASTSEQ_INLINE VFloat probability(VFloat x) {
  const VFloat p = vexp(x);
  return x < splat(-60.0f) ? VFloat{} : p;
}
FASTSEQ_INLINE VDouble probability(VDouble x) { return vexp(x); }

// Replaces the logits of a row by scale (p - s / V), and adds that to sums unless it is null.
template <class S>
FASTSEQ_INLINE void row_gradients(
    S* x, int64_t V, Acc<S> peak, Acc<S> log_total, Acc<S> smoothed, Acc<S> scale, Acc<S>* sums) {
  using V4 = Vec<Acc<S>>;
  const V4 peaks = splat(peak), totals = splat(log_total), each = splat(smoothed), scales = splat(scale);
  for (int64_t j = 0; j < V; j += kLanes<S>) {
    const int64_t n = V - j;
    const V4 gradient = scales * (probability((vload(x + j, n) - peaks) - totals) - each);
    vstore(gradient, x + j, n);
    if (sums) vstore(vload(sums + j, n) + gradient, sums + j, n);
  }
}

// Rows of tasks [begin, end), each of kCrossEntropyRows rows.
template <class S>
void cross_entropy(const CrossEntropyParams<S>& p, int64_t begin, int64_t end) {
  const int64_t V = p.classes;
  const Acc<S> smoothed = p.smoothing / static_cast<Acc<S>>(V), hit = 1 - p.smoothing;
  for (int64_t r = begin * kCrossEntropyRows; r < end * kCrossEntropyRows && r < p.rows; ++r) {
    S* const x = p.logits + r * V;
    const Acc<S> of_target = load(x[p.target[r]]);
    if (!p.has_statistics) {
      p.peak[r] = largest<S>(x, V);
      const RowSums<S> sums = row_sums<S>(x, V, p.peak[r]);
      p.log_total[r] = std::log(sums.exponentials);
      p.losses[r] =
          p.log_total[r] - hit * (of_target - p.peak[r]) - (p.smoothing > 0 ? smoothed * sums.differences : 0);
    }
    if (!p.gradients) continue;
    Acc<S>* const sums = p.bias_sums ? p.bias_sums + r / kCrossEntropyRows * V : nullptr;
    if (sums && r % kCrossEntropyRows == 0) fill_zero(sums, V);
    const Acc<S> scale = p.scale ? p.scale[r] : 1;
    row_gradients<S>(x, V, p.peak[r], p.log_total[r], smoothed, scale, sums);
    const Acc<S> p_target = std::exp((of_target - p.peak[r]) - p.log_total[r]);
    store(scale * ((p_target - smoothed) - hit), x + p.target[r]);
    if (sums) sums[p.target[r]] -= scale * hit;
  }
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
