// Parameters of attention on the GPU. No CUDA header, no torch.
//
//   score(t, s) = scale * sum_a weight[a] * tanh(query[t][a] + bias[a] + keys[s][a])     or  scale * query[t] . keys[s]
//   weights = softmax of the scores over the positions that step t attends to            context = weights * values
//
// Backward reads the weights that forward wrote instead of a log-sum-exp. They cost 8 bytes a step and position, write
// and read. Recomputing the score would cost A tanh, which take longer from A = 16 on; for T = 1, bound by the bytes of
// the keys, it would also read the keys again: A elements instead of the 8 bytes.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/common/types.h"

namespace fastseq::cuda {

// (B, rows, columns), columns adjacent; strides in elements. Null data: absent.
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
  const int64_t* lengths;                        // (B,), taken as clamped to 0 .. S, or null
  const bool* mask;                              // (B, T, S), true = attend, or null
  int64_t mask_batch, mask_row, mask_column;     // strides; row 0 if all steps share a mask
  float scale;
};

// Smallest split of a step's keys, and most columns of the context that one block sums up.
constexpr int64_t kStepKeys = 64, kStepColumns = 2048;

// Splits of the positions, one block each; 1 for more than one step.
int64_t attention_splits(const AttentionInputParams& in);

struct AttentionForwardParams {
  AttentionInputParams in;
  void* context;   // (B, T, D)
  float* weights;  // (B, T, S) or null
  int64_t splits;  // attention_splits()
  float* sums;     // (B, splits, D) workspace; unused for one split
  float* states;   // (B, splits, 2) workspace: largest score, sum of exponentials
};

// Tiles of the backward kernels. They determine the sizes of the workspace.
constexpr int64_t kGradPositions = 64;   // of a block of the gradient of the weights
constexpr int64_t kTanhPositions = 128;  // of a block of tanh gradients, all steps
constexpr int64_t kSumSteps = 64;        // of a block of the gradient of the bias

struct AttentionBackwardParams {
  AttentionInputParams in;
  const float* weights;           // (B, T, S)
  Rows grad_context;              // (B, T, D)
  Rows grad_weights;              // (B, T, S), or absent
  bool need_scores, need_values;  // the next four gradients are needed; grad_values is
  void* grad_query;               // (B, T, A)
  void* grad_keys;                // (B, S, A)
  void* grad_weight;              // (A,) additive score only
  void* grad_bias;                // (A,) additive score only
  void* grad_values;              // (B, S, D)
  // Workspace, for need_scores; the last three for the additive score.
  float* grad_softmax;  // (B, T, S) gradient of the weights, grad_weights included
  float* means;         // (B, T, parts of kGradPositions) its mean under the weights, in parts
  float* query_parts;   // (B, parts of kTanhPositions, T, A)
  float* weight_parts;  // (B, parts of kTanhPositions, A)
  float* bias_parts;    // (B, parts of kSumSteps, A)
};

// Each returns the error, or an empty string. B, T and S are not 0.
std::string launch_attention_forward(const AttentionForwardParams& p, Type type, Stream stream);
std::string launch_attention_backward(const AttentionBackwardParams& p, Type type, Stream stream);

}  // namespace fastseq::cuda
