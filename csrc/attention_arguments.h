// Arguments that the attention operators of all devices share, and their checks.
#pragma once

#include "checks.h"

namespace fastseq {

struct AttentionArguments {
  Tensor query, keys, values;
  OptionalTensor weight, bias, lengths, mask, prepared;
  double scale;
  OptionalTensor coverage = {}, coverage_weight = {};  // (B, T, S), (A,): both or neither

  int64_t batch() const { return query.size(0); }
  int64_t steps() const { return query.size(1); }
  int64_t positions() const { return keys.size(1); }
  int64_t size() const { return keys.size(2); }
  int64_t width() const { return values.size(2); }
  ScalarType dtype() const { return query.scalar_type(); }

  // Stride between the rows of mask; 0 if all steps share one row. Requires mask.
  int64_t mask_row() const { return mask->size(1) == 1 ? 0 : mask->stride(1); }

  // strided(name, tensor, shape, dtype) checks that a tensor is on the device and has this shape and dtype; whole(...)
  // also that it is contiguous. `prepared` has another form on each device, which checks it.
  template <class Whole, class Strided>
  void check(const char* op, const Whole& whole, const Strided& strided) const;

  // Checks the other arguments of the backward: the softmax weights and both incoming gradients.
  template <class Whole, class Strided>
  void check_backward(const Tensor& weights,               // (B, T, S) acc
                      const Tensor& grad_context,          // (B, T, D)
                      const OptionalTensor& grad_weights,  // (B, T, S)
                      const Whole& whole,
                      const Strided& strided) const;
};

template <class Whole, class Strided>
void AttentionArguments::check(const char* op, const Whole& whole, const Strided& strided) const {
  check_rank(op, "query", query, 3, "(B, T, A)");
  check_rank(op, "keys", keys, 3, "(B, S, A)");
  check_rank(op, "values", values, 3, "(B, S, D)");
  const int64_t B = batch(), T = steps(), S = positions(), A = size();
  strided("query", query, {B, T, A}, dtype());
  strided("keys", keys, {B, S, A}, dtype());
  strided("values", values, {B, S, width()}, dtype());
  check_extent(op, "context", Shape{B, T, width()});
  check_extent(op, "weights", Shape{B, T, S});
  if (weight) whole("weight", *weight, {A}, dtype());
  if (bias) whole("bias", *bias, {A}, dtype());
  if (lengths) whole("lengths", *lengths, {B}, ScalarType::Long);
  if (coverage) {
    check_rank(op, "coverage", *coverage, 3, "(B, T, S)");
    strided("coverage", *coverage, {B, T, S}, dtype());
    whole("coverage_weight", *coverage_weight, {A}, dtype());
  }
  STD_TORCH_CHECK(!(lengths && mask), op, ": lengths and mask exclude each other; pass one");
  if (!mask) return;
  check_rank(op, "mask", *mask, 3, "(B, 1 or T, S)");
  strided("mask", *mask, {B, mask->size(1) == 1 ? 1 : T, S}, ScalarType::Bool);
}

template <class Whole, class Strided>
void AttentionArguments::check_backward(const Tensor& weights,
                                        const Tensor& grad_context,
                                        const OptionalTensor& grad_weights,
                                        const Whole& whole,
                                        const Strided& strided) const {
  const int64_t B = batch(), T = steps(), S = positions();
  whole("weights", weights, {B, T, S}, accumulate_type(dtype()));
  strided("grad_context", grad_context, {B, T, width()}, dtype());
  if (grad_weights) strided("grad_weights", *grad_weights, {B, T, S}, dtype());
}

// Checks the arguments of attention_prepare.
template <class Whole, class Strided>
void check_prepare(const char* op,
                   const Tensor& keys,             // (B, S, A)
                   const OptionalTensor& lengths,  // (B,)
                   const Whole& whole,
                   const Strided& strided) {
  check_rank(op, "keys", keys, 3, "(B, S, A)");
  strided("keys", keys, {keys.size(0), keys.size(1), keys.size(2)}, keys.scalar_type());
  if (lengths) whole("lengths", *lengths, {keys.size(0)}, ScalarType::Long);
}

}  // namespace fastseq
