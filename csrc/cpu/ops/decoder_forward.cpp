// The operators decoder_forward and decoder_pack on the CPU: checks, outputs, packing, threads. The arithmetic is in
// decoder_forward-inl.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/ops/decoder_arguments.h"

namespace fastseq::cpu {
namespace {

template <class S>
void pack_panels(const DecoderWeight<S>& w, bool is_gates, void* out) {
  const Kernels<S>& k = kernels<S>();
  const int64_t elements = k.panel_columns * w.K;
  const int64_t panels = elements ? packed_elements<S>(w.M, w.K, is_gates) / elements : 0;
  run_tasks(panels, kGrain / 2 / (elements + 1) + 1, [&](int64_t begin, int64_t end) {
    const PooledScratch scratch(elements * sizeof(S));
    for (int64_t i = begin; i < end; ++i) k.decoder_pack(w, is_gates, i, scratch.template at<S>(0), out);
  });
}

// Packs the weights of a call of many rows into scratch memory.
template <class S>
class PackedWeights {
 public:
  PackedWeights(const DecoderArguments& x, DecoderWeights<S>& weights) : memory_(bytes(x, weights)) {
    char* next = memory_.at(0);
    for (DecoderLayer<S>& layer : weights.layers) {
      pack(layer.input, true, next);
      pack(layer.hidden, true, next);
    }
    pack(weights.combine, false, next);
    if (weights.query.rows) pack(weights.query, false, next);
  }

 private:
  static int64_t size(const DecoderWeight<S>& w, bool is_gates) {
    return divide_up(packed_elements<S>(w.M, w.K, is_gates) * static_cast<int64_t>(sizeof(S)), 64) * 64;
  }
  static int64_t bytes(const DecoderArguments& x, const DecoderWeights<S>& weights) {
    int64_t total = size(weights.combine, false) + (weights.query.rows ? size(weights.query, false) : 0);
    for (const DecoderLayer<S>& layer : weights.layers) total += size(layer.input, true) + size(layer.hidden, true);
    return total;
  }
  static void pack(DecoderWeight<S>& w, bool is_gates, char*& next) {
    pack_panels(w, is_gates, next);
    w.packed = next;
    next += size(w, is_gates);
  }

  const PooledScratch memory_;
};

using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResults decoder_forward_cpu(Tensor gates,
                                   Tensor h,
                                   Tensor c,
                                   Tensor feed,
                                   std::vector<Tensor> weights,
                                   std::vector<Tensor> biases,
                                   OptionalTensor masks,
                                   Tensor combine,
                                   OptionalTensor query_weight,
                                   OptionalTensor query_bias,
                                   OptionalTensor score_weight,
                                   Tensor keys,
                                   Tensor memory,
                                   OptionalTensor lengths,
                                   OptionalTensor prepared,
                                   double scale) {
  const char* op = "decoder_forward";
  check_rank(op, "gates", gates, 3, "(T, N, 4H)");
  check_rank(op, "h", h, 3, "(L, N, H)");
  const int64_t T = gates.size(0), L = h.size(0), N = h.size(1), H = h.size(2);
  const ScalarType dtype = h.scalar_type();
  const OptionalTensor fed = feed, present_combine = combine, present_keys = keys, present_memory = memory;
  const DecoderAttention attention{present_combine, query_weight,   query_bias, score_weight, std::nullopt,
                                   present_keys,    present_memory, lengths,    prepared,     scale};
  const DecoderArguments x{op, N, H, L, H, dtype, h, c, fed, weights, biases, attention};
  x.check();
  check_cpu(op, "gates", gates, {T, N, 4 * H}, dtype);
  check_optional(op, "masks", masks, {L - 1, T, N, H}, dtype);
  check_extent(op, "activations", Shape{L, T, N, 4 * H});
  check_extent(op, "weights", Shape{T, N, attention.positions()});

  const auto empty = [&](const Shape& shape) { return result_empty(shape, dtype); };
  const bool projects = query_weight.has_value();
  ForwardResults results{empty({T, N, H}),
                         empty({T, N, attention.positions()}),
                         empty({L, T, N, H}),
                         empty({L, T, N, H}),
                         empty({L, T, N, 4 * H}),
                         empty(masks ? Shape{L - 1, T, N, H} : Shape{0}),
                         empty(projects ? Shape{T, N, attention.size()} : Shape{0}),
                         empty({T, N, attention.width()})};
  with_decoder_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    DecoderWeights<S> read_weights(x);
    const PackedWeights<S> packed(x, read_weights);
    DecoderForwardParams<S> p = forward_params(x, read_weights, T);
    p.gates = read<S>(gates);
    p.masks = L > 1 ? read<S>(masks) : nullptr;
    p.vectors = write<S>(std::get<0>(results)), p.weights = write<S>(std::get<1>(results));
    p.h = write<S>(std::get<2>(results)), p.c = write<S>(std::get<3>(results));
    p.activations = write<S>(std::get<4>(results)), p.inputs = write<S>(std::get<5>(results));
    p.queries = write<S>(std::get<6>(results)), p.contexts = write<S>(std::get<7>(results));
    p.queries_stride = projects ? N * attention.size() : 0, p.contexts_stride = N * attention.width();
    run_forward(x, p);
  });
  return results;
}

Tensor decoder_pack_cpu(Tensor weight, bool is_gates) {
  const char* op = "decoder_pack";
  check_rank(op, "weight", weight, 2, "(M, K)");
  const int64_t M = weight.size(0), K = weight.size(1);
  check_cpu(op, "weight", weight, {M, K}, weight.scalar_type());
  STD_TORCH_CHECK(!is_gates || M % 4 == 0, op, ": a weight of gates must have 4H rows, got ", M);
  Tensor packed;
  with_decoder_type(op, weight.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    packed = result_empty({packed_elements<S>(M, K, is_gates)}, weight.scalar_type());
    const DecoderWeight<S> w{read<S>(weight), nullptr, M, K};
    pack_panels(w, is_gates, packed.mutable_data_ptr());
  });
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("decoder_forward", TORCH_BOX(&Retried<&decoder_forward_cpu>::run));
  m.impl("decoder_pack", TORCH_BOX(&Retried<&decoder_pack_cpu>::run));
}

}  // namespace fastseq::cpu
