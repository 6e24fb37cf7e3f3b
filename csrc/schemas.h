// Every operator schema, once.
//
// acc stands for float32 where the tensors are float32, bfloat16 or float16, and for float64 where they are float64.
// Rows of a sequence tensor are (T, B), or (N,) if batch_sizes (T,) of a PackedSequence is given; lengths (B,).
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastseq {

template <class Library>
void define_operators(Library& m) {
  // gates (B, 4H) pre-activations, order i f g o; c, c_n, h (B, H); activations (B, 4H) acc.
  m.def("lstm_cell_forward(Tensor gates, Tensor c) -> (Tensor h, Tensor c_n, Tensor activations)");
  m.def(
      "lstm_cell_backward(Tensor activations, Tensor c, Tensor c_n, Tensor? grad_h, Tensor? grad_c_n) "
      "-> (Tensor grad_gates, Tensor grad_c)");
  // One step including its products, without gradients. input (B, I); h, c (B, H); weight_ih (4H, I), weight_hh (4H,
  // H), also in bfloat16 beside float32; bias_ih (4H,) or (B, 4H), bias_hh (4H,).
  m.def(
      "lstm_step(Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh) -> (Tensor h_n, Tensor c_n)");
  // As lstm_step on the CPU, with int8 weights: row r of a weight is scale[r] times its integers. scale (4H,) float32.
  m.def(
      "lstm_step_int8(Tensor input, Tensor h, Tensor c, Tensor weight_ih, Tensor weight_hh, Tensor scale_ih, "
      "Tensor scale_hh, Tensor? bias_ih, Tensor? bias_hh) -> (Tensor h_n, Tensor c_n)");
  // input (B, K) float32 times the rows of weight (N, K), bfloat16, or int8 with scale (N,) float32; bias (N,) float32.
  m.def("linear_narrow(Tensor input, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor");
  // One layer in D directions. input (rows, I); h0 (D, B, P), c0 (D, B, H); weights, per direction: W_ih (4H, I), W_hh
  // (4H, P) and optionally b_ih, b_hh (4H,) and a projection W_hr (P, H), without which P = H; lengths, batch_sizes
  // int64 on the CPU. A single direction may be reversed. output (rows, D * P); activations (rows, D * 4H), with a
  // projection (rows, D * (4H + P)): h follows the gates; cell_states (rows, D * H) acc; results not needed have shape
  // (0,).
  m.def(
      "lstm_forward(Tensor input, Tensor h0, Tensor c0, Tensor[] weights, Tensor? lengths, Tensor? batch_sizes, "
      "bool reverse, bool need_activations, bool need_cell_states) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor activations, Tensor cell_states)");
  // As lstm_forward on the CPU for inference, with W_ih and W_hh in bfloat16, or in int8 with a scale (4H,) for each,
  // without a projection.
  m.def(
      "lstm_forward_narrow(Tensor input, Tensor h0, Tensor c0, Tensor[] weights, Tensor[] scales, Tensor? lengths, "
      "Tensor? batch_sizes, bool reverse, bool need_cell_states) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cell_states)");
  // grad_weights, per direction: gradients of W_ih, of W_hh, of each bias and of W_hr; empty unless need_weights.
  m.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cell_states, Tensor input, "
      "Tensor h0, Tensor c0, Tensor[] weights, Tensor activations, Tensor cell_states, Tensor? lengths, "
      "Tensor? batch_sizes, bool reverse, bool need_input, bool need_weights) "
      "-> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights)");
  // The recurrence of one direction with recurrent dropout, zoneout or layer normalisation, on the CPU. gates (T, B,
  // 4H): the input's part, biases included; h0, c0 (1, B, H); norms (4H,), (H,), (H,), all or none; hidden_mask (B, H)
  // acc; keep_h, keep_c (T, B, H) bool, else a rate. For the backward, else (0,): activations (T, B, 4H), operands (T,
  // B, H), the masked h before each step, and with norms normal (T, B, 4H), statistics (T, B, 3) acc.
  m.def(
      "lstm_variant_forward(Tensor gates, Tensor h0, Tensor c0, Tensor weight_hh, Tensor? norm_hh, Tensor? norm_c, "
      "Tensor? norm_c_bias, Tensor? hidden_mask, Tensor? keep_h, Tensor? keep_c, float rate_h, float rate_c, "
      "Tensor? lengths, bool reverse, bool need_backward, bool need_cell_states) -> (Tensor output, Tensor h_n, "
      "Tensor c_n, Tensor cell_states, Tensor activations, Tensor operands, Tensor normal, Tensor statistics)");
  // grad_products (T, B, 4H): of W_hh h, with norms, else (0,): then they are grad_gates. grad_norms (6H,) acc: of
  // norm_hh, norm_c, norm_c_bias; or (0,).
  m.def(
      "lstm_variant_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cell_states, "
      "Tensor c0, Tensor weight_hh, Tensor? norm_hh, Tensor? norm_c, Tensor? norm_c_bias, Tensor? hidden_mask, "
      "Tensor? keep_h, Tensor? keep_c, float rate_h, float rate_c, Tensor? lengths, bool reverse, Tensor cell_states, "
      "Tensor activations, Tensor? normal, Tensor? statistics) -> (Tensor grad_gates, Tensor grad_products, "
      "Tensor grad_h0, Tensor grad_c0, Tensor grad_norms)");
  // The recurrence of one layer on CUDA, after the product with W_ih. gates (T, B, D * 4H) = input W_ih^T + bias; h0,
  // c0 (D, B, H); weight_hh (D, 4H, H); lengths (B,) int64 on the device. A single direction may be reversed. tf32:
  // float32 products by tensor cores, 10 bits of mantissa. output (T, B, D * H), zero past the lengths; activations (T,
  // B, D * 4H); cell_states (T, B, D * H) acc; results not needed have shape (0,). c0 and c_n may be float32 beside 16
  // bits: a part of a sequence then hands its cell state on without rounding. So may the backward's c0, grad_h_n,
  // grad_c_n, grad_h0 and grad_c0. beside: other recurrences run beside this one, in the room
  // that lstm_recurrence_share states; if that kernel is refused, single steps follow, not another kernel.
  m.def(
      "lstm_recurrence_forward(Tensor gates, Tensor h0, Tensor c0, Tensor weight_hh, Tensor? lengths, bool reverse, "
      "bool tf32, bool need_activations, bool need_cell_states, bool beside=False) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor activations, Tensor cell_states)");
  // grad_output (T, B, D * H), grad_h_n, grad_c_n (D, B, H), grad_cell_states (T, B, D * H).
  // grad_gates (T, B, D * 4H), zero past the lengths.
  m.def(
      "lstm_recurrence_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cell_states, "
      "Tensor activations, Tensor cell_states, Tensor c0, Tensor weight_hh, Tensor? lengths, bool reverse, bool tf32, "
      "bool beside=False) "
      "-> (Tensor grad_gates, Tensor grad_h0, Tensor grad_c0)");
  // Returns true if the current device can run both operators. itemsize: bytes of the tensors' dtype, 4 or 2.
  m.def("lstm_recurrence_fits(int batch, int directions, int hidden, int itemsize, bool tf32) -> bool");
  // Modelled microseconds of a step on the current device (csrc/cuda/lstm/cost.h); infinite where the kernel does not
  // fit. kernel: 0 cluster, 1 grid, 2 step by step, 3 cuDNN.
  m.def(
      "lstm_recurrence_cost(int kernel, int batch, int directions, int hidden, int itemsize, bool tf32) "
      "-> (float forward, float backward)");
  // The kernels that the two operators above take: modelled microseconds of a step, and the part of the device that a
  // kernel holds while it runs; zeros where none fits.
  m.def(
      "lstm_recurrence_share(int batch, int directions, int hidden, int itemsize, bool tf32) "
      "-> (float forward, float forward_share, float backward, float backward_share)");
  // op(a) op(b) + bias of float32 matrices by TF32 tensor cores, whatever torch's flag for matmul says. a (M, K), b (K,
  // N), or their transposes; bias (N,).
  m.def("tf32_product(Tensor a, Tensor b, Tensor? bias, bool transpose_a, bool transpose_b) -> Tensor");
  // Returns true if tf32_product can run: torch exports its cuBLAS handle.
  m.def("tf32_products_available() -> bool");
  // query (B, T, A), keys (B, S, A), values (B, S, D); weight, bias (A,) of the additive score, neither for dot;
  // lengths (B,) int64 or mask (B, 1 or T, S) bool; prepared: attention_prepare(keys, ...). context (B, T, D); weights
  // (B, T, S) acc, or (0,) where not needed.
  m.def(
      "attention_forward(Tensor query, Tensor keys, Tensor values, Tensor? weight, Tensor? bias, Tensor? lengths, "
      "Tensor? mask, Tensor? prepared, float scale, bool need_weights) -> (Tensor context, Tensor weights)");
  // Gradients not needed have shape (0,).
  m.def(
      "attention_backward(Tensor grad_context, Tensor? grad_weights, Tensor query, Tensor keys, Tensor values, "
      "Tensor? weight, Tensor? bias, Tensor? lengths, Tensor? mask, Tensor? prepared, Tensor weights, float scale, "
      "bool need_scores, bool need_values) "
      "-> (Tensor grad_query, Tensor grad_keys, Tensor grad_values, Tensor grad_weight, Tensor grad_bias)");
  // The additive score with coverage (B, T, S) and coverage_weight (A,), which add their product inside the tanh.
  m.def(
      "attention_coverage_forward(Tensor query, Tensor keys, Tensor values, Tensor weight, Tensor? bias, Tensor? "
      "lengths, Tensor? mask, Tensor coverage, Tensor coverage_weight, float scale, bool need_weights) -> (Tensor "
      "context, Tensor weights)");
  m.def(
      "attention_coverage_backward(Tensor grad_context, Tensor? grad_weights, Tensor query, Tensor keys, Tensor "
      "values, Tensor weight, Tensor? bias, Tensor? lengths, Tensor? mask, Tensor coverage, Tensor coverage_weight, "
      "Tensor weights, float scale, bool need_scores, bool need_values) -> (Tensor grad_query, Tensor grad_keys, "
      "Tensor grad_values, Tensor grad_weight, Tensor grad_bias, Tensor grad_coverage, Tensor grad_coverage_weight)");
  // Precomputes the function of the keys (B, S, A), up to the lengths (B,), that the additive score needs, for many
  // calls with these keys. Returns (B, S, A16 + 16) acc, where A16 is A rounded up to 16; on CUDA (0,).
  m.def("attention_prepare(Tensor keys, Tensor? lengths) -> Tensor");
  // input (N, H), weight (V, H), bias (V,), target (N,) int64 in [0, V) or ignore_index. losses (N,) acc; statistics
  // (2, N) acc: largest logit, log of the sum of exp(logit - largest). Gradients of the sum of the losses: grad_input
  // (N, H), grad_weight (V, H) acc, grad_bias (V,) acc; those not needed have shape (0,).
  m.def(
      "linear_cross_entropy_forward(Tensor input, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
      "float label_smoothing, bool need_input, bool need_weight, bool need_bias) "
      "-> (Tensor losses, Tensor statistics, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  // grad (N,) acc, of each loss.
  m.def(
      "linear_cross_entropy_backward(Tensor grad, Tensor statistics, Tensor input, Tensor weight, Tensor? bias, "
      "Tensor target, int ignore_index, float label_smoothing, bool need_input, bool need_weight, bool need_bias) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  // The `count` best continuations of each sentence by score + log_softmax(logits), best first; of equals the lowest
  // (beam, token). logits (B * K, V); scores (B, K) acc, zeros (B * K, 1) if not given; forbidden (F,) or (B * K, F)
  // int64: columns that count as -inf; last_resort is allowed in a row where every column is forbidden. totals (B,
  // count) acc; beams, tokens (B, count) int64.
  m.def(
      "candidates(Tensor logits, Tensor? scores, Tensor? forbidden, int last_resort, int count) "
      "-> (Tensor totals, Tensor beams, Tensor tokens)");
  // One step of a decoder for N rows, K of each of B sentences, without gradients. tokens (N,) int64; embedding (V, E);
  // table (V, 4H): embedding times its columns of W_ih, computed before; h, c (L, N, H); feed (N, H); weights: W_ih,
  // W_hh of each layer, biases: b_ih, b_hh of each; combine (H, D + H); query_weight (A, H), query_bias, score_weight
  // (A,), gain (): additive score, with the norm of score_weight if gain is given; keys (B, P, A), memory (B, P, D),
  // lengths (B,) int64; prepared: attention_prepare(keys, ...); output_weight (V, H), output_bias (V,). Weights of the
  // layers, combine and query_weight also packed by decoder_pack. vector (N, H), logits (N, V), h_n, c_n (L, N, H),
  // weights (N, P); results that are not computed have shape (0,).
  m.def(
      "decoder_step(Tensor tokens, Tensor embedding, Tensor? table, Tensor h, Tensor c, Tensor? feed, "
      "Tensor[] weights, Tensor[] biases, Tensor? combine, Tensor? query_weight, Tensor? query_bias, "
      "Tensor? score_weight, Tensor? gain, Tensor? keys, Tensor? memory, Tensor? lengths, Tensor? prepared, "
      "Tensor? output_weight, Tensor? output_bias, float scale, bool need_weights) "
      "-> (Tensor vector, Tensor logits, Tensor h_n, Tensor c_n, Tensor attention)");
  // Steps of greedy decoding without gradients; arguments as in decoder_step; output_weight (outputs, H), which may be
  // packed by decoder_pack. Each step chooses the most
  // likely token that is not forbidden: forbidden (F,) int64 ends with end_token, which counts in the first
  // `early_steps` steps alone, and is allowed where all are forbidden. A row is done after end_token or after limits[n]
  // steps (N,) int64; done (N,) bool: before. Ends after `steps` steps, or after the one with which `enough_done` rows
  // are done. run (1,) int64: the number of steps R; chosen (steps, N) int64 and log_probs (steps, N), of which the
  // first R are set; done (N,); h_n, c_n (L, N, H) and vector (N, H) after the last.
  m.def(
      "decoder_greedy(Tensor tokens, Tensor embedding, Tensor? table, Tensor h, Tensor c, Tensor? feed, "
      "Tensor[] weights, Tensor[] biases, Tensor? combine, Tensor? query_weight, Tensor? query_bias, "
      "Tensor? score_weight, Tensor? gain, Tensor? keys, Tensor? memory, Tensor? lengths, Tensor? prepared, "
      "Tensor output_weight, Tensor? output_bias, float scale, int outputs, Tensor limits, Tensor done, Tensor "
      "forbidden, "
      "int early_steps, int end_token, int enough_done, int steps) -> (Tensor run, Tensor chosen, Tensor log_probs, "
      "Tensor done, Tensor h_n, Tensor c_n, Tensor vector)");
  // T steps with input feeding, for training. gates (T, N, 4H): the embeddings' part of the first layer's gates, bias
  // included; weights: W_ih, W_hh of each layer, in the first the columns of the feed (4H, H); biases: b_ih, b_hh of
  // the layers above; masks (L - 1, T, N, H): factors between the layers. vectors (T, N, H), attention (T, N, P),
  // h_steps, cell_states (L, T, N, H), activations (L, T, N, 4H); inputs (L - 1, T, N, H) with masks, queries (T, N, A)
  // of the additive score, else (0,); contexts (T, N, D).
  m.def(
      "decoder_forward(Tensor gates, Tensor h, Tensor c, Tensor feed, Tensor[] weights, Tensor[] biases, "
      "Tensor? masks, Tensor combine, Tensor? query_weight, Tensor? query_bias, Tensor? score_weight, Tensor keys, "
      "Tensor memory, Tensor? lengths, Tensor? prepared, float scale) -> (Tensor vectors, Tensor attention, "
      "Tensor h_steps, Tensor cell_states, Tensor activations, Tensor inputs, Tensor queries, Tensor contexts)");
  // The part of the backward that runs step by step. queries (T, N, A): for the dot score h of the last layer.
  // grad_gates (L, T, N, 4H); grad_sums (T, N, H) of combine [context, h]; grad_joined (T, N, D + H) of [context, h];
  // grad_queries (T, N, A); grad_scores (T, N, P) of the dot score; key_sums (B, P, A16), weight_sums (B, A16) of the
  // additive score, where A16 is A rounded up to 16: gradients of keys, before the factor score_weight, and of
  // score_weight; grad_h0, grad_c0 (L, N, H), grad_feed (N, H).
  m.def(
      "decoder_backward(Tensor grad_vectors, Tensor? grad_weights, Tensor? grad_h_n, Tensor? grad_c_n, Tensor h, "
      "Tensor c, Tensor feed, Tensor[] weights, Tensor? masks, Tensor combine, Tensor? query_weight, "
      "Tensor? score_weight, Tensor keys, Tensor memory, Tensor? lengths, Tensor? prepared, Tensor vectors, "
      "Tensor attention_weights, Tensor cell_states, Tensor activations, Tensor queries, float scale) "
      "-> (Tensor grad_gates, Tensor grad_sums, Tensor grad_joined, Tensor grad_queries, Tensor grad_scores, "
      "Tensor key_sums, Tensor weight_sums, Tensor grad_h0, Tensor grad_c0, Tensor grad_feed)");
  // Panels of a weight (M, K) for decoder_step, one dimension; is_gates: M = 4H.
  m.def("decoder_pack(Tensor weight, bool is_gates) -> Tensor");
  // Frees the memory that the pool keeps for later calls. Returns the number of bytes.
  m.def("cpu_empty_cache() -> int");
  // Runs multiply-adds in the dtype of `example` on all threads, `steps` rounds each. Returns the number of operations.
  m.def("cpu_fma_chain(Tensor example, int steps) -> int");
}

}  // namespace fastseq
