// Launchers of attention with coverage.
#include "cuda/attention/coverage.h"

#include "cuda/attention/coverage.cuh"
#include "cuda/attention/instantiate.cuh"

namespace fastseq::cuda {

template <class T, int N>
std::string coverage_scores(const AttentionForwardParams& p, Stream stream) {
  const AttentionInputParams& in = p.in;
  const Launch l{.grid = dim3(in.batch * divide_up(in.steps, kScoreSteps), divide_up(in.positions, kScorePositions)),
                 .block = dim3(kScoreThreads),
                 .stream = stream};
  return launch(l, attention_coverage_score_kernel<T, N>, p);
}

template <class T>
std::string coverage_gradients(const AttentionBackwardParams& p, Stream stream) {
  const AttentionInputParams& in = p.in;
  const Launch tanh{.grid = dim3(in.batch * divide_up(in.positions, kTanhPositions), divide_up(in.size, kTanhColumns)),
                    .block = dim3(kCoverageThreads),
                    .shared_memory = sizeof(CoverageTiles),
                    .stream = stream};
  const std::string error = launch(tanh, attention_coverage_tanh_kernel<T>, p);
  if (!error.empty()) return error;
  const int64_t elements = in.batch * in.steps * in.positions;
  const Launch sum{.grid = dim3(divide_up(elements, kTanhThreads)), .block = dim3(kTanhThreads), .stream = stream};
  return launch(sum, attention_coverage_sum_kernel<T>, p);
}

template std::string coverage_scores<float, 1>(const AttentionForwardParams&, Stream);
template std::string coverage_scores<float, 4>(const AttentionForwardParams&, Stream);
template std::string coverage_scores<bf16, 1>(const AttentionForwardParams&, Stream);
template std::string coverage_scores<bf16, 8>(const AttentionForwardParams&, Stream);
template std::string coverage_scores<half, 1>(const AttentionForwardParams&, Stream);
template std::string coverage_scores<half, 8>(const AttentionForwardParams&, Stream);
template std::string coverage_gradients<float>(const AttentionBackwardParams&, Stream);
template std::string coverage_gradients<bf16>(const AttentionBackwardParams&, Stream);
template std::string coverage_gradients<half>(const AttentionBackwardParams&, Stream);

}  // namespace fastseq::cuda
