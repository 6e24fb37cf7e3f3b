#include "cpu/ops/lstm_layer.h"

namespace fastseq::cpu {
namespace {

// With a skinny batch a step is bound by reading W_hh: each thread's share of it should fit into the L2 cache.
constexpr int64_t kWeightShareBytes = 1 << 20;

// Largest batch whose step is bound by reading W_hh from beyond the L2 cache, even if it is packed. With 2 threads and
// 16 rows a team takes 0.82 to 0.97 of the time of a divided batch (H = 400 to 1024), with 64 rows 0.96 to 1.02.
constexpr int64_t kTeamRows = 64;

// weight_type: dtype of W_ih and W_hh; all other tensors have that of the input.
LayerArguments check_layer(const char* op,
                           const Tensor& input,
                           const Tensor& h0,
                           const Tensor& c0,
                           const std::vector<Tensor>& weights,
                           const SequenceTable& table,
                           bool reverse,
                           ScalarType weight_type) {
  const int64_t D = c0.size(0), B = c0.size(1), H = c0.size(2), I = input.size(input.dim() - 1);
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(D == 1 || D == 2, op, ": c0 must be for 1 or 2 directions, got ", D);
  const int64_t count = weights.size();
  STD_TORCH_CHECK(count % D == 0 && 2 * D <= count && count <= 5 * D, op,
                  ": weights must be weight_ih, weight_hh and optionally bias_ih, bias_hh and weight_hr for each of ",
                  D, " directions, got ", count, " tensors");
  const bool projected = count / D % 2 == 1;
  if (projected) check_rank(op, "weight_hr", weights.back(), 2, "(P, H)");
  const int64_t P = projected ? weights.back().size(0) : H;
  const LayerArguments layer{input, h0, c0, weights, count >= 4 * D, projected, reverse, I, H, P, B, D, dtype};
  check_extent(op, "activations", Shape{table.seq.rows, D, layer.saved()});
  check_extent(op, "weight_hh", Shape{4 * H, P});
  check_cpu(op, "input", input, with_columns(table.rows, I), dtype);
  check_cpu(op, "h0", h0, {D, B, P}, dtype);
  check_cpu(op, "c0", c0, {D, B, H}, dtype);
  for (int64_t d = 0; d < D; ++d) {
    check_cpu(op, "weight_ih", layer.weight(d, 0), {4 * H, I}, weight_type);
    check_cpu(op, "weight_hh", layer.weight(d, 1), {4 * H, P}, weight_type);
    if (projected) check_cpu(op, "weight_hr", layer.weight_hr(d), {P, H}, dtype);
    if (!layer.bias) continue;
    check_cpu(op, "bias_ih", layer.weight(d, 2), {4 * H}, dtype);
    check_cpu(op, "bias_hh", layer.weight(d, 3), {4 * H}, dtype);
  }
  return layer;
}

}  // namespace

LayerArguments read_layer(const char* op,
                          const Tensor& input,
                          const Tensor& h0,
                          const Tensor& c0,
                          const std::vector<Tensor>& weights,
                          const SequenceTable& table,
                          bool reverse) {
  return check_layer(op, input, h0, c0, weights, table, reverse, input.scalar_type());
}

LayerArguments read_narrow_layer(const char* op,
                                 const Tensor& input,
                                 const Tensor& h0,
                                 const Tensor& c0,
                                 const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& scales,
                                 const SequenceTable& table,
                                 bool reverse) {
  STD_TORCH_CHECK(!weights.empty(), op, ": weights must not be empty");
  const ScalarType type = weights[0].scalar_type();
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float, op, ": input must have the dtype Float, got ",
                  input.scalar_type());
  STD_TORCH_CHECK(type == ScalarType::Char || type == ScalarType::BFloat16, op,
                  ": weight_ih must have the dtype Char or BFloat16, got ", type);
  LayerArguments layer = check_layer(op, input, h0, c0, weights, table, reverse, type);
  STD_TORCH_CHECK(!layer.projected, op, ": a projection needs weights in the dtype of the input; omit weight_hr");
  const int64_t count = scales.size(), expected = type == ScalarType::Char ? 2 * layer.directions : 0;
  STD_TORCH_CHECK(count == expected, op, ": scales must be two for each direction of int8 weights, else none; got ",
                  count, ", expected ", expected);
  for (const Tensor& scale : scales) check_cpu(op, "scale", scale, {4 * layer.hidden}, ScalarType::Float);
  if (count) layer.scales = &scales;
  return layer;
}

ThreadPlan plan_threads(const LayerArguments& layer, const SequenceTable& table, int64_t panels) {
  const int64_t B = layer.batch, D = layer.directions;
  const int64_t work = table.valid_steps * D * (4 * layer.hidden * layer.input_size + layer.step_weights());
  const int64_t threads = std::clamp<int64_t>(work / kGrain, 1, torch::stable::get_num_threads());
  const bool fits = layer.step_weights() * 4 <= kWeightShareBytes;
  const bool together = B > kSkinnyRows || D == 1 || fits;
  const int64_t per_direction = together ? std::max<int64_t>(1, threads / D) : threads;
  // A team reads the weights once a step; threads that divide the batch read them once each, and wait for no other.
  const bool even = panels % per_direction == 0 || panels >= 5 * per_direction;
  const bool is_late = ThreadTeam::oversubscribed();
  const bool read_once = !fits && even && B <= kTeamRows && !is_late;
  const bool split_batch = per_direction == 1 || (B >= 4 * per_direction && !read_once);
  const int64_t shares = split_batch ? per_direction : 1;
  const int64_t blocks = std::min(std::max<int64_t>(B, 1), shares * divide_up(divide_up(B, shares), kBlockRows));
  const bool alone = split_batch || is_late;
  return {std::max<int64_t>(blocks, 1), alone ? 1 : std::min(per_direction, panels), together || alone};
}

}  // namespace fastseq::cpu
