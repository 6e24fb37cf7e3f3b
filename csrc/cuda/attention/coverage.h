// Launchers of coverage.cu, for forward.cu and backward.cu. T: float, bf16, half. Each returns the error, or "".
#pragma once

#include <string>

#include "cuda/attention/params.h"

namespace fastseq::cuda {

// Writes p.scores. N: elements of a vector load.
template <class T, int N>
std::string coverage_scores(const AttentionForwardParams& p, Stream stream);

// Writes grad_keys, grad_coverage, query_parts, weight_parts and coverage_weight_parts.
template <class T>
std::string coverage_gradients(const AttentionBackwardParams& p, Stream stream);

}  // namespace fastseq::cuda
