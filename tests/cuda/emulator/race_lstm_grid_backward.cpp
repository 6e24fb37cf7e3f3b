// Backward grid recurrence on the host-side device, as a program for the sanitizers. Exits with 0 if every launch
// succeeds and every schedule gives the same bits. Every tensor is an allocation of its exact size.
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/common/device.cuh"
#include "cuda/lstm/params.h"

namespace {

using namespace fastseq::cuda;

std::mt19937 generator(1);

template <class T>
std::vector<T> random_numbers(int64_t count) {
  std::vector<T> numbers(count);
  for (T& x : numbers) from_float(std::uniform_real_distribution<float>(0.1f, 0.9f)(generator), &x);
  return numbers;
}

// Returns true if all launches succeed with the same grad_gates, grad_h0 and grad_c0 in every schedule.
template <class T>
bool run(Type type, int64_t T_, int64_t B, int64_t D, int64_t H, bool tf32) {
  std::vector<int64_t> lengths(B);
  for (int64_t b = 0; b < B; ++b) lengths[b] = b % (T_ + 1);
  const int64_t cells = T_ * B * D * H, states = D * B * H;
  const auto activations = random_numbers<T>(4 * cells), grad_output = random_numbers<T>(cells);
  const auto cell_states = random_numbers<float>(cells);
  const auto c0 = random_numbers<T>(states), grad_n = random_numbers<T>(states),
             weight_hh = random_numbers<T>(D * 4 * H * H);
  const LstmShape shape{T_, B, D, H, lengths.data(), false, tf32};
  const auto plan = plan_lstm_grid_backward(shape, type);
  if (!plan) return std::puts("no plan"), false;
  std::vector<T> first;
  for (uint64_t seed = 0; seed < 3; ++seed) {
    std::vector<T> grad_gates(4 * cells), grad_h0(states), grad_c0(states);
    std::vector<uint64_t> workspace((plan->workspace + 7) / 8);
    host::options().shuffle = seed > 0;
    host::options().seed = seed;
    const std::string error = plan->launch({shape, grad_output.data(), grad_n.data(), grad_n.data(), grad_output.data(),
                                            activations.data(), cell_states.data(), c0.data(), weight_hh.data(),
                                            grad_gates.data(), grad_h0.data(), grad_c0.data(), workspace.data()},
                                           nullptr)
                                  .error;
    if (!error.empty()) return std::puts(error.c_str()), false;
    grad_gates.insert(grad_gates.end(), grad_h0.begin(), grad_h0.end());
    grad_gates.insert(grad_gates.end(), grad_c0.begin(), grad_c0.end());
    if (seed == 0) first = grad_gates;
    if (std::memcmp(first.data(), grad_gates.data(), first.size() * sizeof(T))) {
      return std::printf("seed %d changes the bits of a result\n", static_cast<int>(seed)), false;
    }
  }
  return true;
}

}  // namespace

int main() {
  host::options().multiprocessors = host::options().resident_blocks =
      8;  // several groups of rows, some with two passes
  const bool right = run<bf16>(Type::kBFloat16, 3, 9, 2, 20, false) && run<half>(Type::kHalf, 3, 5, 1, 36, false) &&
                     run<float>(Type::kFloat, 3, 9, 1, 33, true) && run<float>(Type::kFloat, 3, 5, 2, 33, false) &&
                     run<bf16>(Type::kBFloat16, 2, 72, 1, 40, false);
  return right ? 0 : 1;
}
