// Shared by the decoder operators on the CPU: arguments, checks, division of the work among threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/isa/kernel_table.h"
#include "cpu/kernels/decoder_params.h"
#include "cpu/ops/arguments.h"
#include "cpu/ops/lstm_layer.h"
#include "cpu/runtime/pool.h"

namespace fastseq::cpu {

// The attention's arguments, all absent without attention.
struct DecoderAttention {
  OptionalTensor combine;                   // (H, D + H)
  OptionalTensor query_weight, query_bias;  // (A, H), (A,) of the additive score
  OptionalTensor score_weight, gain;        // (A,), (); gain: the score's weight is gain * score_weight / norm
  OptionalTensor keys, memory, lengths;     // (B, P, A), (B, P, D), (B,)
  OptionalTensor prepared;                  // attention_prepare(keys, ...)
  double scale;

  bool present() const { return memory.has_value(); }
  int64_t width() const { return memory->size(2); }
  int64_t size() const { return keys->size(2); }
  int64_t positions() const { return memory->size(1); }
};

// weights: per layer W_ih, W_hh; biases: per layer b_ih, b_hh, or for the upper layers alone. N rows.
struct DecoderArguments {
  const char* op;
  int64_t rows, hidden, layers, input_columns;  // N, H, L; columns of the first layer's W_ih
  ScalarType dtype;
  const Tensor &h0, &c0;  // (L, N, H)
  const OptionalTensor& feed;
  const std::vector<Tensor>&weights, &biases;
  const DecoderAttention& attention;

  int64_t sentences() const { return attention.present() ? attention.memory->size(0) : rows; }
  int64_t rows_each() const { return sentences() ? rows / sentences() : 1; }
  int64_t work() const;  // multiply-adds of one step of one row
  bool upper_biases() const { return static_cast<int64_t>(biases.size()) < 2 * layers; }
  void check() const;

 private:
  void check_attention() const;
};

template <class S>
int64_t packed_elements(int64_t M, int64_t K, bool is_gates) {
  const int64_t lanes = kernels<S>().gate_units;
  return is_gates ? divide_up(M / 4, lanes) * 4 * lanes * K : divide_up(M, 4 * lanes) * 4 * lanes * K;
}

// Reads a weight (M, K), or one packed by decoder_pack.
template <class S>
DecoderWeight<S> read_weight(const char* op, const char* name, const Tensor& t, int64_t M, int64_t K, bool is_gates) {
  if (t.dim() != 1) return {read<S>(t), nullptr, M, K};
  const int64_t elements = packed_elements<S>(M, K, is_gates);
  STD_TORCH_CHECK(t.numel() == elements, op, ": ", name, " must have the shape ", to_string(Shape{M, K}), ", or ",
                  elements, " packed elements, got ", t.numel());
  return {read<S>(t), t.const_data_ptr(), M, K};
}

// Weights of the layers and of the attention, for the kernels' parameters.
template <class S>
struct DecoderWeights {
  std::vector<DecoderLayer<S>> layers;
  DecoderWeight<S> combine{}, query{};
  std::vector<S> score_weight;  // (A,) with the norm of gain

  explicit DecoderWeights(const DecoderArguments& x);
};

template <class S>
DecoderWeights<S>::DecoderWeights(const DecoderArguments& x) {
  const int64_t H = x.hidden, skipped = x.upper_biases() ? 2 : 0;
  for (int64_t k = 0; k < x.layers; ++k) {
    DecoderLayer<S> layer{};
    layer.input = read_weight<S>(x.op, "weight_ih", x.weights[2 * k], 4 * H, k == 0 ? x.input_columns : H, true);
    layer.hidden = read_weight<S>(x.op, "weight_hh", x.weights[2 * k + 1], 4 * H, H, true);
    if (2 * k >= skipped && !x.biases.empty()) {
      layer.bias_input = read<S>(x.biases[2 * k - skipped]);
      layer.bias_hidden = read<S>(x.biases[2 * k + 1 - skipped]);
    }
    layers.push_back(layer);
  }
  const DecoderAttention& a = x.attention;
  if (!a.present()) return;
  combine = read_weight<S>(x.op, "combine", *a.combine, H, a.width() + H, false);
  if (a.query_weight) query = read_weight<S>(x.op, "query_weight", *a.query_weight, a.size(), H, false);
  if (!a.gain) return;
  const S* const v = read<S>(a.score_weight);
  S squares = 0;
  for (int64_t i = 0; i < a.size(); ++i) squares += v[i] * v[i];
  const S norm = std::max(std::sqrt(squares), S(1e-12));  // as torch.nn.functional.normalize
  for (int64_t i = 0; i < a.size(); ++i) score_weight.push_back(*read<S>(a.gain) * (v[i] / norm));
}

// Fills the fields of AttentionInputParams but for the query.
template <class S>
AttentionInputParams<S> attention_params(const DecoderArguments& x, const DecoderWeights<S>& weights) {
  AttentionInputParams<S> in{};
  in.steps = x.rows_each();
  const DecoderAttention& a = x.attention;
  if (!a.present()) return in;
  const auto strided = [](const Tensor& t) {
    return Strided<const S>{read<S>(t), t.stride(0), t.stride(1), t.stride(2)};
  };
  in.positions = a.positions(), in.size = a.size(), in.width = a.width();
  in.keys = strided(*a.keys), in.values = strided(*a.memory);
  in.weight = a.gain ? weights.score_weight.data() : read<S>(a.score_weight);
  in.lengths = read<int64_t>(a.lengths);
  in.prepared = read<S>(a.prepared);
  in.scale = static_cast<S>(a.scale);
  return in;
}

// Calls run(S{}) for the dtypes of the decoder kernels.
template <class Run>
void with_decoder_type(const char* op, ScalarType dtype, const Run& run) {
  if (dtype == ScalarType::Float) return run(float{});
  if (dtype == ScalarType::Double) return run(double{});
  STD_TORCH_CHECK(false, op, ": the dtype must be Float or Double, got ", dtype);
}

// Members of one team for all sentences.
int64_t plan_decoder_team(const DecoderArguments& x, int64_t steps, int64_t panels);

// Blocks of sentences, each run by a team. panels: the fewest that a team can divide.
ThreadPlan plan_decoder(const DecoderArguments& x, int64_t steps, int64_t panels);

// Calls run(begin, end, team, members, share, scratch) for each block of sentences, on the plan's threads.
template <class S, class Run>
void run_blocks(const DecoderArguments& x, int64_t steps, const AttentionInputParams<S>& attention, const Run& run) {
  const ThreadPlan plan = plan_decoder(x, steps, divide_up(x.hidden, kernels<S>().panel_columns));
  const int64_t bytes = x.attention.present() ? divide_up(attention_scratch_bytes(attention), 64) * 64 : 0;
  const PooledScratch scratch(plan.blocks * plan.members * bytes);
  const int64_t B = x.sentences();
  run_teams(1, plan, [&](int64_t, int64_t block, int64_t, ThreadTeam& team, ThreadTeam::Share share) {
    run(B * block / plan.blocks, B * (block + 1) / plan.blocks, team, plan.members, share,
        scratch.at((block * plan.members + share.begin) * bytes));
  });
}

// Calls run(team, members, share, scratch) on a team of threads for all sentences at once.
template <class S, class Run>
void run_whole(const DecoderArguments& x, int64_t steps, const AttentionInputParams<S>& attention, const Run& run) {
  const int64_t members = plan_decoder_team(x, steps, divide_up(x.hidden, kernels<S>().panel_columns));
  const int64_t bytes = x.attention.present() ? divide_up(attention_scratch_bytes(attention), 64) * 64 : 0;
  const PooledScratch scratch(members * bytes);
  run_teams(1, {1, members, true}, [&](int64_t, int64_t, int64_t, ThreadTeam& team, ThreadTeam::Share share) {
    run(team, members, share, scratch.at(share.begin * bytes));
  });
}

// Weights, states and attention of `steps` steps; the caller fills the rest.
template <class S>
DecoderForwardParams<S> forward_params(const DecoderArguments& x, const DecoderWeights<S>& weights, int64_t steps) {
  DecoderForwardParams<S> p{};
  p.steps = steps, p.rows = x.rows, p.hidden = x.hidden, p.layers = x.layers;
  p.layer = weights.layers.data();
  p.h0 = read<S>(x.h0), p.c0 = read<S>(x.c0), p.feed = read<S>(x.feed);
  p.attends = x.attention.present();
  p.attention = attention_params(x, weights);
  p.query = weights.query, p.combine = weights.combine;
  p.query_bias = read<S>(x.attention.query_bias);
  return p;
}

template <class S>
void run_forward(const DecoderArguments& x, const DecoderForwardParams<S>& p) {
  run_blocks(x, p.steps, p.attention,
             [&](int64_t begin, int64_t end, auto& team, int64_t members, auto share, void* at) {
               kernels<S>().decoder_forward(p, begin, end, team, members, share, at);
             });
}

}  // namespace fastseq::cpu
