// Parameters of the decoder kernels: stacked LSTM cells, attention and attentional vector, step by step. S: storage
// type, float or double, in which the arithmetic runs.
//
//   x_0 = [embedding, feed], x_k = h_{k-1} * mask        h_k, c_k = cell(W_ih x_k + W_hh h_k + b, c_k)
//   context = attention(query of the last h)             vector = tanh(W_c [context, h]), the next step's feed
//
// N rows, K of them for each of B sentences: row n belongs to sentence n / K and attends to its keys. T steps, L
// layers, H hidden units, E embedding columns, F feed columns (H with input feeding, else 0), A query columns, D
// columns of the values, P positions, V outputs.
#pragma once

#include <cstdint>

#include "cpu/kernels/attention_params.h"

namespace fastseq::cpu {

// W (M, K) of a product x W^T.
template <class S>
struct DecoderWeight {
  const S* rows;       // (M, K) contiguous, read in place if not packed
  const void* packed;  // panels of depth K (gemm-inl.h), or null
  int64_t M, K;
};

template <class S>
struct DecoderLayer {
  DecoderWeight<S> input;             // (4H, E + F) in the first layer, else (4H, H)
  DecoderWeight<S> hidden;            // (4H, H)
  const S *bias_input, *bias_hidden;  // (4H,) each, or null
};

template <class S>
struct DecoderForwardParams {
  int64_t steps, rows, hidden, embedding_dim, layers;  // T, N, H, E, L
  int64_t first_order;                                 // of the panels in the first step: 0 or 1
  const DecoderLayer<S>* layer;                        // (L,)
  const S* gates;                                      // (T, N, 4H) the embeddings' part of the first gates, or null
  const int64_t* tokens;                               // (N,) rows of `embedding` or `table`, with T = 1, or null
  const S* embedding;                                  // (V, E), or null
  const S* table;                                      // (V, 4H) embedding W^T, or null
  const S *h0, *c0;                                    // (L, N, H)
  const S* feed;                                       // (N, H) of the first step; null without input feeding
  const S* masks;                                      // (L - 1, T, N, H) factors between layers, or null
  bool attends;
  AttentionInputParams<S> attention;  // keys, values, weight, lengths, prepared, scale; steps = K rows a sentence
  DecoderWeight<S> query;             // (A, H); rows null: the query is h
  const S* query_bias;                // (A,) or null
  DecoderWeight<S> combine;           // (H, D + H)
  DecoderWeight<S> output;            // (V, H); rows null: no logits
  const S* output_bias;               // (V,) or null
  S *h, *c;                           // (L, T, N, H) states after each step
  S* activations;                     // (L, T, N, 4H) or null
  S* inputs;                          // (L - 1, T, N, H) masked inputs of the upper layers; null without masks
  S* queries;                         // (T or 1, N, A); null if the query is h
  int64_t queries_stride;             // between the steps of `queries`
  S* contexts;                        // (T or 1, N, D)
  int64_t contexts_stride;            // between the steps of `contexts`
  S* weights;                         // (T, N, P) or null
  S* vectors;                         // (T, N, H); null without attention: the vector is h
  S* logits;                          // (N, V) of the last step, or null
};

// Greedy decoding: `step` holds the first step, with logits and scratch of one. A row is done with the end token or
// after limits[n] steps; it goes on until the call ends.
template <class S>
struct DecoderGreedyParams {
  DecoderForwardParams<S> step;  // tokens, states and feed of the first step
  int64_t most_steps;            // T
  int64_t enough_done;           // the call ends with the step after which this many rows are done
  int64_t end_token;
  const int64_t* forbidden;  // (forbidden_early,): the first forbidden_later of them in all steps
  int64_t forbidden_early, forbidden_later;
  int64_t early_steps;          // steps in which the other ones are forbidden, too
  const int64_t* limits;        // (N,)
  bool* done;                   // (N,) updated
  int64_t* tokens;              // (T, N)
  S* log_probs;                 // (T, N)
  int64_t* parents;             // (N,) scratch
  S *h[2], *c[2], *vectors[2];  // (L, N, H), (L, N, H), (N, H): step t writes the ones at t % 2
  int64_t* steps_run;           // the number of steps
};

// Backward: packed weights (K, M) of products with gradients, and the gradients that the loop over the steps computes.
// Gradients of the weights, of the values, and of the keys of the dot score follow from them by products over all
// steps.
template <class S>
struct DecoderBackwardParams {
  int64_t steps, rows, hidden, layers;                  // T, N, H, L
  const DecoderWeight<S>*hidden_weight, *input_weight;  // (L,) K = 4H, M = H; input_weight[0]: of the feed
  DecoderWeight<S> combine;                             // K = H, M = D + H
  DecoderWeight<S> query;                               // K = A, M = H; not packed: the query is h
  AttentionInputParams<S> attention;                    // as in the forward
  const S* masks;                                       // (L - 1, T, N, H) or null
  const S* c0;                                          // (L, N, H)
  const S *activations, *c;                             // (L, T, N, 4H), (L, T, N, H)
  const S* queries;                                     // (T, N, A): projected, or h of the last layer
  const S* weights;                                     // (T, N, P)
  const S* vectors;                                     // (T, N, H)
  const S *grad_vectors, *grad_weights;                 // (T, N, H), (T, N, P) or null
  const S *grad_h_n, *grad_c_n;                         // (L, N, H) or null
  S* grad_gates;                                        // (L, T, N, 4H)
  S* grad_sums;                                         // (T, N, H) of W_c [context, h]
  S* grad_joined;                                       // (T, N, D + H) of [context, h]
  S* grad_queries;                                      // (T, N, A)
  S* grad_scores;                                       // (T, N, P) of the dot score; null for the additive one
  S *key_sums, *weight_sums;  // (B, P, A'), (B, A') with A' = whole_columns(A); additive score, zeroed
  S *grad_h0, *grad_c0;       // (L, N, H)
  S* grad_feed;               // (N, H)
};

}  // namespace fastseq::cpu
