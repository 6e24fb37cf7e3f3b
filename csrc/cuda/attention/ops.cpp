// Attention operators on CUDA: checks, outputs, workspace, launch. attention_prepare returns nothing here: one step is
// bound by the bytes of its keys, and prepared keys would have at least as many.
#include <tuple>

#include "attention_arguments.h"
#include "cuda/attention/params.h"
#include "cuda/common/operators.h"

namespace fastseq::cuda {
namespace {

// Returns `t` if its last dimension is contiguous, else a copy.
Tensor with_whole_rows(const Tensor& t) {
  const bool whole = t.dim() == 0 || t.size(t.dim() - 1) < 2 || t.stride(t.dim() - 1) == 1;
  return whole ? t : torch::stable::contiguous(t);
}

Rows rows_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

// Checks that AttentionArguments leaves to the device: on the device of `like`, contiguous or at any strides.
auto check_whole(const char* op, const Tensor& like) {
  return [op, &like](const char* name, const Tensor& t, const Shape& shape, ScalarType type) {
    check_like(op, name, t, shape, type, like);
  };
}

auto check_strided(const char* op, const Tensor& like) {
  return [op, &like](const char* name, const Tensor& t, const Shape& shape, ScalarType type) {
    check_like_strided(op, name, t, shape, type, like);
  };
}

struct Arguments : AttentionArguments {
  // True if B, T or S is 0.
  bool empty() const { return batch() * steps() * positions() == 0; }

  void check(const char* op) const;
  // Replaces tensors whose rows are not contiguous by copies.
  void make_rows_whole();
  AttentionInputParams inputs() const;
};

void Arguments::check(const char* op) const {
  AttentionArguments::check(op, check_whole(op, query), check_strided(op, query));
  STD_TORCH_CHECK(weight || !bias, op, ": bias belongs to the additive score; pass weight");
  STD_TORCH_CHECK(!prepared || prepared->numel() == 0, op,
                  ": prepared must be what attention_prepare returned on this device: (0,), got ",
                  to_string(prepared->sizes()));
}

void Arguments::make_rows_whole() {
  for (Tensor* t : {&query, &keys, &values}) *t = with_whole_rows(*t);
  if (coverage) coverage = with_whole_rows(*coverage);
}

AttentionInputParams Arguments::inputs() const {
  AttentionInputParams in{};
  in.batch = batch(), in.steps = steps(), in.positions = positions(), in.size = size(), in.width = width();
  in.query = rows_of(query), in.keys = rows_of(keys), in.values = rows_of(values);
  in.weight = read(weight), in.bias = read(bias);
  in.lengths = static_cast<const int64_t*>(read(lengths));
  if (mask) {
    in.mask = static_cast<const bool*>(mask->const_data_ptr());
    in.mask_batch = mask->stride(0), in.mask_column = mask->stride(2);
    in.mask_row = mask->size(1) == 1 ? 0 : mask->stride(1);
  }
  in.scale = static_cast<float>(scale);
  if (coverage && size() > 0) in.coverage = rows_of(*coverage), in.coverage_weight = read(coverage_weight);
  return in;
}

Tensor workspace(const Tensor& like, int64_t elements) { return empty(like, {elements}, ScalarType::Float); }

float* floats(const Tensor& t) { return static_cast<float*>(write(t)); }

std::tuple<Tensor, Tensor> forward(const char* op, Arguments arguments, bool need_weights) {
  arguments.check(op);
  const Tensor query = arguments.query;
  const Type type = type_of(op, arguments.dtype(), false);
  const OnDeviceOf device(query);
  const int64_t B = arguments.batch(), T = arguments.steps(), D = arguments.width();
  Tensor context = empty(query, {B, T, D}, arguments.dtype());
  Tensor weights = empty(query, need_weights ? Shape{B, T, arguments.positions()} : Shape{0}, ScalarType::Float);
  if (arguments.empty()) {
    torch::stable::zero_(context);
    return {context, weights};
  }
  if (D == 0 && !need_weights) return {context, weights};
  arguments.make_rows_whole();
  AttentionForwardParams p{.in = arguments.inputs(), .context = write(context), .weights = floats(weights)};
  p.splits = attention_splits(p.in);
  const int64_t parts = p.splits > 1 ? B * p.splits : 0;
  const Tensor sums = workspace(query, parts * D), states = workspace(query, parts * 2);
  const Tensor scores = workspace(query, p.in.coverage.data ? B * T * arguments.positions() : 0);
  p.sums = floats(sums), p.states = floats(states), p.scores = p.in.coverage.data ? floats(scores) : nullptr;
  check_launch(op, launch_attention_forward(p, type, device.stream()));
  return {context, weights};
}

std::tuple<Tensor, Tensor> attention_forward_cuda(Tensor query,
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

std::tuple<Tensor, Tensor> attention_coverage_forward_cuda(Tensor query,
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

struct Workspace {
  Tensor grad_softmax, means, query_parts, weight_parts, bias_parts, coverage_parts, coverage_weight_parts;

  Workspace(const char* op, const Arguments& x, bool need_scores) {
    const int64_t rows = need_scores ? x.batch() * x.steps() : 0, sentences = need_scores && x.weight ? x.batch() : 0;
    const int64_t parts = sentences * divide_up(x.positions(), kTanhPositions);
    check_extent(op, "the workspace", Shape{parts, x.steps(), x.size()});
    grad_softmax = workspace(x.query, rows * x.positions());
    means = workspace(x.query, rows * divide_up(x.positions(), kGradPositions));
    query_parts = workspace(x.query, parts * x.steps() * x.size());
    weight_parts = workspace(x.query, parts * x.size());
    bias_parts = workspace(x.query, sentences * divide_up(x.steps(), kSumSteps) * x.size());
    const Shape covered{x.coverage ? divide_up(x.size(), kTanhColumns) : 0, rows, x.positions()};
    check_extent(op, "the workspace", covered);
    coverage_parts = workspace(x.query, covered[0] * rows * x.positions());
    coverage_weight_parts = workspace(x.query, x.coverage ? parts * x.size() : 0);
  }
};

// Gradients of one backward call, empty where not needed.
struct Gradients {
  Tensor query, keys, values, weight, bias, coverage, coverage_weight;

  Gradients(const Arguments& x, bool need_scores, bool need_values)
      : query(allocate(x, need_scores, {x.batch(), x.steps(), x.size()})),
        keys(allocate(x, need_scores, {x.batch(), x.positions(), x.size()})),
        values(allocate(x, need_values, {x.batch(), x.positions(), x.width()})),
        weight(allocate(x, need_scores && x.weight, {x.size()})),
        bias(allocate(x, need_scores && x.weight, {x.size()})),
        coverage(allocate(x, need_scores && x.coverage, {x.batch(), x.steps(), x.positions()})),
        coverage_weight(allocate(x, need_scores && x.coverage, {x.size()})) {}

  void clear() {
    for (Tensor* t : {&query, &keys, &values, &weight, &bias, &coverage, &coverage_weight}) torch::stable::zero_(*t);
  }

 private:
  static Tensor allocate(const Arguments& x, bool needed, const Shape& shape) {
    return empty(x.query, needed ? shape : Shape{0}, x.dtype());
  }
};

Gradients backward(const char* op,
                   Arguments arguments,
                   Tensor grad_context,
                   OptionalTensor grad_weights,
                   const Tensor& weights,
                   bool need_scores,
                   bool need_values) {
  arguments.check(op);
  const Tensor query = arguments.query;
  const int64_t B = arguments.batch(), T = arguments.steps(), S = arguments.positions();
  const ScalarType dtype = arguments.dtype();
  const Type type = type_of(op, dtype, false);
  check_like(op, "weights", weights, {B, T, S}, ScalarType::Float, query);
  check_like_strided(op, "grad_context", grad_context, {B, T, arguments.width()}, dtype, query);
  if (grad_weights) check_like_strided(op, "grad_weights", *grad_weights, {B, T, S}, dtype, query);

  const OnDeviceOf device(query);
  Gradients grads(arguments, need_scores, need_values);
  if (arguments.empty()) {
    grads.clear();
    return grads;
  }
  if (arguments.size() == 0) torch::stable::zero_(grads.coverage);
  arguments.make_rows_whole();
  grad_context = with_whole_rows(grad_context);
  if (grad_weights) grad_weights = with_whole_rows(*grad_weights);
  const Workspace work(op, arguments, need_scores);
  const AttentionBackwardParams p{.in = arguments.inputs(),
                                  .weights = static_cast<const float*>(read(weights)),
                                  .grad_context = rows_of(grad_context),
                                  .grad_weights = grad_weights ? rows_of(*grad_weights) : Rows{},
                                  .need_scores = need_scores,
                                  .need_values = need_values,
                                  .grad_query = write(grads.query),
                                  .grad_keys = write(grads.keys),
                                  .grad_weight = write(grads.weight),
                                  .grad_bias = write(grads.bias),
                                  .grad_values = write(grads.values),
                                  .grad_coverage = write(grads.coverage),
                                  .grad_coverage_weight = write(grads.coverage_weight),
                                  .grad_softmax = floats(work.grad_softmax),
                                  .means = floats(work.means),
                                  .query_parts = floats(work.query_parts),
                                  .weight_parts = floats(work.weight_parts),
                                  .bias_parts = floats(work.bias_parts),
                                  .coverage_parts = floats(work.coverage_parts),
                                  .coverage_weight_parts = floats(work.coverage_weight_parts)};
  check_launch(op, launch_attention_backward(p, type, device.stream()));
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cuda(Tensor grad_context,
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
  const Gradients g =
      backward("attention_backward", arguments, grad_context, grad_weights, weights, need_scores, need_values);
  return {g.query, g.keys, g.values, g.weight, g.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_coverage_backward_cuda(
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
  const Gradients g =
      backward("attention_coverage_backward", arguments, grad_context, grad_weights, weights, need_scores, need_values);
  return {g.query, g.keys, g.values, g.weight, g.bias, g.coverage, g.coverage_weight};
}

Tensor attention_prepare_cuda(Tensor keys, OptionalTensor lengths) {
  const char* op = "attention_prepare";
  check_prepare(op, keys, lengths, check_whole(op, keys), check_strided(op, keys));
  type_of(op, keys.scalar_type(), false);
  return empty(keys, {0}, ScalarType::Float);
}

}  // namespace
}  // namespace fastseq::cuda

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_LIBRARY, FASTSEQ_DISPATCH, m) {
  m.impl("attention_forward", TORCH_BOX(&fastseq::cuda::attention_forward_cuda));
  m.impl("attention_backward", TORCH_BOX(&fastseq::cuda::attention_backward_cuda));
  m.impl("attention_coverage_forward", TORCH_BOX(&fastseq::cuda::attention_coverage_forward_cuda));
  m.impl("attention_coverage_backward", TORCH_BOX(&fastseq::cuda::attention_coverage_backward_cuda));
  m.impl("attention_prepare", TORCH_BOX(&fastseq::cuda::attention_prepare_cuda));
}
