// Forward of the decoder over a block of sentences, all steps (decoder_params.h).
//
// A team of threads divides the panels of every product, and the sentences of the attention; a barrier follows each.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/attention_forward-inl.h"
#include "cpu/kernels/cell-inl.h"
#include "cpu/kernels/decoder_params.h"
#include "cpu/kernels/decoder_products-inl.h"
#include "cpu/kernels/vector-inl.h"
#include "cpu/runtime/team.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// Sentences [begin, end) on one member of a team.
template <class S>
struct DecoderBlock {
  int64_t begin, end, rows_each;
  ThreadTeam& team;
  ThreadTeam::Share share;
  int64_t members;
  bool reversed =
      false;  // order of the panels: alternates, so a step begins with those that the last left in the cache

  int64_t first_row() const { return begin * rows_each; }
  int64_t last_row() const { return end * rows_each; }
  // This member's part of `count` items.
  int64_t first(int64_t count) const { return count * share.begin / members; }
  int64_t last(int64_t count) const { return count * share.end / members; }
  bool wait() { return team.wait(share); }

  template <class Finish>
  FASTSEQ_INLINE void products(const DecoderSegment<S>* segments,
                               int64_t count,
                               const PanelRows<S>& rows,
                               const Finish& finish) const {
    const int64_t panels = rows.panels();
    for_each_product(segments, count, rows, first_row(), last_row(), first(panels), last(panels), reversed, finish);
  }
};

template <class S>
struct DecoderForward {
  const DecoderForwardParams<S>& p;
  DecoderBlock<S> block;
  void* scratch;  // attention_scratch_bytes

  int64_t state_rows() const { return p.rows * p.hidden; }
  // States (N, H) of a layer after step t; before the first step for t = -1.
  S* h(int64_t t, int64_t layer) const { return state(p.h0, p.h, t, layer); }
  S* c(int64_t t, int64_t layer) const { return state(p.c0, p.c, t, layer); }
  S* state(const S* start, S* steps, int64_t t, int64_t layer) const {
    return t < 0 ? const_cast<S*>(start) + layer * state_rows() : steps + (layer * p.steps + t) * state_rows();
  }
  const S* feed(int64_t t) const { return t == 0 ? p.feed : p.vectors + (t - 1) * state_rows(); }
  S* inputs(int64_t t, int64_t layer) const { return p.inputs + ((layer - 1) * p.steps + t) * state_rows(); }
};

// Segments of a layer's gates.
template <class S>
int64_t gate_segments(const DecoderForward<S>& job, int64_t t, int64_t k, DecoderSegment<S>* segments) {
  const DecoderForwardParams<S>& p = job.p;
  const DecoderLayer<S>& layer = p.layer[k];
  const int64_t H = p.hidden, E = p.embedding_dim;
  int64_t count = 0;
  if (k > 0) {
    segments[count++] = {&layer.input, 0, H, p.masks ? job.inputs(t, k) : job.h(t, k - 1), H, nullptr};
  } else {
    if (p.embedding) segments[count++] = {&layer.input, 0, E, p.embedding, E, p.tokens};
    if (p.feed) segments[count++] = {&layer.input, E, H, job.feed(t), H, nullptr};
  }
  segments[count++] = {&layer.hidden, 0, H, job.h(t - 1, k), H, nullptr};
  return count;
}

template <class S>
void decoder_cells(const DecoderForward<S>& job, int64_t t, int64_t k) {
  const DecoderForwardParams<S>& p = job.p;
  const DecoderLayer<S>& layer = p.layer[k];
  const int64_t H = p.hidden, N = p.rows;
  DecoderSegment<S> segments[3];
  const int64_t count = gate_segments(job, t, k, segments);
  const S* const c_before = job.c(t - 1, k);
  S *const h = job.h(t, k), *const c = job.c(t, k);
  const S* const mask = p.masks && k + 1 < p.layers ? p.masks + (k * p.steps + t) * N * H : nullptr;
  job.block.products(segments, count, PanelRows<S>{4 * H, true}, [&](int64_t row, int64_t panel, Vec<S>(&sums)[4]) {
    const int64_t unit = panel * kLanes<S>, n = H - unit, at = row * H + unit;
    for (int64_t q = 0; q < 4; ++q) {
      if (k == 0 && p.gates) sums[q] += vload(p.gates + (t * N + row) * 4 * H + q * H + unit, n);
      if (k == 0 && p.table) sums[q] += vload(p.table + p.tokens[row] * 4 * H + q * H + unit, n);
      if (layer.bias_input) sums[q] += vload(layer.bias_input + q * H + unit, n);
      if (layer.bias_hidden) sums[q] += vload(layer.bias_hidden + q * H + unit, n);
    }
    Vec<S> state = vload(c_before + at, n);
    const Vec<S> output = cell_update<S>(sums, state);
    vstore(state, c + at, n);
    vstore(output, h + at, n);
    if (mask) vstore(output * vload(mask + at, n), job.inputs(t, k + 1) + at, n);
    if (p.activations) store_gates(sums, p.activations + ((k * p.steps + t) * N + row) * 4 * H + unit, H, n);
  });
}

// Stores finish(sums) of a product of neighbouring columns to out (N, M).
template <class S, class Function>
FASTSEQ_INLINE void decoder_columns(const DecoderBlock<S>& block,
                                    const DecoderSegment<S>* segments,
                                    int64_t count,
                                    int64_t M,
                                    const S* bias,  // (M,) or null
                                    S* out,
                                    const Function& function) {
  block.products(segments, count, PanelRows<S>{M, false}, [&](int64_t row, int64_t panel, Vec<S>(&sums)[4]) {
    for (int64_t q = 0; q < 4; ++q) {
      const int64_t column = (panel * 4 + q) * kLanes<S>, n = M - column;
      if (n <= 0) return;
      if (bias) sums[q] += vload(bias + column, n);
      vstore(function(sums[q]), out + row * M + column, n);
    }
  });
}

template <class S>
void decoder_attention(const DecoderForward<S>& job, int64_t t) {
  const DecoderForwardParams<S>& p = job.p;
  const int64_t K = p.attention.steps, A = p.attention.size;
  AttentionForwardParams<S> attention{p.attention, p.contexts + t * p.contexts_stride, nullptr};
  const S* const queries = p.query.rows ? p.queries + t * p.queries_stride : job.h(t, p.layers - 1);
  attention.in.query = {queries, K * A, A, 1};
  if (p.weights) attention.weights = p.weights + t * p.rows * p.attention.positions;
  const int64_t sentences = job.block.end - job.block.begin;
  for (int64_t i = job.block.first(sentences); i < job.block.last(sentences); ++i) {
    attention_forward_sentence(attention, job.block.begin + i, Arena{static_cast<char*>(job.scratch)});
  }
}

// Step t of all layers, with the attentional vector. Returns true if this thread continues.
template <class S>
bool decoder_step(DecoderForward<S>& job, int64_t t) {
  const DecoderForwardParams<S>& p = job.p;
  const int64_t H = p.hidden, D = p.attention.width;
  const auto identity = [](Vec<S> x) FASTSEQ_LAMBDA_INLINE { return x; };
  for (int64_t k = 0; k < p.layers; ++k) {
    decoder_cells(job, t, k);
    if (!job.block.wait()) return false;
  }
  if (!p.attends) return true;
  const S* const h = job.h(t, p.layers - 1);
  if (p.query.rows) {
    const DecoderSegment<S> segment{&p.query, 0, H, h, H, nullptr};
    decoder_columns(job.block, &segment, 1, p.query.M, p.query_bias, p.queries + t * p.queries_stride, identity);
    if (!job.block.wait()) return false;
  }
  decoder_attention(job, t);
  if (!job.block.wait()) return false;
  const DecoderSegment<S> segments[2] = {
      {&p.combine, 0, D, p.contexts + t * p.contexts_stride, D, nullptr},
      {&p.combine, D, H, h, H, nullptr},
  };
  decoder_columns(job.block, segments, 2, H, static_cast<const S*>(nullptr), p.vectors + t * job.state_rows(),
                  [](Vec<S> x) FASTSEQ_LAMBDA_INLINE { return vtanh(x); });
  return job.block.wait();
}

// Logits (N, V) of step t.
template <class S>
void decoder_logits(const DecoderForward<S>& job, int64_t t) {
  const DecoderForwardParams<S>& p = job.p;
  const S* const vectors = p.attends ? p.vectors + t * job.state_rows() : job.h(t, p.layers - 1);
  const DecoderSegment<S> segment{&p.output, 0, p.hidden, vectors, p.hidden, nullptr};
  decoder_columns(job.block, &segment, 1, p.output.M, p.output_bias, p.logits,
                  [](Vec<S> x) FASTSEQ_LAMBDA_INLINE { return x; });
}

template <class S>
void decoder_forward(const DecoderForwardParams<S>& p,
                     int64_t begin,  // sentences of the block
                     int64_t end,
                     ThreadTeam& team,
                     int64_t members,
                     ThreadTeam::Share share,
                     void* scratch) {  // attention_scratch_bytes
  const FlushDenormals flush;
  DecoderForward<S> job{p, {begin, end, p.attention.steps, team, share, members}, scratch};
  for (int64_t t = 0; t < p.steps; ++t) {
    job.block.reversed = (t + p.first_order) % 2 == 1;
    if (!decoder_step(job, t)) return;
  }
  if (!p.logits || p.steps == 0) return;
  decoder_logits(job, p.steps - 1);
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
