// Parameters of attention on the GPU. No CUDA header, no torch.
//
//   score(t, s) = scale * sum_a weight[a] * tanh(query[t][a] + bias[a] + keys[s][a])     or  scale * query[t] . keys[s]
//   coverage c (B, T, S) and its weight w (A,) add c[t][s] * w[a] inside the tanh
//   weights = softmax of the scores over the positions that step t attends to            context = weights * values
//
// Backward reads the saved weights (B, T, S), 8 bytes written and read per step and position. Recomputing scores from a
// log-sum-exp would cost A tanh each, which take longer from A = 16 on. docs/kernels/attention.md
#pragma once

#include <cstdint>
#include <string>

#include "cuda/common/types.h"

namespace fastseq::cuda {

// A tensor (B, rows, columns) with contiguous columns; strides in elements. Null data: absent.
struct Rows {
  const void* data;
  int64_t batch, row;
};

struct AttentionInputParams {
  int64_t batch, steps, positions, size, width;  // B, T, S, A, D
  Rows query;                                    // (B, T, A)
  Rows keys;                                     // (B, S, A)
  Rows values;                                   // (B, S, D)
  const void* weight;                            // (A,) of the additive score, or null for the dot score
  const void* bias;                              // (A,) or null
  const int64_t* lengths;                        // (B,), clamped to 0 .. S, or null
  const bool* mask;                              // (B, T, S), true = attend, or null
  int64_t mask_batch, mask_row, mask_column;     // strides in elements; row = 0 if all steps share a mask
  float scale;
  Rows coverage;                // (B, T, S) with the additive score, or absent
  const void* coverage_weight;  // (A,) with coverage
};

// Positions per tile of a step (the smallest split); largest number of context columns of one block.
constexpr int64_t kStepKeys = 64, kStepColumns = 2048;

// Number of splits of the positions, one block each; 1 if T > 1.
int64_t attention_splits(const AttentionInputParams& in);

struct AttentionForwardParams {
  AttentionInputParams in;
  void* context;   // (B, T, D)
  float* weights;  // (B, T, S) or null
  int64_t splits;  // attention_splits()
  float* sums;     // (B, splits, D) workspace; unused if splits = 1
  float* states;   // (B, splits, 2) workspace: largest score, sum of exponentials
  float* scores;   // (B, T, S) workspace with coverage: unscaled scores, unset where masked; else null
};

// Tiles of the backward kernels; they set the sizes of the workspace.
constexpr int64_t kGradPositions = 64;   // positions of a block of attention_grad_softmax_kernel
constexpr int64_t kTanhPositions = 128;  // positions of a block of attention_tanh_kernel
constexpr int64_t kTanhColumns = 32;     // its columns
constexpr int64_t kSumSteps = 64;        // steps of a block of attention_query_kernel

struct AttentionBackwardParams {
  AttentionInputParams in;
  const float* weights;           // (B, T, S)
  Rows grad_context;              // (B, T, D)
  Rows grad_weights;              // (B, T, S), or absent
  bool need_scores, need_values;  // compute the next four gradients; compute grad_values
  void* grad_query;               // (B, T, A)
  void* grad_keys;                // (B, S, A)
  void* grad_weight;              // (A,) additive score only
  void* grad_bias;                // (A,) additive score only
  void* grad_values;              // (B, S, D)
  void* grad_coverage;            // (B, T, S) with coverage
  void* grad_coverage_weight;     // (A,) with coverage
  // Workspace if need_scores; from query_parts on for the additive score only, from coverage_parts on with coverage.
  float* grad_softmax;           // (B, T, S) dL/dweights, grad_weights included
  float* means;                  // (B, T, parts of kGradPositions) partial sums of weights * grad_softmax
  float* query_parts;            // (B, parts of kTanhPositions, T, A)
  float* weight_parts;           // (B, parts of kTanhPositions, A)
  float* bias_parts;             // (B, parts of kSumSteps, A)
  float* coverage_parts;         // (parts of kTanhColumns, B, T, S)
  float* coverage_weight_parts;  // (B, parts of kTanhPositions, A)
};

// Each returns the error, or "". B, T and S are not 0.
std::string launch_attention_forward(const AttentionForwardParams& p, Type type, Stream stream);
std::string launch_attention_backward(const AttentionBackwardParams& p, Type type, Stream stream);

}  // namespace fastseq::cuda
