// The operator decoder_backward on the CPU: checks, outputs, packing, threads. The arithmetic is in
// decoder_backward-inl.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/ops/decoder_arguments.h"

namespace fastseq::cpu {
namespace {

// Weights (K, M) of products with gradients, packed by columns.
template <class S>
class GradientWeights {
 public:
  GradientWeights(const DecoderArguments& x) : memory_(bytes(x)), hidden(x.layers), input(x.layers) {
    const int64_t H = x.hidden;
    char* next = memory_.at(0);
    for (int64_t k = 0; k < x.layers; ++k) {
      input[k] = pack(x.weights[2 * k], 4 * H, H, next);
      hidden[k] = pack(x.weights[2 * k + 1], 4 * H, H, next);
    }
    const DecoderAttention& a = x.attention;
    combine = pack(*a.combine, H, a.width() + H, next);
    if (a.query_weight) query = pack(*a.query_weight, a.size(), H, next);
  }

 private:
  static int64_t size(int64_t K, int64_t M) {
    return divide_up(packed_elements<S>(M, K, false) * static_cast<int64_t>(sizeof(S)), 64) * 64;
  }
  static int64_t bytes(const DecoderArguments& x) {
    const DecoderAttention& a = x.attention;
    const int64_t H = x.hidden, query = a.query_weight ? size(a.size(), H) : 0;
    return 2 * x.layers * size(4 * H, H) + size(H, a.width() + H) + query;
  }
  static DecoderWeight<S> pack(const Tensor& t, int64_t K, int64_t M, char*& next) {
    const Kernels<S>& k = kernels<S>();
    void* const packed = next;
    run_tasks(divide_up(M, k.panel_columns), kGrain / 2 / (k.panel_columns * K + 1) + 1,
              [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) k.pack_columns(read<S>(t), K, M, i, packed);
              });
    next += size(K, M);
    return {nullptr, packed, M, K};
  }

  const PooledScratch memory_;

 public:
  std::vector<DecoderWeight<S>> hidden, input;
  DecoderWeight<S> combine{}, query{};
};

Tensor zeros(const Shape& shape, ScalarType dtype) {
  Tensor t = result_empty(shape, dtype);
  if (t.numel()) std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size());
  return t;
}

using BackwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResults decoder_backward_cpu(Tensor grad_vectors,
                                     OptionalTensor grad_weights,
                                     OptionalTensor grad_h_n,
                                     OptionalTensor grad_c_n,
                                     Tensor h,
                                     Tensor c,
                                     Tensor feed,
                                     std::vector<Tensor> weights,
                                     OptionalTensor masks,
                                     Tensor combine,
                                     OptionalTensor query_weight,
                                     OptionalTensor score_weight,
                                     Tensor keys,
                                     Tensor memory,
                                     OptionalTensor lengths,
                                     OptionalTensor prepared,
                                     Tensor vectors,
                                     Tensor attention_weights,
                                     Tensor cell_states,
                                     Tensor activations,
                                     Tensor queries,
                                     double scale) {
  const char* op = "decoder_backward";
  check_rank(op, "vectors", vectors, 3, "(T, N, H)");
  check_rank(op, "h", h, 3, "(L, N, H)");
  const int64_t T = vectors.size(0), L = h.size(0), N = h.size(1), H = h.size(2);
  const ScalarType dtype = h.scalar_type();
  const OptionalTensor fed = feed, present_combine = combine, present_keys = keys, present_memory = memory;
  const DecoderAttention attention{present_combine, query_weight,   std::nullopt, score_weight, std::nullopt,
                                   present_keys,    present_memory, lengths,      prepared,     scale};
  const Tensor none = result_empty({4 * H}, dtype);  // the backward reads no biases
  const std::vector<Tensor> biases(2 * (L - 1), none);
  const DecoderArguments x{op, N, H, L, H, dtype, h, c, fed, weights, biases, attention};
  x.check();
  const int64_t A = attention.size(), D = attention.width(), P = attention.positions(), B = x.sentences();
  check_cpu(op, "grad_vectors", grad_vectors, {T, N, H}, dtype);
  check_optional(op, "grad_weights", grad_weights, {T, N, P}, dtype);
  check_optional(op, "grad_h_n", grad_h_n, {L, N, H}, dtype);
  check_optional(op, "grad_c_n", grad_c_n, {L, N, H}, dtype);
  check_optional(op, "masks", masks, {L - 1, T, N, H}, dtype);
  check_cpu(op, "vectors", vectors, {T, N, H}, dtype);
  check_cpu(op, "attention_weights", attention_weights, {T, N, P}, dtype);
  check_cpu(op, "cell_states", cell_states, {L, T, N, H}, dtype);
  check_cpu(op, "activations", activations, {L, T, N, 4 * H}, dtype);
  check_cpu(op, "queries", queries, {T, N, A}, dtype);

  const bool additive = query_weight.has_value();
  const auto empty = [&](const Shape& shape) { return result_empty(shape, dtype); };
  BackwardResults results{empty({L, T, N, 4 * H}),
                          empty({T, N, H}),
                          empty({T, N, D + H}),
                          empty({T, N, A}),
                          empty(additive ? Shape{0} : Shape{T, N, P}),
                          zeros(additive ? Shape{B, P, whole_columns(A)} : Shape{0}, dtype),
                          zeros(additive ? Shape{B, whole_columns(A)} : Shape{0}, dtype),
                          empty({L, N, H}),
                          zeros({L, N, H}, dtype),
                          empty({N, H})};
  with_decoder_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    const DecoderWeights<S> read_weights(x);
    const GradientWeights<S> packed(x);
    DecoderBackwardParams<S> p{};
    p.steps = T, p.rows = N, p.hidden = H, p.layers = L;
    p.hidden_weight = packed.hidden.data(), p.input_weight = packed.input.data();
    p.combine = packed.combine, p.query = packed.query;
    p.attention = attention_params(x, read_weights);
    p.masks = L > 1 ? read<S>(masks) : nullptr;
    p.c0 = read<S>(c), p.c = read<S>(cell_states), p.activations = read<S>(activations);
    p.queries = read<S>(queries), p.weights = read<S>(attention_weights), p.vectors = read<S>(vectors);
    p.grad_vectors = read<S>(grad_vectors), p.grad_weights = read<S>(grad_weights);
    p.grad_h_n = read<S>(grad_h_n);
    auto& [gates, sums, joined, grad_queries, scores, key_sums, weight_sums, grad_h0, grad_c0, grad_feed] = results;
    p.grad_gates = write<S>(gates), p.grad_sums = write<S>(sums), p.grad_joined = write<S>(joined);
    p.grad_queries = write<S>(grad_queries), p.grad_scores = write<S>(scores);
    p.key_sums = write<S>(key_sums), p.weight_sums = write<S>(weight_sums);
    p.grad_h0 = write<S>(grad_h0), p.grad_c0 = write<S>(grad_c0), p.grad_feed = write<S>(grad_feed);
    if (grad_c_n && p.grad_c0) std::memcpy(p.grad_c0, read<S>(grad_c_n), L * N * H * sizeof(S));
    run_blocks(x, T, p.attention, [&](int64_t begin, int64_t end, auto& team, int64_t members, auto share, void* at) {
      kernels<S>().decoder_backward(p, begin, end, team, members, share, at);
    });
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("decoder_backward", TORCH_BOX(&Retried<&decoder_backward_cpu>::run));
}

}  // namespace fastseq::cpu
