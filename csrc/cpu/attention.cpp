// The attention operators on CPU: checks, outputs, threads. The arithmetic is in attention.inc.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <tuple>

#include "../attention_arguments.h"
#include "kernels.h"
#include "operators.h"
#include "pool.h"

namespace fastseq {
namespace {

using torch::stable::parallel_for;

// Tanh evaluations, or multiply-adds times 8, that are worth a thread.
constexpr int64_t kWorthThread = 1 << 14;

template <class S>
Strided<const S> strided(const OptionalTensor& t) {
  if (!t) return {};
  return {static_cast<const S*>(t->const_data_ptr()), t->stride(0), t->stride(1), t->stride(2)};
}

struct Arguments : AttentionArguments {
  void check(const char* op) const;
  template <class S>
  AttentionInputs<S> inputs() const;
};

void Arguments::check(const char* op) const {
  AttentionArguments::check(
      op,
      [&](const char* name, const Tensor& t, const Shape& shape, ScalarType type) {
        check_cpu(op, name, t, shape, type);
      },
      [&](const char* name, const Tensor& t, const Shape& shape, ScalarType type) {
        check_cpu_strided(op, name, t, shape, type);
      });
  STD_TORCH_CHECK(weight || !(bias || prepared), op, ": bias and prepared belong to the additive score; pass weight");
  const Shape shape{batch(), positions(), prepared_columns(size())};
  if (prepared) check_cpu(op, "prepared", *prepared, shape, accumulate_type(dtype()));
}

template <class S>
AttentionInputs<S> Arguments::inputs() const {
  AttentionInputs<S> in{};
  in.steps = steps(), in.positions = positions(), in.size = size(), in.width = width();
  in.query = strided<S>(query), in.keys = strided<S>(keys), in.values = strided<S>(values);
  in.weight = read<S>(weight), in.bias = read<S>(bias);
  in.lengths = read<int64_t>(lengths);
  in.mask = strided<bool>(mask);
  if (mask && mask->size(1) == 1) in.mask.row = 0;
  in.prepared = read<Acc<S>>(prepared);
  in.scale = static_cast<Acc<S>>(scale);
  return in;
}

// Calls run(begin, end, scratch) for parts of the batch. A sentence is never divided, so threads change no result.
template <class S, class Run>
void for_sentences(const Arguments& arguments, const AttentionInputs<S>& in, const Run& run) {
  const int64_t work = in.steps * in.positions * (in.weight ? in.size + in.width / 8 : (in.size + in.width) / 8);
  parallel_for(0, arguments.batch(), kWorthThread / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(attention_scratch(in));
    run(begin, end, scratch.at(0));
  });
}

std::tuple<Tensor, Tensor> attention_forward_cpu(Tensor query,
                                                 Tensor keys,
                                                 Tensor values,
                                                 OptionalTensor weight,
                                                 OptionalTensor bias,
                                                 OptionalTensor lengths,
                                                 OptionalTensor mask,
                                                 OptionalTensor prepared,
                                                 double scale,
                                                 bool need_weights) {
  const char* op = "attention_forward";
  const Arguments arguments{{query, keys, values, weight, bias, lengths, mask, prepared, scale}};
  arguments.check(op);
  const int64_t B = arguments.batch(), T = arguments.steps();
  Tensor context = pooled_empty(query, {B, T, arguments.width()}, arguments.dtype());
  Tensor weights = pooled_empty(query, need_weights ? Shape{B, T, arguments.positions()} : Shape{0},
                                accumulate_type(arguments.dtype()));
  with_storage_type(op, arguments.dtype(), [&](auto zero) {
    using S = decltype(zero);
    AttentionForward<S> p{};
    p.in = arguments.inputs<S>();
    p.context = write<S>(context);
    p.weights = write<Acc<S>>(weights);
    for_sentences(arguments, p.in, [&](int64_t begin, int64_t end, void* scratch) {
      kernels<S>().attention_forward(p, begin, end, scratch);
    });
  });
  return {context, weights};
}

// Sums rows (B, columns) over the batch, always in the same order, into `sum` (no more than columns).
template <class S>
void sum_sentences(const Acc<S>* rows, int64_t B, int64_t columns, const Tensor& sum) {
  const int64_t size = sum.numel();
  const std::unique_ptr<Acc<S>[]> total(new Acc<S>[columns]());
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < size; ++c) total[c] += rows[b * columns + c];
  }
  for (int64_t c = 0; c < size; ++c) store(total[c], write<S>(sum) + c);
}

// The gradients of attention, empty where not needed.
struct Gradients {
  Tensor query, keys, values, weight, bias;

  Gradients(const Arguments& of, bool need_scores, bool need_values)
      : query(empty(of, need_scores, {of.batch(), of.steps(), of.size()})),
        keys(empty(of, need_scores, {of.batch(), of.positions(), of.size()})),
        values(empty(of, need_values, {of.batch(), of.positions(), of.width()})),
        weight(empty(of, need_scores && of.weight, {of.size()})),
        bias(empty(of, need_scores && of.weight, {of.size()})) {}

 private:
  static Tensor empty(const Arguments& of, bool needed, const Shape& shape) {
    return pooled_empty(of.query, needed ? shape : Shape{0}, of.dtype());
  }
};

template <class S>
void backward(const Arguments& arguments, AttentionBackward<S>& p, const Gradients& grads) {
  const int64_t B = arguments.batch(), columns = p.need_scores && p.in.weight ? whole_columns(p.in.size) : 0;
  const Scratch rows(2 * B * columns * sizeof(Acc<S>));  // a sentence's part of grad_weight and grad_bias each
  p.grad_query = write<S>(grads.query);
  p.grad_keys = write<S>(grads.keys);
  p.grad_values = write<S>(grads.values);
  p.grad_weight = rows.at<Acc<S>>(0);
  p.grad_bias = p.grad_weight + B * columns;
  for_sentences(arguments, p.in, [&](int64_t begin, int64_t end, void* scratch) {
    kernels<S>().attention_backward(p, begin, end, scratch);
  });
  if (columns == 0) return;
  sum_sentences<S>(p.grad_weight, B, columns, grads.weight);
  sum_sentences<S>(p.grad_bias, B, columns, grads.bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(Tensor grad_context,
                                                                          OptionalTensor grad_weights,
                                                                          Tensor query,
                                                                          Tensor keys,
                                                                          Tensor values,
                                                                          OptionalTensor weight,
                                                                          OptionalTensor bias,
                                                                          OptionalTensor lengths,
                                                                          OptionalTensor mask,
                                                                          OptionalTensor prepared,
                                                                          Tensor weights,
                                                                          double scale,
                                                                          bool need_scores,
                                                                          bool need_values) {
  const char* op = "attention_backward";
  const Arguments arguments{{query, keys, values, weight, bias, lengths, mask, prepared, scale}};
  arguments.check(op);
  const int64_t B = arguments.batch(), T = arguments.steps(), S = arguments.positions();
  const ScalarType dtype = arguments.dtype();
  check_cpu(op, "weights", weights, {B, T, S}, accumulate_type(dtype));
  check_cpu_strided(op, "grad_context", grad_context, {B, T, arguments.width()}, dtype);
  if (grad_weights) check_cpu_strided(op, "grad_weights", *grad_weights, {B, T, S}, dtype);
  const Gradients grads(arguments, need_scores, need_values);
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    AttentionBackward<S> p{};
    p.in = arguments.inputs<S>();
    p.weights = read<Acc<S>>(weights);
    p.grad_context = strided<S>(grad_context);
    p.grad_weights = strided<S>(grad_weights);
    p.need_scores = need_scores;
    p.need_values = need_values;
    backward(arguments, p, grads);
  });
  return {grads.query, grads.keys, grads.values, grads.weight, grads.bias};
}

Tensor attention_prepare_cpu(Tensor keys, OptionalTensor lengths) {
  const char* op = "attention_prepare";
  const Arguments arguments{{keys, keys, keys, {}, {}, lengths, {}, {}, 1.0}};
  arguments.check(op);
  Tensor prepared = pooled_empty(keys, {keys.size(0), keys.size(1), prepared_columns(keys.size(2))},
                                 accumulate_type(keys.scalar_type()));
  with_storage_type(op, keys.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    AttentionPrepare<S> p{arguments.inputs<S>(), write<Acc<S>>(prepared)};
    for_sentences(arguments, p.in, [&](int64_t begin, int64_t end, void* scratch) {
      kernels<S>().attention_prepare(p, begin, end, scratch);
    });
  });
  return prepared;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&attention_backward_cpu));
  m.impl("attention_prepare", TORCH_BOX(&attention_prepare_cpu));
}

}  // namespace fastseq
