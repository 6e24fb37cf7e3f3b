// Launchers of attention backward.
#include "cuda/attention/backward.cuh"
#include "cuda/attention/coverage.h"
#include "cuda/attention/instantiate.cuh"

namespace fastseq::cuda {
namespace {

template <class T, int N>
std::string grad_softmax(const AttentionBackwardParams& p, Stream stream) {
  const Launch l{.grid = dim3(p.in.batch * divide_up(p.in.steps, kTileRows), divide_up(p.in.positions, kGradPositions)),
                 .block = dim3(kTileThreads),
                 .shared_memory = sizeof(ProductTiles<T>),
                 .stream = stream};
  return launch(l, attention_grad_softmax_kernel<T, N>, p);
}

template <class T, int N, Gradient kGradient>
std::string product(const AttentionBackwardParams& p, Stream stream) {
  const int64_t rows = kGradient == Gradient::kQuery ? p.in.steps : p.in.positions;
  const int64_t columns = kGradient == Gradient::kValues ? p.in.width : p.in.size;
  if (columns == 0) return "";
  const Launch l{.grid = dim3(p.in.batch * divide_up(rows, kTileRows), divide_up(columns, kTileColumns)),
                 .block = dim3(kTileThreads),
                 .shared_memory = sizeof(ProductTiles<T>),
                 .stream = stream};
  return launch(l, attention_product_kernel<T, N, kGradient>, p);
}

template <class T>
std::string uncovered_gradients(const AttentionBackwardParams& p, Stream stream) {
  const Launch l{
      .grid = dim3(p.in.batch * divide_up(p.in.positions, kTanhPositions), divide_up(p.in.size, kTanhColumns)),
      .block = dim3(kTanhThreads),
      .shared_memory = sizeof(TanhTiles),
      .stream = stream};
  return launch(l, attention_tanh_kernel<T>, p);
}

template <class T>
std::string additive_gradients(const AttentionBackwardParams& p, Stream stream) {
  const AttentionInputParams& in = p.in;
  const unsigned columns = divide_up(in.size, kTanhColumns);
  if (columns == 0) return "";
  std::string error = in.coverage.data ? coverage_gradients<T>(p, stream) : uncovered_gradients<T>(p, stream);
  if (!error.empty()) return error;
  const dim3 block(kTanhThreads);
  const Launch query{
      .grid = dim3(in.batch * divide_up(in.steps, kSumSteps), columns), .block = block, .stream = stream};
  error = launch(query, attention_query_kernel<T>, p);
  if (!error.empty()) return error;
  const unsigned vectors = in.coverage.data ? 3 : 2;
  return launch({.grid = dim3(columns, vectors), .block = block, .stream = stream}, attention_sum_kernel<T>, p);
}

template <class T, int N, bool kAdditive>
std::string backward(const AttentionBackwardParams& p, Stream stream) {
  std::string error;
  if (p.need_values) error = product<T, N, Gradient::kValues>(p, stream);
  if (!error.empty() || !p.need_scores) return error;
  error = grad_softmax<T, N>(p, stream);
  if (!error.empty()) return error;
  if constexpr (kAdditive) {
    return additive_gradients<T>(p, stream);
  } else {
    error = product<T, N, Gradient::kKeys>(p, stream);
    return error.empty() ? product<T, N, Gradient::kQuery>(p, stream) : error;
  }
}

}  // namespace

std::string launch_attention_backward(const AttentionBackwardParams& p, Type type, Stream stream) {
  const auto pointers = {static_cast<const void*>(p.grad_query), static_cast<const void*>(p.grad_keys),
                         static_cast<const void*>(p.grad_values)};
  return with_attention(p.in, pointers, {p.grad_context}, type, [&](auto zero, auto width, auto additive) {
    return backward<decltype(zero), decltype(width)::value, decltype(additive)::value>(p, stream);
  });
}

}  // namespace fastseq::cuda
