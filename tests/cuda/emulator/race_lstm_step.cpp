// Decoding step, and the cells of a recurrence in steps, on the host-side device, as a program for the sanitizers.
// Exits with 0 if every launch succeeds.
#include <cstdio>
#include <vector>

#include "cuda/lstm/steps.h"
#include "cuda/lstm_cell/step.h"
#include "world.h"

using namespace fastseq::cuda;

static bool step(int64_t B, int64_t I, int64_t H) {
  std::vector<float> x(B * I, 0.5f), h(B * H, 0.25f), c(B * H, 1.0f), w_ih(4 * H * I, 0.01f), w_hh(4 * H * H, 0.02f);
  std::vector<float> bias(4 * H, 0.1f), h_n(B * H), c_n(B * H);
  const StepParams p{.batch = B,
                     .input_size = I,
                     .hidden = H,
                     .narrow = false,
                     .bias_stride = 0,
                     .input = x.data(),
                     .h = h.data(),
                     .c = c.data(),
                     .weight_ih = w_ih.data(),
                     .weight_hh = w_hh.data(),
                     .bias_ih = bias.data(),
                     .bias_hh = nullptr,
                     .h_n = h_n.data(),
                     .c_n = c_n.data()};
  const std::string error = launch_lstm_step(p, Type::kFloat, nullptr);
  if (!error.empty()) std::printf("%s\n", error.c_str());
  return error.empty();
}

static bool cells(int64_t B, int64_t H, bool reverse) {
  constexpr int64_t T = 2;
  std::vector<float> gates(T * B * 4 * H, 0.5f), product(B * 4 * H, 0.25f), c(B * H, 1.0f), carry(2 * B * H);
  std::vector<float> output(T * B * H), cell_states(T * B * H), states(B * H), activations(T * B * 4 * H);
  std::vector<int64_t> lengths(B, 1);
  lengths[0] = T;
  const LstmShape shape{T, B, 1, H, lengths.data(), reverse, false};
  const LstmForwardParams f{shape,
                            gates.data(),
                            nullptr,
                            nullptr,
                            nullptr,
                            output.data(),
                            states.data(),
                            states.data(),
                            activations.data(),
                            cell_states.data(),
                            nullptr};
  const LstmBackwardParams b{shape,         output.data(),      nullptr,       nullptr, nullptr,
                             gates.data(),  cell_states.data(), states.data(), nullptr, activations.data(),
                             states.data(), states.data(),      nullptr};
  std::string error;
  for (int64_t t = 0; t < T && error.empty(); ++t) {
    const int64_t time = reverse ? T - 1 - t : t;
    error = launch_lstm_forward_step(f, time, product.data(), c.data(), Type::kFloat, nullptr);
  }
  for (int64_t t = 0; t <= T && error.empty(); ++t) {
    const int64_t time = reverse ? t : T - 1 - t;
    error = launch_lstm_backward_step(b, time, product.data(), carry.data(), Type::kFloat, nullptr);
  }
  if (!error.empty()) std::printf("%s\n", error.c_str());
  return error.empty();
}

int main() {
  bool fine = step(1, 520, 4) && step(3, 5, 7) && cells(3, 100, false) && cells(2, 5, true);
  host::options().shuffle = true;
  for (uint64_t seed = 0; seed < 3; ++seed) {
    host::options().seed = seed;
    fine = fine && step(10, 264, 8);
  }
  return fine ? 0 : 1;
}
