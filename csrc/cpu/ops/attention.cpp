// The attention operators on the CPU: checks, outputs, threads. The arithmetic is in cpu/kernels/attention_*-inl.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "attention_arguments.h"
#include "cpu/isa/kernel_table.h"
#include "cpu/kernels/attention_params.h"
#include "cpu/ops/arguments.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/pool.h"

namespace fastseq::cpu {
namespace {

// Tanh evaluations, or groups of 8 multiply-adds, that pay for another thread.
constexpr int64_t kThreadGrain = 1 << 14;

template <class S>
Strided<const S> strided(const OptionalTensor& t) {
  if (!t) return {};
  return {static_cast<const S*>(t->const_data_ptr()), t->stride(0), t->stride(1), t->stride(2)};
}

// Checks that AttentionArguments leaves to the device: a CPU tensor, contiguous or at any strides.
auto check_whole(const char* op) {
  return [op](const char* name, const Tensor& t, const Shape& shape, ScalarType type) {
    check_cpu(op, name, t, shape, type);
  };
}

auto check_strided(const char* op) {
  return [op](const char* name, const Tensor& t, const Shape& shape, ScalarType type) {
    check_cpu_strided(op, name, t, shape, type);
  };
}

struct Arguments : AttentionArguments {
  void check(const char* op) const;
  template <class S>
  AttentionInputParams<S> inputs() const;
};

void Arguments::check(const char* op) const {
  AttentionArguments::check(op, check_whole(op), check_strided(op));
  STD_TORCH_CHECK(weight || !(bias || prepared), op, ": bias and prepared belong to the additive score; pass weight");
  const Shape shape{batch(), positions(), prepared_columns(size())};
  if (prepared) check_cpu(op, "prepared", *prepared, shape, accumulate_type(dtype()));
}

template <class S>
AttentionInputParams<S> Arguments::inputs() const {
  AttentionInputParams<S> in{};
  in.steps = steps(), in.positions = positions(), in.size = size(), in.width = width();
  in.query = strided<S>(query), in.keys = strided<S>(keys), in.values = strided<S>(values);
  in.weight = read<S>(weight), in.bias = read<S>(bias);
  in.lengths = read<int64_t>(lengths);
  in.mask = strided<bool>(mask);
  if (mask) in.mask.row = mask_row();
  in.prepared = read<Acc<S>>(prepared);
  in.scale = static_cast<Acc<S>>(scale);
  in.coverage = strided<S>(coverage);
  in.coverage_weight = read<S>(coverage_weight);
  return in;
}

// Calls run(begin, end, scratch) for ranges of the batch. A sentence is never divided, so results do not depend on the
// number of threads. work: tanh evaluations of one sentence, or groups of 8 multiply-adds.
template <class S, class Run>
void for_sentences(int64_t batch, int64_t work, const AttentionInputParams<S>& in, const Run& run) {
  parallel_for(batch, kThreadGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    const PooledScratch scratch(attention_scratch_bytes(in));
    run(begin, end, scratch.at(0));
  });
}

// At most kThreadGrain.
template <class S>
int64_t sentence_work(const AttentionInputParams<S>& in) {
  const int64_t columns = in.weight ? in.size + in.width / 8 : (in.size + in.width) / 8;
  const double work = static_cast<double>(in.steps) * in.positions * columns;  // may exceed 64 bits
  return static_cast<int64_t>(std::min<double>(work, kThreadGrain));
}

std::tuple<Tensor, Tensor> forward(const char* op, const Arguments& arguments, bool need_weights) {
  arguments.check(op);
  const int64_t B = arguments.batch(), T = arguments.steps();
  Tensor context = result_empty({B, T, arguments.width()}, arguments.dtype());
  Tensor weights =
      result_empty(need_weights ? Shape{B, T, arguments.positions()} : Shape{0}, accumulate_type(arguments.dtype()));
  with_storage_type(op, arguments.dtype(), [&](auto zero) {
    using S = decltype(zero);
    AttentionForwardParams<S> p{};
    p.in = arguments.inputs<S>();
    p.context = write<S>(context);
    p.weights = write<Acc<S>>(weights);
    for_sentences(B, sentence_work(p.in), p.in, [&](int64_t begin, int64_t end, void* scratch) {
      kernels<S>().attention_forward(p, begin, end, scratch);
    });
  });
  return {context, weights};
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
  const Arguments arguments{{query, keys, values, weight, bias, lengths, mask, prepared, scale}};
  return forward("attention_forward", arguments, need_weights);
}

std::tuple<Tensor, Tensor> attention_coverage_forward_cpu(Tensor query,
                                                          Tensor keys,
                                                          Tensor values,
                                                          Tensor weight,
                                                          OptionalTensor bias,
                                                          OptionalTensor lengths,
                                                          OptionalTensor mask,
                                                          Tensor coverage,
                                                          Tensor coverage_weight,
                                                          double scale,
                                                          bool need_weights) {
  const Arguments arguments{{query, keys, values, weight, bias, lengths, mask, {}, scale, coverage, coverage_weight}};
  return forward("attention_coverage_forward", arguments, need_weights);
}

// Sums rows (B, columns) over the batch, always in the same order, into `sum` (at most `columns` elements).
template <class S>
void sum_sentences(const Acc<S>* rows, int64_t B, int64_t columns, const Tensor& sum) {
  const int64_t size = sum.numel();
  const std::unique_ptr<Acc<S>[]> total(new Acc<S>[columns]());
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < size; ++c) total[c] += rows[b * columns + c];
  }
  for (int64_t c = 0; c < size; ++c) store(total[c], write<S>(sum) + c);
}

// Gradients of one backward call, empty where not needed.
struct AttentionGradients {
  Tensor query, keys, values, weight, bias, coverage, coverage_weight;

  AttentionGradients(const Arguments& x, bool need_scores, bool need_values)
      : query(empty(x, need_scores, {x.batch(), x.steps(), x.size()})),
        keys(empty(x, need_scores, {x.batch(), x.positions(), x.size()})),
        values(empty(x, need_values, {x.batch(), x.positions(), x.width()})),
        weight(empty(x, need_scores && x.weight, {x.size()})),
        bias(empty(x, need_scores && x.weight, {x.size()})),
        coverage(empty(x, need_scores && x.coverage, {x.batch(), x.steps(), x.positions()})),
        coverage_weight(empty(x, need_scores && x.coverage, {x.size()})) {}

 private:
  static Tensor empty(const Arguments& x, bool needed, const Shape& shape) {
    return result_empty(needed ? shape : Shape{0}, x.dtype());
  }
};

template <class S>
void backward(const Arguments& arguments, AttentionBackwardParams<S>& p, const AttentionGradients& grads) {
  const int64_t B = arguments.batch(), columns = p.need_scores && p.in.weight ? whole_columns(p.in.size) : 0;
  const PooledScratch rows(3 * B * columns * sizeof(Acc<S>));  // (3, B, columns): vectors' gradients per sentence
  p.grad_query = write<S>(grads.query);
  p.grad_keys = write<S>(grads.keys);
  p.grad_values = write<S>(grads.values);
  p.grad_weight = rows.at<Acc<S>>(0);
  p.grad_bias = p.grad_weight + B * columns;
  p.grad_coverage_weight = p.grad_bias + B * columns;
  p.grad_coverage = write<S>(grads.coverage);
  for_sentences(B, sentence_work(p.in), p.in, [&](int64_t begin, int64_t end, void* scratch) {
    kernels<S>().attention_backward(p, begin, end, scratch);
  });
  if (columns == 0) return;
  sum_sentences<S>(p.grad_weight, B, columns, grads.weight);
  sum_sentences<S>(p.grad_bias, B, columns, grads.bias);
  if (p.in.coverage.data) sum_sentences<S>(p.grad_coverage_weight, B, columns, grads.coverage_weight);
}

AttentionGradients backward(const char* op,
                            const Arguments& arguments,
                            const Tensor& grad_context,
                            const OptionalTensor& grad_weights,
                            const Tensor& weights,
                            bool need_scores,
                            bool need_values) {
  arguments.check(op);
  arguments.check_backward(weights, grad_context, grad_weights, check_whole(op), check_strided(op));
  const AttentionGradients grads(arguments, need_scores, need_values);
  with_storage_type(op, arguments.dtype(), [&](auto zero) {
    using S = decltype(zero);
    AttentionBackwardParams<S> p{};
    p.in = arguments.inputs<S>();
    p.weights = read<Acc<S>>(weights);
    p.grad_context = strided<S>(grad_context);
    p.grad_weights = strided<S>(grad_weights);
    p.need_scores = need_scores;
    p.need_values = need_values;
    backward(arguments, p, grads);
  });
  return grads;
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
  const Arguments arguments{{query, keys, values, weight, bias, lengths, mask, prepared, scale}};
  const AttentionGradients grads =
      backward("attention_backward", arguments, grad_context, grad_weights, weights, need_scores, need_values);
  return {grads.query, grads.keys, grads.values, grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_coverage_backward_cpu(
    Tensor grad_context,
    OptionalTensor grad_weights,
    Tensor query,
    Tensor keys,
    Tensor values,
    Tensor weight,
    OptionalTensor bias,
    OptionalTensor lengths,
    OptionalTensor mask,
    Tensor coverage,
    Tensor coverage_weight,
    Tensor weights,
    double scale,
    bool need_scores,
    bool need_values) {
  const Arguments arguments{{query, keys, values, weight, bias, lengths, mask, {}, scale, coverage, coverage_weight}};
  AttentionGradients g =
      backward("attention_coverage_backward", arguments, grad_context, grad_weights, weights, need_scores, need_values);
  return {g.query, g.keys, g.values, g.weight, g.bias, g.coverage, g.coverage_weight};
}

Tensor attention_prepare_cpu(Tensor keys, OptionalTensor lengths) {
  const char* op = "attention_prepare";
  check_prepare(op, keys, lengths, check_whole(op), check_strided(op));
  const int64_t B = keys.size(0), S = keys.size(1), A = keys.size(2);
  Tensor prepared = result_empty({B, S, prepared_columns(A)}, accumulate_type(keys.scalar_type()));
  with_storage_type(op, keys.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    AttentionPrepareParams<Element> p{};  // steps and width stay 0: the scratch memory is linear in S
    p.in.positions = S, p.in.size = A;
    p.in.keys = strided<Element>(keys);
    p.in.lengths = read<int64_t>(lengths);
    p.prepared = write<Acc<Element>>(prepared);
    for_sentences(B, S * A, p.in, [&](int64_t begin, int64_t end, void* scratch) {
      kernels<Element>().attention_prepare(p, begin, end, scratch);
    });
  });
  return prepared;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&Retried<&attention_forward_cpu>::run));
  m.impl("attention_backward", TORCH_BOX(&Retried<&attention_backward_cpu>::run));
  m.impl("attention_coverage_forward", TORCH_BOX(&Retried<&attention_coverage_forward_cpu>::run));
  m.impl("attention_coverage_backward", TORCH_BOX(&Retried<&attention_coverage_backward_cpu>::run));
  m.impl("attention_prepare", TORCH_BOX(&Retried<&attention_prepare_cpu>::run));
}

}  // namespace fastseq::cpu
