// Launcher of the backward recurrence in clusters: which cluster, which tile of the batch.
#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/lstm/params.h"
#include "cuda/lstm/cluster_backward.cuh"

namespace fastseq::cuda {
namespace {

using namespace cluster;

struct Plan {
  BackwardTile tile;
  Launch launch;
  int unit_tiles = 0, row_tiles = 0;  // M, N; 0: it cannot be
};

// run(kernel) with the kernel of these template arguments, or a null pointer: there is none.
template <class Run>
auto with_kernel(const Plan& plan, Type type, const Run& run) {
  return with_float_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Kernel = void (*)(LstmBackward, BackwardTile);
    const int M = plan.unit_tiles, N = plan.row_tiles;
    Kernel kernel = nullptr;
    if (M == 1 && N == 1) kernel = lstm_cluster_backward_kernel<T, 1, 1>;
    if (M == 1 && N == 2) kernel = lstm_cluster_backward_kernel<T, 1, 2>;
    if (M == 2 && N == 1) kernel = lstm_cluster_backward_kernel<T, 2, 1>;
    if (M == 2 && N == 2) kernel = lstm_cluster_backward_kernel<T, 2, 2>;
    if constexpr (sizeof(T) == 2) {  // weights of float would take 256 registers
      if (M == 4 && N == 1) kernel = lstm_cluster_backward_kernel<T, 4, 1>;
      if (M == 4 && N == 2) kernel = lstm_cluster_backward_kernel<T, 4, 2>;
    }
    return run(kernel);
  });
}

Plan plan_of(const LstmShape& s, Type type, int blocks, int row_tiles) {
  Plan plan;
  const int units = static_cast<int>(divide_up(divide_up(s.hidden, blocks), 8) * 8);
  const int64_t tiles = divide_up(s.batch, 8 * row_tiles), clusters = tiles * s.directions;
  if (units > kUnits || clusters * blocks > std::numeric_limits<int32_t>::max()) return plan;
  const int steps = type == Type::kFloat ? kGateSteps<float> : kGateSteps<bf16>;
  plan.tile = {blocks, units, static_cast<int>(tiles)};
  plan.unit_tiles = std::max(1, blocks / 4);  // 2 tiles of 16 units a block, 8 warps
  plan.launch = {.grid = dim3(static_cast<unsigned>(clusters * blocks)),
                 .block = dim3(kThreads),
                 .shared_memory = BackwardMemory(plan.tile, steps, row_tiles).bytes,
                 .cluster = static_cast<unsigned>(blocks)};
  if (plan.launch.shared_memory <= device_limits().shared_memory) plan.row_tiles = row_tiles;
  return plan;
}

int resident(const Plan& plan, Type type) {
  return with_kernel(plan, type, [&](auto* kernel) { return kernel ? resident_clusters(plan.launch, kernel) : 0; });
}

// The smallest cluster that fits; of its tiles of the batch the best.
Plan choose(const LstmShape& s, Type type) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (device_limits().capability < 90 || (type == Type::kFloat && !s.tf32)) return {};
  if (s.steps >= kMost || s.batch > kMost - 32) return {};
  for (const int blocks : {2, 4, 8, 16}) {
    if (s.hidden > static_cast<int64_t>(kUnits) * blocks) continue;
    return best_tiles(
        {1, 2}, s.directions, [&](int row_tiles) { return plan_of(s, type, blocks, row_tiles); },
        [&](const Plan& plan) { return resident(plan, type); });
  }
  return {};
}

}  // namespace

bool lstm_cluster_backward_fits(const LstmShape& s, Type type) { return choose(s, type).row_tiles > 0; }

size_t lstm_cluster_backward_workspace(const LstmShape&, Type) { return 0; }

std::string launch_lstm_cluster_backward(const LstmBackward& p, Type type, Stream stream) {
  Plan plan = choose(p.shape, type);
  if (!plan.row_tiles) return "no cluster of this device holds the recurrent weights";
  plan.launch.stream = stream;
  return with_kernel(plan, type, [&](auto* kernel) { return launch(plan.launch, kernel, p, plan.tile); });
}

}  // namespace fastseq::cuda
