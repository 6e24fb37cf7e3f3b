// Cluster recurrence on the host-side device, as a program for the sanitizers. Exits with 0 if every launch succeeds.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "cuda/lstm/params.h"
#include "world.h"

using namespace fastseq::cuda;

static bool both(int64_t T, int64_t B, int64_t H, int64_t longest = 100, bool beside = false) {
  constexpr int64_t D = 2;
  std::vector<int64_t> lengths(B);
  for (int64_t b = 0; b < B; ++b) lengths[b] = std::min(b % (T + 1), longest);
  std::vector<float> gates(T * B * D * 4 * H, 0.5f), h0(D * B * H, 0.25f), c0(D * B * H, 1.0f), weight(D * 4 * H * H);
  std::vector<float> output(T * B * D * H), h_n(D * B * H), c_n(D * B * H), activations(T * B * D * 4 * H);
  std::vector<float> cell_states(T * B * D * H);
  const LstmShape shape{
      .steps = T, .batch = B, .directions = D, .hidden = H, .lengths = lengths.data(), .reverse = false, .tf32 = true, .beside = beside};
  const LstmForwardParams p{.shape = shape,
                            .gates = gates.data(),
                            .h0 = h0.data(),
                            .c0 = c0.data(),
                            .weight_hh = weight.data(),
                            .output = output.data(),
                            .h_n = h_n.data(),
                            .c_n = c_n.data(),
                            .activations = activations.data(),
                            .cell_states = cell_states.data(),
                            .workspace = nullptr};
  const auto forward = plan_lstm_cluster_forward(shape, Type::kFloat);
  const auto backward = plan_lstm_cluster_backward(shape, Type::kFloat);
  if (!forward || !backward) return std::puts("no plan"), false;
  std::string error = forward->launch(p, nullptr).error;
  std::vector<float> grad_gates(gates.size()), grad_h0(h0.size()), grad_c0(c0.size());
  const LstmBackwardParams b{.shape = shape,
                             .grad_output = output.data(),
                             .grad_h_n = h_n.data(),
                             .grad_c_n = nullptr,
                             .grad_cell_states = nullptr,
                             .activations = activations.data(),
                             .cell_states = cell_states.data(),
                             .c0 = c0.data(),
                             .weight_hh = weight.data(),
                             .grad_gates = grad_gates.data(),
                             .grad_h0 = grad_h0.data(),
                             .grad_c0 = grad_c0.data(),
                             .workspace = nullptr};
  if (error.empty()) error = backward->launch(b, nullptr).error;
  if (!error.empty()) std::printf("%s\n", error.c_str());
  return error.empty();
}

int main() {
  bool fine = both(4, 3, 21) && both(4, 3, 21, 0);
  host::options().shuffle = true;
  for (uint64_t seed = 0; seed < 3; ++seed) {
    host::options().seed = seed;
    fine = fine && both(4, 3, 21) && both(4, 7, 21, 100, true);
  }
  host::options().multiprocessors = 2;  // forces a tile of 16 sequences
  fine = fine && both(2, 9, 8);
  return fine ? 0 : 1;
}
