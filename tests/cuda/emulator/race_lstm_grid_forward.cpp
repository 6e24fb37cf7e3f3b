// Forward grid recurrence on the host-side device, as a program for the sanitizers. Exits with 0 if every launch
// succeeds and every schedule gives the same bits. Every tensor is an allocation of its exact size.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/common/device.cuh"
#include "cuda/lstm/params.h"

using namespace fastseq::cuda;

namespace {

struct Case {
  int64_t steps, batch, directions, hidden;
  int multiprocessors;
  bool lengths, tf32;
};

class Tensor {
 public:
  Tensor(int64_t count, size_t size) : bytes_(count * size), data_(new char[bytes_]()) {}
  char* data() const { return data_.get(); }
  bool operator==(const Tensor& other) const { return std::memcmp(data(), other.data(), bytes_) == 0; }

 private:
  size_t bytes_;
  std::unique_ptr<char[]> data_;
};

template <class T>
Tensor waves(int64_t count, float phase) {
  Tensor tensor(count, sizeof(T));
  for (int64_t i = 0; i < count; ++i) {
    from_float(std::sin(static_cast<float>(i) + phase), reinterpret_cast<T*>(tensor.data()) + i);
  }
  return tensor;
}

// Returns all results; prints the error and returns {} on failure.
template <class T>
std::vector<Tensor> run(const Case& c, Type type) {
  host::options().multiprocessors = host::options().resident_blocks = c.multiprocessors;
  const int64_t D = c.directions, H = c.hidden, rows = c.steps * c.batch * D, states = D * c.batch * H;
  std::vector<int64_t> lengths(c.batch);
  for (int64_t b = 0; b < c.batch; ++b) lengths[b] = (b * 3 + 2) % (c.steps + 1);
  const Tensor gates = waves<T>(rows * 4 * H, 0), h0 = waves<T>(states, 1), c0 = waves<T>(states, 2);
  const Tensor weight = waves<T>(D * 4 * H * H, 3);
  std::vector<Tensor> results;
  for (const int64_t count : {rows * H, states, states, rows * 4 * H}) results.emplace_back(count, sizeof(T));
  results.emplace_back(rows * H, sizeof(float));
  LstmForwardParams p{{c.steps, c.batch, D, H, c.lengths ? lengths.data() : nullptr, false, c.tf32}};
  p.gates = gates.data();
  p.h0 = h0.data();
  p.c0 = c0.data();
  p.weight_hh = weight.data();
  p.output = results[0].data();
  p.h_n = results[1].data();
  p.c_n = results[2].data();
  p.activations = results[3].data();
  p.cell_states = reinterpret_cast<float*>(results[4].data());
  const auto plan = plan_lstm_grid_forward(p.shape, type);
  if (!plan) return std::puts("no plan"), std::vector<Tensor>{};
  const Tensor workspace(plan->workspace, 1);
  p.workspace = workspace.data();
  const std::string error = plan->launch(p, nullptr).error;
  if (error.empty()) return results;
  std::printf("%s\n", error.c_str());
  return {};
}

template <class T>
bool same_in_any_order(const Case& c, Type type) {
  host::options().shuffle = false;
  const std::vector<Tensor> first = run<T>(c, type);
  bool same = !first.empty();
  host::options().shuffle = true;
  for (host::options().seed = 0; same && host::options().seed < 2; ++host::options().seed) {
    same = run<T>(c, type) == first;
    if (!same) std::printf("seed %d changes the bits of a result\n", static_cast<int>(host::options().seed));
  }
  return same;
}

}  // namespace

int main() {
  // Two teams of 3 blocks; then two directions, two groups at once, a last block with one group instead of three.
  const Case teams{5, 18, 1, 24, 6, true, false}, groups{4, 9, 2, 17, 2, true, false};
  Case rounded = teams;
  rounded.tf32 = true;
  const bool same = same_in_any_order<bf16>(teams, Type::kBFloat16) &&
                    same_in_any_order<bf16>(groups, Type::kBFloat16) &&
                    same_in_any_order<float>(groups, Type::kFloat) && same_in_any_order<float>(rounded, Type::kFloat);
  return same ? 0 : 1;
}
