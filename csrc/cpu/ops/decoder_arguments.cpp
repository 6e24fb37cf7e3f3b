#include "cpu/ops/decoder_arguments.h"

namespace fastseq::cpu {

int64_t DecoderArguments::work() const {
  const int64_t H = hidden, gates = 4 * H * (input_columns + H + 2 * H * (layers - 1));
  if (!attention.present()) return gates;
  const int64_t projections = H * (attention.width() + H + (attention.query_weight ? attention.size() : 0));
  return gates + projections + attention.positions() * (attention.size() + attention.width());
}

void DecoderArguments::check() const {
  const int64_t H = hidden, L = layers;
  check_cpu(op, "h", h0, {L, rows, H}, dtype);
  check_cpu(op, "c", c0, {L, rows, H}, dtype);
  check_optional(op, "feed", feed, {rows, H}, dtype);
  const int64_t weight_count = weights.size(), bias_count = biases.size();
  STD_TORCH_CHECK(weight_count == 2 * L, op, ": weights must be weight_ih and weight_hh for each of ", L,
                  " layers, got ", weight_count, " tensors");
  STD_TORCH_CHECK(bias_count == 2 * L || bias_count == 2 * (L - 1), op, ": biases must be bias_ih and bias_hh for ",
                  "each layer, or each but the first, got ", bias_count, " tensors for ", L, " layers");
  for (int64_t i = 0; i < weight_count; ++i) {
    const Tensor& w = weights[i];
    const char* name = i % 2 ? "weight_hh" : "weight_ih";
    check_extent(op, name, Shape{4 * H, input_columns + H});
    check_cpu(op, name, w, w.dim() == 1 ? Shape{w.numel()} : Shape{4 * H, i == 0 ? input_columns : H}, dtype);
  }
  for (int64_t i = 0; i < bias_count; ++i) check_cpu(op, i % 2 ? "bias_hh" : "bias_ih", biases[i], {4 * H}, dtype);
  if (attention.present()) {
    check_attention();
  } else {
    STD_TORCH_CHECK(!feed, op, ": feed needs attention; pass memory");
  }
}

void DecoderArguments::check_attention() const {
  const DecoderAttention& a = attention;
  STD_TORCH_CHECK(a.keys && a.combine, op, ": attention needs memory, keys and combine");
  check_rank(op, "memory", *a.memory, 3, "(B, P, D)");
  check_rank(op, "keys", *a.keys, 3, "(B, P, A)");
  const int64_t B = a.memory->size(0), P = a.positions(), A = a.size(), H = hidden;
  STD_TORCH_CHECK(B == rows || (B > 0 && rows % B == 0), op, ": memory must have one sentence for every row, or for ",
                  "every K rows, got ", B, " sentences for ", rows, " rows");
  check_cpu_strided(op, "memory", *a.memory, {B, P, a.width()}, dtype);
  check_cpu_strided(op, "keys", *a.keys, {B, P, A}, dtype);
  check_extent(op, "weights", Shape{rows, P});
  check_optional(op, "lengths", a.lengths, {B}, ScalarType::Long);
  const auto check_weight = [&](const char* name, const Tensor& t, const Shape& shape) {
    check_cpu(op, name, t, t.dim() == 1 ? Shape{t.numel()} : shape, dtype);
  };
  check_weight("combine", *a.combine, {H, a.width() + H});
  STD_TORCH_CHECK(a.query_weight.has_value() == a.score_weight.has_value(), op,
                  ": query_weight and score_weight belong to the additive score; pass both or neither");
  if (a.query_weight) {
    check_weight("query_weight", *a.query_weight, {A, H});
    check_cpu(op, "score_weight", *a.score_weight, {A}, dtype);
    check_optional(op, "query_bias", a.query_bias, {A}, dtype);
    check_optional(op, "gain", a.gain, {}, dtype);
    check_optional(op, "prepared", a.prepared, {B, P, prepared_columns(A)}, dtype);
    return;
  }
  STD_TORCH_CHECK(A == H, op, ": keys must have ", H, " columns for the dot score, got ", A);
  STD_TORCH_CHECK(!(a.query_bias || a.gain || a.prepared), op,
                  ": query_bias, gain and prepared belong to the additive score; pass query_weight");
}

namespace {

int64_t threads_for(const DecoderArguments& x, int64_t steps) {
  const double work = static_cast<double>(steps) * x.rows * x.work();
  const int64_t most = torch::stable::get_num_threads();
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(work / kGrain, 1e6)), 1, most);
}

}  // namespace

int64_t plan_decoder_team(const DecoderArguments& x, int64_t steps, int64_t panels) {
  return ThreadTeam::oversubscribed() ? 1 : std::min(threads_for(x, steps), std::max<int64_t>(panels, 1));
}

ThreadPlan plan_decoder(const DecoderArguments& x, int64_t steps, int64_t panels) {
  const int64_t threads = threads_for(x, steps);
  if (threads == 1 || x.sentences() >= 4 * threads) return {threads, 1, true};
  return {1, plan_decoder_team(x, steps, panels), true};
}

}  // namespace fastseq::cpu
