// Attention kernels on the host-side device, as a program for the sanitizers. Exits with 0 if every launch succeeds.
// Every tensor is an allocation of its exact size.
#include <cmath>
#include <cstdio>
#include <deque>
#include <string>
#include <vector>

#include "cuda/attention/params.h"
#include "cuda/common/device.cuh"

using namespace fastseq::cuda;

namespace {

struct Memory {
  std::deque<std::vector<char>> blocks;

  template <class T>
  T* take(int64_t count) {
    blocks.emplace_back(count * sizeof(T));
    T* data = reinterpret_cast<T*>(blocks.back().data());
    for (int64_t i = 0; i < count; ++i) from_float(std::sin(static_cast<float>(i)), data + i);
    return data;
  }
};

struct Case {
  Type type;
  int64_t steps, size, width;
  bool lengths, mask;
  bool coverage = false;
};

// Vector and element-wise loads, whole and partial tiles.
constexpr Case kCases[] = {{Type::kFloat, 1, 8, 24, true, false},       {Type::kBFloat16, 1, 8, 24, true, false},
                           {Type::kBFloat16, 1, 5, 3, false, true},     {Type::kFloat, 34, 24, 72, true, false},
                           {Type::kBFloat16, 34, 24, 72, true, false},  {Type::kFloat, 34, 5, 3, false, true},
                           {Type::kFloat, 1, 8, 24, true, false, true}, {Type::kBFloat16, 18, 5, 3, false, true, true}};

template <class T>
std::string run(const Case& c, bool additive) {
  constexpr int64_t S = 70;
  static const int64_t lengths[] = {66};
  Memory m;
  const int64_t B = 1, t = c.steps;
  std::vector<char> mask(B * t * S, 1);
  for (size_t i = 0; i < mask.size(); i += 3) mask[i] = 0;
  const Rows query{m.take<T>(B * t * c.size), t * c.size, c.size}, keys{m.take<T>(B * S * c.size), S * c.size, c.size};
  const Rows values{m.take<T>(B * S * c.width), S * c.width, c.width};
  const AttentionInputParams in{.batch = B,
                                .steps = t,
                                .positions = S,
                                .size = c.size,
                                .width = c.width,
                                .query = query,
                                .keys = keys,
                                .values = values,
                                .weight = additive ? m.take<T>(c.size) : nullptr,
                                .bias = additive ? m.take<T>(c.size) : nullptr,
                                .lengths = c.lengths ? lengths : nullptr,
                                .mask = c.mask ? reinterpret_cast<const bool*>(mask.data()) : nullptr,
                                .mask_batch = t * S,
                                .mask_row = S,
                                .mask_column = 1,
                                .scale = 0.5f,
                                .coverage = c.coverage ? Rows{m.take<T>(B * t * S), t * S, S} : Rows{},
                                .coverage_weight = c.coverage ? m.take<T>(c.size) : nullptr};
  AttentionForwardParams forward{in, m.take<T>(B * t * c.width), m.take<float>(B * t * S), attention_splits(in)};
  forward.sums = m.take<float>(B * forward.splits * c.width);
  forward.states = m.take<float>(B * forward.splits * 2);
  forward.scores = c.coverage ? m.take<float>(B * t * S) : nullptr;
  const std::string error = launch_attention_forward(forward, c.type, nullptr);
  if (!error.empty()) return error;
  const int64_t parts = divide_up(S, kTanhPositions);
  const AttentionBackwardParams backward{.in = in,
                                         .weights = forward.weights,
                                         .grad_context = {m.take<T>(B * t * c.width), t * c.width, c.width},
                                         .grad_weights = {m.take<T>(B * t * S), t * S, S},
                                         .need_scores = true,
                                         .need_values = true,
                                         .grad_query = m.take<T>(B * t * c.size),
                                         .grad_keys = m.take<T>(B * S * c.size),
                                         .grad_weight = m.take<T>(c.size),
                                         .grad_bias = m.take<T>(c.size),
                                         .grad_values = m.take<T>(B * S * c.width),
                                         .grad_coverage = m.take<T>(B * t * S),
                                         .grad_coverage_weight = m.take<T>(c.size),
                                         .grad_softmax = m.take<float>(B * t * S),
                                         .means = m.take<float>(B * t * divide_up(S, kGradPositions)),
                                         .query_parts = m.take<float>(B * parts * t * c.size),
                                         .weight_parts = m.take<float>(B * parts * c.size),
                                         .bias_parts = m.take<float>(B * divide_up(t, kSumSteps) * c.size),
                                         .coverage_parts = m.take<float>(divide_up(c.size, kTanhColumns) * B * t * S),
                                         .coverage_weight_parts = m.take<float>(B * parts * c.size)};
  return launch_attention_backward(backward, c.type, nullptr);
}

bool all_cases(int64_t most_steps) {
  for (const Case& c : kCases) {
    for (const bool additive : {false, true}) {
      if (c.steps > most_steps || (c.coverage && !additive)) continue;
      const std::string error = c.type == Type::kFloat ? run<float>(c, additive) : run<bf16>(c, additive);
      if (error.empty()) continue;
      std::printf("%s\n", error.c_str());
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  if (!all_cases(34)) return 1;
  host::options().multiprocessors = 1;  // no split of the positions of a step
  host::options().shuffle = true;
  return all_cases(1) ? 0 : 1;
}
