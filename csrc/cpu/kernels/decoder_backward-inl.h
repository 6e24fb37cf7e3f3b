// Backward of the decoder over a block of sentences, from the last step to the first (decoder_params.h).
//
// A step: the vector's gradient, from the loss and from the feed of the step after; the gradients of [context, h]; the
// attention; the cells, from the last layer to the first. A barrier follows each.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/attention_backward-inl.h"
#include "cpu/kernels/cell-inl.h"
#include "cpu/kernels/decoder_forward-inl.h"
#include "cpu/kernels/decoder_params.h"
#include "cpu/kernels/decoder_products-inl.h"
#include "cpu/kernels/vector-inl.h"
#include "cpu/runtime/team.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

template <class S>
struct DecoderBackward {
  const DecoderBackwardParams<S>& p;
  DecoderBlock<S> block;
  void* scratch;  // attention_scratch_bytes

  int64_t state_rows() const { return p.rows * p.hidden; }
  int64_t at(int64_t t, int64_t layer) const { return (layer * p.steps + t) * p.rows; }
  S* grad_gates(int64_t t, int64_t layer) const { return p.grad_gates + at(t, layer) * 4 * p.hidden; }
  int64_t joined_columns() const { return p.attention.width + p.hidden; }
  S* grad_joined(int64_t t) const { return p.grad_joined + t * p.rows * joined_columns(); }
  S* grad_queries(int64_t t) const { return p.grad_queries + t * p.rows * p.attention.size; }
};

// Calls finish(row, column, n, sum) for the vectors of a product of neighbouring columns.
template <class S, class Finish>
FASTSEQ_INLINE void backward_columns(
    const DecoderBlock<S>& block, const DecoderSegment<S>* segments, int64_t count, int64_t M, const Finish& finish) {
  block.products(segments, count, PanelRows<S>{M, false}, [&](int64_t row, int64_t panel, Vec<S>(&sums)[4]) {
    for (int64_t q = 0; q < 4; ++q) {
      const int64_t column = (panel * 4 + q) * kLanes<S>, n = M - column;
      if (n <= 0) return;
      finish(row, column, n, sums[q]);
    }
  });
}

// Segment of the gate gradients of one layer and step.
template <class S>
DecoderSegment<S> gate_gradients(const DecoderBackward<S>& job, const DecoderWeight<S>& w, int64_t t, int64_t layer) {
  return {&w, 0, 4 * job.p.hidden, job.grad_gates(t, layer), 4 * job.p.hidden, nullptr};
}

template <class S>
void backward_vector(const DecoderBackward<S>& job, int64_t t) {
  const DecoderBackwardParams<S>& p = job.p;
  const int64_t H = p.hidden, start = t * job.state_rows();
  const bool fed = t + 1 < p.steps;
  const DecoderSegment<S> feed = fed ? gate_gradients(job, p.input_weight[0], t + 1, 0) : DecoderSegment<S>{};
  backward_columns(job.block, &feed, fed ? 1 : 0, H, [&](int64_t row, int64_t column, int64_t n, Vec<S> sum) {
    const int64_t at = start + row * H + column;
    const Vec<S> vector = vload(p.vectors + at, n), one = splat(S(1));
    vstore((sum + vload(p.grad_vectors + at, n)) * fnma(vector, vector, one), p.grad_sums + at, n);
  });
}

template <class S>
void backward_joined(const DecoderBackward<S>& job, int64_t t) {
  const int64_t H = job.p.hidden, M = job.joined_columns();
  const DecoderSegment<S> segment{&job.p.combine, 0, H, job.p.grad_sums + t * job.state_rows(), H, nullptr};
  S* const out = job.grad_joined(t);
  backward_columns(job.block, &segment, 1, M,
                   [&](int64_t row, int64_t column, int64_t n, Vec<S> sum) { vstore(sum, out + row * M + column, n); });
}

// Gradients of the additive score of one sentence: of its queries, and sums over the steps for keys and weight.
template <class S>
void add_additive_gradients(const DecoderBackwardParams<S>& p,
                            const AttentionBackwardParams<S>& a,
                            int64_t b,
                            Positions where,
                            Matrix<const S> grads,
                            Arena arena) {
  const AttentionInputParams<S>& in = a.in;
  const int64_t columns = padded_to_vectors<S>(in.size), width = whole_columns(in.size);
  const S* const weight = wide_vector(in.weight, in.size, arena);
  const Matrix<S> grad_query = arena.take_rows<S>(in.steps, in.size);
  std::memset(grad_query.data, 0, in.steps * grad_query.stride * sizeof(S));
  const Matrix<S> key_sums{p.key_sums + b * in.positions * width, width};
  S* const weight_sums = p.weight_sums + b * width;
  with_tanh(in, b, where, arena,
            [&](auto form, Matrix<const S> queries, Matrix<const S> keys, Positions part, int64_t first, Arena) {
              in_groups<kGroup>(columns / kLanes<S>, [&](auto vectors, int64_t v) {
                const int64_t c = v * kLanes<S>;
                for (int64_t t = 0; t < in.steps; ++t) {
                  gradient_tile<decltype(form), 1, decltype(vectors)::count>(
                      Matrix<const S>{queries.row(t) + c, queries.stride}, Matrix<const S>{keys.data + c, keys.stride},
                      Matrix<const S>{grads.row(t) + first, grads.stride}, part.count, false,
                      Matrix<S>{grad_query.row(t) + c, grad_query.stride},
                      Matrix<S>{key_sums.row(first) + c, key_sums.stride}, weight_sums + c);
                }
              });
            });
  for (int64_t t = 0; t < in.steps; ++t) {
    S* const row = grad_query.row(t);
    for (int64_t c = 0; c < columns; c += kLanes<S>) vstore(vload(row + c) * vload(weight + c), row + c);
    store_row(row, in.size, a.grad_query + (b * in.steps + t) * in.size);
  }
}

template <class S>
void add_dot_gradients(const AttentionBackwardParams<S>& a,
                       int64_t b,
                       Positions where,
                       Matrix<const S> grads,
                       S* grad_scores,
                       Arena arena) {
  const AttentionInputParams<S>& in = a.in;
  const Positions all_steps{in.steps, nullptr, 0};
  for (int64_t t = 0; t < in.steps; ++t) {
    S* const row = grad_scores + (b * in.steps + t) * in.positions;
    std::memcpy(row, grads.row(t), where.count * sizeof(S));
    fill_zero(row + where.count, in.positions - where.count);
  }
  S* const data = a.grad_query + b * in.steps * in.size;
  const Matrix<const S> keys = wide_rows(in.keys, b, where, in.size, arena);
  const Matrix<S> grad_query = result_rows(data, in.size, all_steps, arena);
  weighted_sum(Factors<S>{grads.data, grads.stride, 1}, in.steps, keys, where.count, padded_to_vectors<S>(in.size),
               grad_query);
  finish_rows(grad_query, data, in.steps, in.size, all_steps);
}

template <class S>
void backward_attention(const DecoderBackward<S>& job, int64_t t) {
  const DecoderBackwardParams<S>& p = job.p;
  const int64_t K = p.attention.steps, A = p.attention.size, P = p.attention.positions, M = job.joined_columns();
  AttentionBackwardParams<S> a{};
  a.in = p.attention;
  a.in.query = {p.queries + t * p.rows * A, K * A, A, 1};
  a.weights = p.weights + t * p.rows * P;
  a.grad_context = {job.grad_joined(t), K * M, M, 1};
  if (p.grad_weights) a.grad_weights = {p.grad_weights + t * p.rows * P, K * P, P, 1};
  a.grad_query = job.grad_queries(t);
  const Positions all_steps{K, nullptr, 0};
  const int64_t sentences = job.block.end - job.block.begin;
  for (int64_t i = job.block.first(sentences); i < job.block.last(sentences); ++i) {
    const int64_t b = job.block.begin + i;
    Arena arena{static_cast<char*>(job.scratch)};
    const Positions where = attended(a.in, b, arena);
    const Matrix<const S> weights = attended_weights(a, b, where, arena);
    const Matrix<const S> grad_context = wide_rows(a.grad_context, b, all_steps, a.in.width, arena);
    const Matrix<const S> grads = score_gradients(a, b, where, weights, grad_context, arena);
    if (a.in.weight) {
      add_additive_gradients(p, a, b, where, grads, arena);
    } else {
      add_dot_gradients(a, b, where, grads, p.grad_scores + t * p.rows * P, arena);
    }
  }
}

template <class S>
void backward_cells(const DecoderBackward<S>& job, int64_t t, int64_t k) {
  const DecoderBackwardParams<S>& p = job.p;
  const int64_t H = p.hidden, M = job.joined_columns(), A = p.attention.size;
  const bool top = k + 1 == p.layers, last = t + 1 == p.steps;
  DecoderSegment<S> segments[2];
  int64_t count = 0;
  if (!top) {
    segments[count++] = gate_gradients(job, p.input_weight[k + 1], t, k + 1);
    if (p.masks) segments[0].mask = p.masks + job.at(t, k) * H;
  } else if (p.query.packed) {
    segments[count++] = {&p.query, 0, A, job.grad_queries(t), A, nullptr};
  }
  if (!last) segments[count++] = gate_gradients(job, p.hidden_weight[k], t + 1, k);
  const S* const joined = job.grad_joined(t) + p.attention.width;
  const S* const c_before = t == 0 ? p.c0 + k * job.state_rows() : p.c + job.at(t - 1, k) * H;
  S* const grad_c = p.grad_c0 + k * job.state_rows();
  backward_columns(job.block, segments, count, H, [&](int64_t row, int64_t unit, int64_t n, Vec<S> dh) {
    const int64_t at = row * H + unit;
    if (top) dh += vload(joined + row * M + unit, n);
    if (top && !p.query.packed) dh += vload(job.grad_queries(t) + at, n);
    if (last && p.grad_h_n) dh += vload(p.grad_h_n + k * job.state_rows() + at, n);
    const int64_t gate = row * 4 * H + unit;
    Vec<S> gates[4], dc = vload(grad_c + at, n);
    load_gates(p.activations + job.at(t, k) * 4 * H + gate, H, n, gates);
    const Vec<S> tanh_c = vtanh(vload(p.c + job.at(t, k) * H + at, n));
    cell_gradients<S>(gates, vload(c_before + at, n), tanh_c, dh, dc);
    store_gates(gates, job.grad_gates(t, k) + gate, H, n);
    vstore(dc, grad_c + at, n);
  });
}

// Gradients of the states before the first step.
template <class S>
void backward_start(const DecoderBackward<S>& job) {
  const DecoderBackwardParams<S>& p = job.p;
  const int64_t H = p.hidden;
  const auto product = [&](const DecoderWeight<S>& weight, int64_t layer, S* out) {
    const DecoderSegment<S> segment = gate_gradients(job, weight, 0, layer);
    backward_columns(job.block, &segment, 1, H, [&](int64_t row, int64_t column, int64_t n, Vec<S> sum) {
      vstore(sum, out + row * H + column, n);
    });
  };
  for (int64_t k = 0; k < p.layers; ++k) product(p.hidden_weight[k], k, p.grad_h0 + k * job.state_rows());
  product(p.input_weight[0], 0, p.grad_feed);
}

template <class S>
void decoder_backward(const DecoderBackwardParams<S>& p,
                      int64_t begin,  // sentences of the block
                      int64_t end,
                      ThreadTeam& team,
                      int64_t members,
                      ThreadTeam::Share share,
                      void* scratch) {  // attention_scratch_bytes
  const FlushDenormals flush;
  DecoderBackward<S> job{p, {begin, end, p.attention.steps, team, share, members}, scratch};
  for (int64_t t = p.steps - 1; t >= 0; --t) {
    job.block.reversed = t % 2 == 1;
    backward_vector(job, t);
    if (!job.block.wait()) return;
    backward_joined(job, t);
    if (!job.block.wait()) return;
    backward_attention(job, t);
    if (!job.block.wait()) return;
    for (int64_t k = p.layers - 1; k >= 0; --k) {
      backward_cells(job, t, k);
      if (!job.block.wait()) return;
    }
  }
  backward_start(job);
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
