// Launchers of attention forward.
#include "cuda/attention/forward.cuh"

#include "cuda/attention/coverage.h"
#include "cuda/attention/forward_step.cuh"
#include "cuda/attention/instantiate.cuh"

namespace fastseq::cuda {
namespace {

template <class T, int N, bool kAdditive>
std::string one_step(const AttentionForwardParams& p, Stream stream) {
  const AttentionInputParams& in = p.in;
  const int64_t columns = divide_up(in.width, kStepColumns);
  const Launch l{
      .grid = dim3(in.batch * p.splits, columns > 0 ? columns : 1), .block = dim3(kStepThreads), .stream = stream};
  std::string error = launch(l, attention_step_kernel<T, N, kAdditive>, p);
  if (!error.empty() || p.splits == 1) return error;
  const int64_t results = p.weights && in.positions > in.width ? in.positions : in.width;
  const int64_t chunks = divide_up(results, kStepThreads);
  const Launch combine{.grid = dim3(in.batch * chunks), .block = dim3(kStepThreads), .stream = stream};
  return launch(combine, attention_combine_kernel<T>, p, chunks);
}

// Context columns of one block: all if their sums fit shared memory. Otherwise several blocks of columns recompute the
// same scores.
template <class Tiles>
int forward_columns(int64_t width) {
  const size_t left = device_limits().shared_memory - sizeof(Tiles);
  const int64_t most = static_cast<int64_t>(left / (kTileRows * sizeof(float))) / 64 * 64;
  const int64_t whole = width > 0 ? divide_up(width, 64) * 64 : 64;
  return static_cast<int>(whole < most ? whole : most);
}

template <class T, int N, bool kAdditive>
std::string many_steps(const AttentionForwardParams& p, Stream stream) {
  using Tiles = ForwardTilesOf<T, kAdditive>;
  const AttentionInputParams& in = p.in;
  const int columns = forward_columns<Tiles>(in.width);
  const int64_t column_blocks = in.width > 0 ? divide_up(in.width, columns) : 1;
  const Launch l{.grid = dim3(in.batch * divide_up(in.steps, kTileRows), column_blocks),
                 .block = dim3(kTileThreads),
                 .shared_memory = sizeof(Tiles) + columns * kTileRows * sizeof(float),
                 .stream = stream};
  return launch(l, attention_forward_kernel<T, N, kAdditive>, p, columns);
}

}  // namespace

// Splits until there are two blocks per multiprocessor. Not measured on a GPU yet.
int64_t attention_splits(const AttentionInputParams& in) {
  if (in.steps != 1 || in.positions == 0) return 1;
  const int64_t blocks = in.batch * divide_up(in.width, kStepColumns);
  const int64_t most = divide_up(in.positions, kStepKeys), target = 2 * device_limits().multiprocessors;
  const int64_t splits = blocks > 0 && target > blocks ? target / blocks : 1;
  return splits < most ? splits : most;
}

std::string launch_attention_forward(const AttentionForwardParams& p, Type type, Stream stream) {
  return with_attention(p.in, {p.context, p.in.coverage_weight}, {}, type, [&](auto zero, auto width, auto additive) {
    using T = decltype(zero);
    constexpr int N = decltype(width)::value;
    constexpr bool kAdditive = decltype(additive)::value;
    if constexpr (kAdditive) {
      if (p.scores) {
        const std::string error = coverage_scores<T, N>(p, stream);
        if (!error.empty()) return error;
        return p.in.steps == 1 ? one_step<T, N, false>(p, stream) : many_steps<T, N, false>(p, stream);
      }
    }
    return p.in.steps == 1 ? one_step<T, N, kAdditive>(p, stream) : many_steps<T, N, kAdditive>(p, stream);
  });
}

}  // namespace fastseq::cuda
