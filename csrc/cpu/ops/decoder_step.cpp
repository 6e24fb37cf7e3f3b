// The operators decoder_step and decoder_greedy on the CPU: checks, outputs, threads. The arithmetic is in
// decoder_forward-inl.h and decoder_greedy-inl.h.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "cpu/ops/decoder_arguments.h"

namespace fastseq::cpu {
namespace {

// Alternates the order in which successive calls read the weights. It changes no result.
std::atomic<uint64_t> calls_of_step{0};

void check_tokens(const char* op, const Tensor& tokens, int64_t N, int64_t V) {
  check_cpu(op, "tokens", tokens, {N}, ScalarType::Long);
  const int64_t* const token = read<int64_t>(tokens);
  for (int64_t n = 0; n < N; ++n) {
    STD_TORCH_CHECK(0 <= token[n] && token[n] < V, op, ": tokens must lie in 0 .. ", V - 1, ", got ", token[n]);
  }
}

// The arguments of one step that are neither layers nor attention.
struct StepArguments {
  const DecoderArguments& x;
  const Tensor &tokens, &embedding;
  const OptionalTensor &table, &output_weight, &output_bias;
  int64_t outputs;  // V of the output

  int64_t vocabulary() const { return embedding.size(0); }
  int64_t queries() const { return x.attention.query_weight ? x.attention.size() : 0; }
  int64_t contexts() const { return x.attention.present() ? x.attention.width() : 0; }
  int64_t scratch_elements() const { return x.rows * (queries() + contexts()); }

  void check() const {
    x.check();
    check_cpu(x.op, "embedding", embedding, {vocabulary(), embedding.size(1)}, x.dtype);
    check_optional(x.op, "table", table, {vocabulary(), 4 * x.hidden}, x.dtype);
    check_tokens(x.op, tokens, x.rows, vocabulary());
    if (output_weight) {
      check_extent(x.op, "output_weight", Shape{outputs, x.hidden});
      const bool packed = output_weight->dim() == 1;
      check_cpu(x.op, "output_weight", *output_weight,
                packed ? Shape{output_weight->numel()} : Shape{outputs, x.hidden}, x.dtype);
    }
    check_optional(x.op, "output_bias", output_bias, {outputs}, x.dtype);
  }

  // scratch: scratch_elements().
  template <class S>
  DecoderForwardParams<S> params(const DecoderWeights<S>& weights, S* scratch) const {
    DecoderForwardParams<S> p = forward_params(x, weights, 1);
    p.embedding_dim = embedding.size(1);
    p.first_order = static_cast<int64_t>(calls_of_step.fetch_add(1, std::memory_order_relaxed) % 2);
    p.tokens = read<int64_t>(tokens);
    p.embedding = table ? nullptr : read<S>(embedding);
    p.table = read<S>(table);
    if (output_weight) p.output = read_weight<S>(x.op, "output_weight", *output_weight, outputs, x.hidden, false);
    p.output_bias = read<S>(output_bias);
    p.contexts = scratch, p.queries = scratch + x.rows * contexts();
    return p;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> decoder_step_cpu(Tensor tokens,
                                                                    Tensor embedding,
                                                                    OptionalTensor table,
                                                                    Tensor h,
                                                                    Tensor c,
                                                                    OptionalTensor feed,
                                                                    std::vector<Tensor> weights,
                                                                    std::vector<Tensor> biases,
                                                                    OptionalTensor combine,
                                                                    OptionalTensor query_weight,
                                                                    OptionalTensor query_bias,
                                                                    OptionalTensor score_weight,
                                                                    OptionalTensor gain,
                                                                    OptionalTensor keys,
                                                                    OptionalTensor memory,
                                                                    OptionalTensor lengths,
                                                                    OptionalTensor prepared,
                                                                    OptionalTensor output_weight,
                                                                    OptionalTensor output_bias,
                                                                    double scale,
                                                                    bool need_weights) {
  const char* op = "decoder_step";
  check_rank(op, "h", h, 3, "(L, N, H)");
  check_rank(op, "embedding", embedding, 2, "(V, E)");
  const int64_t L = h.size(0), N = h.size(1), H = h.size(2);
  const ScalarType dtype = h.scalar_type();
  const DecoderAttention attention{combine, query_weight, query_bias, score_weight, gain,
                                   keys,    memory,       lengths,    prepared,     scale};
  const int64_t inputs = embedding.size(1) + (feed ? H : 0);
  const DecoderArguments x{op, N, H, L, inputs, dtype, h, c, feed, weights, biases, attention};
  if (output_weight) check_rank(op, "output_weight", *output_weight, 2, "(V, H)");
  const int64_t V = output_weight ? output_weight->size(0) : 0;
  const StepArguments step{x, tokens, embedding, table, output_weight, output_bias, V};
  step.check();

  const bool attends = attention.present();
  Tensor h_n = result_empty({L, N, H}, dtype), c_n = result_empty({L, N, H}, dtype);
  Tensor vectors = result_empty(attends ? Shape{N, H} : Shape{0}, dtype);
  Tensor logits = result_empty(output_weight ? Shape{N, V} : Shape{0}, dtype);
  Tensor scores = result_empty(attends && need_weights ? Shape{N, attention.positions()} : Shape{0}, dtype);
  with_decoder_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    const DecoderWeights<S> read_weights(x);
    const PooledScratch scratch(step.scratch_elements() * sizeof(S));
    DecoderForwardParams<S> p = step.params(read_weights, scratch.at<S>(0));
    p.h = write<S>(h_n), p.c = write<S>(c_n);
    p.vectors = write<S>(vectors), p.logits = write<S>(logits), p.weights = write<S>(scores);
    run_forward(x, p);
  });
  return {vectors, logits, h_n, c_n, scores};
}

using GreedyResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

GreedyResults decoder_greedy_cpu(Tensor tokens,
                                 Tensor embedding,
                                 OptionalTensor table,
                                 Tensor h,
                                 Tensor c,
                                 OptionalTensor feed,
                                 std::vector<Tensor> weights,
                                 std::vector<Tensor> biases,
                                 OptionalTensor combine,
                                 OptionalTensor query_weight,
                                 OptionalTensor query_bias,
                                 OptionalTensor score_weight,
                                 OptionalTensor gain,
                                 OptionalTensor keys,
                                 OptionalTensor memory,
                                 OptionalTensor lengths,
                                 OptionalTensor prepared,
                                 Tensor output_weight,
                                 OptionalTensor output_bias,
                                 double scale,
                                 int64_t outputs,
                                 Tensor limits,
                                 Tensor done,
                                 Tensor forbidden,
                                 int64_t early_steps,
                                 int64_t end_token,
                                 int64_t enough_done,
                                 int64_t steps) {
  const char* op = "decoder_greedy";
  check_rank(op, "h", h, 3, "(L, N, H)");
  check_rank(op, "embedding", embedding, 2, "(V, E)");
  check_rank(op, "forbidden", forbidden, 1, "(F,)");
  const int64_t L = h.size(0), N = h.size(1), H = h.size(2), F = forbidden.size(0);
  const ScalarType dtype = h.scalar_type();
  const DecoderAttention attention{combine, query_weight, query_bias, score_weight, gain,
                                   keys,    memory,       lengths,    prepared,     scale};
  const int64_t inputs = embedding.size(1) + (feed ? H : 0);
  const DecoderArguments x{op, N, H, L, inputs, dtype, h, c, feed, weights, biases, attention};
  const OptionalTensor output = output_weight;
  const int64_t V = outputs;
  const StepArguments step{x, tokens, embedding, table, output, output_bias, V};
  STD_TORCH_CHECK(1 <= V && V <= step.vocabulary(), op, ": outputs must lie in 1 .. ", step.vocabulary(),
                  ", so that each token has an embedding, got ", V);
  step.check();
  check_cpu(op, "limits", limits, {N}, ScalarType::Long);
  check_cpu(op, "done", done, {N}, ScalarType::Bool);
  check_cpu(op, "forbidden", forbidden, {F}, ScalarType::Long);
  STD_TORCH_CHECK(F >= 1 && 0 <= end_token && end_token < V, op,
                  ": forbidden must end with end_token, a token of the output, got ", F, " columns and ", end_token);
  STD_TORCH_CHECK(steps >= 1, op, ": steps must be at least 1, got ", steps);
  check_extent(op, "tokens", Shape{steps, N});

  const auto empty = [&](const Shape& shape) { return result_empty(shape, dtype); };
  Tensor chosen = result_empty({steps, N}, ScalarType::Long), log_probs = empty({steps, N});
  Tensor done_n = result_empty({N}, ScalarType::Bool), run = result_empty({1}, ScalarType::Long);
  const Tensor h_n[2] = {empty({L, N, H}), empty({L, N, H})}, c_n[2] = {empty({L, N, H}), empty({L, N, H})};
  const Tensor vectors[2] = {empty({N, H}), empty({N, H})};
  int64_t steps_run = 0;
  with_decoder_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    const DecoderWeights<S> read_weights(x);
    const PooledScratch scratch((step.scratch_elements() + N * V) * sizeof(S) + N * sizeof(int64_t));
    int64_t* const parents = scratch.at<int64_t>(0);
    S* const logits = reinterpret_cast<S*>(parents + N);
    DecoderGreedyParams<S> g{};
    g.step = step.params(read_weights, logits + N * V);
    g.step.logits = logits;
    g.most_steps = steps, g.enough_done = enough_done, g.end_token = end_token;
    g.forbidden = read<int64_t>(forbidden);
    g.forbidden_early = F, g.forbidden_later = F - 1, g.early_steps = early_steps;
    g.limits = read<int64_t>(limits);
    g.done = static_cast<bool*>(done_n.mutable_data_ptr());
    if (N > 0) std::memcpy(g.done, done.const_data_ptr(), N);
    g.tokens = write<int64_t>(chosen), g.log_probs = write<S>(log_probs), g.parents = parents;
    for (int side = 0; side < 2; ++side) {
      g.h[side] = write<S>(h_n[side]), g.c[side] = write<S>(c_n[side]), g.vectors[side] = write<S>(vectors[side]);
    }
    g.steps_run = &steps_run;
    run_whole(x, steps, g.step.attention, [&](auto& team, int64_t members, auto share, void* at) {
      kernels<S>().decoder_greedy(g, team, members, share, at);
    });
  });
  *static_cast<int64_t*>(run.mutable_data_ptr()) = steps_run;
  const int last = steps_run % 2 == 0;
  return {run, chosen, log_probs, done_n, h_n[last], c_n[last], vectors[last]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("decoder_step", TORCH_BOX(&Retried<&decoder_step_cpu>::run));
  m.impl("decoder_greedy", TORCH_BOX(&Retried<&decoder_greedy_cpu>::run));
}

}  // namespace fastseq::cpu
