// Attention on the GPU: what its launchers take. No CUDA header, no torch.
//
//   score(t, s) = scale * sum_a weight[a] * tanh(query[t][a] + bias[a] + keys[s][a])     or  scale * query[t] . keys[s]
//   weights = softmax of the scores over the positions that step t attends to            context = weights * values
//
// Backward reads the weights that forward wrote rather than a log-sum-exp. They cost 8 bytes a step and position, write
// and read; the score computed again would cost A tanh more, which take longer from A = 16 on, and for T = 1, where
// every byte of the keys counts, the keys a second time: A elements for the 8 bytes.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/common/types.h"

namespace fastseq::cuda {

// (B, rows, columns), columns side by side; strides in elements. Without data: not given.
struct Rows {
  const void* data;
  int64_t batch, row;
};

struct AttentionInputs {
  int64_t batch, steps, positions, size, width;  // B, T, S, A, D
  Rows query;                                    // (B, T, A)
  Rows keys;                                     // (B, S, A)
  Rows values;                                   // (B, S, D)
  const void* weight;                            // (A,) of the additive score, or null for the dot score
  const void* bias;                              // (A,) or null
  const int64_t* lengths;                        // (B,), taken as clamped to 0 .. S, or null
  const bool* mask;                              // (B, T, S), true = attend, or null
  int64_t mask_batch, mask_row, mask_column;     // strides; row 0 where all steps have the same
  float scale;
};

// Keys that a step's scores are split into at least, and columns of the context that one block sums up at most.
constexpr int64_t kStepKeys = 64, kStepColumns = 2048;

// Parts that the positions are split into, each to a block of its own: 1 for more than one step.
int64_t attention_splits(const AttentionInputs& in);

struct AttentionForward {
  AttentionInputs in;
  void* context;   // (B, T, D)
  float* weights;  // (B, T, S) or null
  int64_t splits;  // attention_splits()
  float* sums;     // (B, splits, D) workspace; none of it for one split
  float* states;   // (B, splits, 2) workspace: largest score, sum of exponentials
};

// Tiles of the backward kernels, which give the sizes of their workspace.
constexpr int64_t kGradPositions = 64;   // of a gradient of weights
constexpr int64_t kTanhPositions = 128;  // whose tanh one block computes, for all steps
constexpr int64_t kSumSteps = 64;        // summed up by one block for the gradient of the bias

struct AttentionBackward {
  AttentionInputs in;
  const float* weights;           // (B, T, S)
  Rows grad_context;              // (B, T, D)
  Rows grad_weights;              // (B, T, S), or not given
  bool need_scores, need_values;  // what to compute: the next four; grad_values
  void* grad_query;               // (B, T, A)
  void* grad_keys;                // (B, S, A)
  void* grad_weight;              // (A,) additive score only
  void* grad_bias;                // (A,) additive score only
  void* grad_values;              // (B, S, D)
  // Workspace, for need_scores; the last three for the additive score.
  float* grad_softmax;  // (B, T, S) gradient of the weights, all of it
  float* means;         // (B, T, parts of kGradPositions) its mean under the weights, in parts
  float* query_parts;   // (B, parts of kTanhPositions, T, A)
  float* weight_parts;  // (B, parts of kTanhPositions, A)
  float* bias_parts;    // (B, parts of kSumSteps, A)
};

// Each returns what went wrong, or an empty string. B, T and S are not 0.
std::string launch_attention_forward(const AttentionForward& p, Type type, Stream stream);
std::string launch_attention_backward(const AttentionBackward& p, Type type, Stream stream);

}  // namespace fastseq::cuda
