// Planner and launcher of the backward cluster recurrence: cluster size, tile of the batch.
#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/lstm/cluster_backward.cuh"
#include "cuda/lstm/cost.h"
#include "cuda/lstm/params.h"

namespace fastseq::cuda {
namespace {

using namespace cluster;

struct ClusterBackwardPlan {
  BackwardTile tile;
  Launch launch;
  int unit_tiles = 0, row_tiles = 0;  // M, N
};

// Returns run(kernel) for the plan's instantiation; run(nullptr) if there is none.
template <class Run>
auto with_kernel(const ClusterBackwardPlan& plan, Type type, const Run& run) {
  return with_float_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Kernel = void (*)(LstmBackwardParams, BackwardTile);
    const int M = plan.unit_tiles, N = plan.row_tiles;
    Kernel kernel = nullptr;
    if (M == 1 && N == 1) kernel = lstm_cluster_backward_kernel<T, 1, 1>;
    if (M == 1 && N == 2) kernel = lstm_cluster_backward_kernel<T, 1, 2>;
    if (M == 2 && N == 1) kernel = lstm_cluster_backward_kernel<T, 2, 1>;
    if (M == 2 && N == 2) kernel = lstm_cluster_backward_kernel<T, 2, 2>;
    if constexpr (sizeof(T) == 2) {  // float weights would need 256 registers
      if (M == 4 && N == 1) kernel = lstm_cluster_backward_kernel<T, 4, 1>;
      if (M == 4 && N == 2) kernel = lstm_cluster_backward_kernel<T, 4, 2>;
    }
    return run(kernel);
  });
}

// Returns the plan with clusters of `blocks` blocks and tiles of 8 * row_tiles sequences, or nullopt if it does not
// fit.
std::optional<ClusterBackwardPlan> plan_of(const LstmShape& s, Type type, int blocks, int row_tiles) {
  ClusterBackwardPlan plan;
  const int units = static_cast<int>(divide_up(divide_up(s.hidden, blocks), 8) * 8);
  const int64_t tiles = divide_up(s.batch, 8 * row_tiles), clusters = tiles * s.directions;
  if (units > kUnits || clusters * blocks > std::numeric_limits<int32_t>::max()) return {};
  const int steps = type == Type::kFloat ? kGateSteps<float> : kGateSteps<bf16>;
  plan.tile = {blocks, units, static_cast<int>(tiles), 8 * row_tiles, (1 << 16) / (units / 8) + 1};
  plan.unit_tiles = std::max(1, blocks / 4);  // layer: 2 tiles of 16 units a block; 8 warps share them
  plan.launch = {.grid = dim3(static_cast<unsigned>(clusters * blocks)),
                 .block = dim3(kThreads),
                 .shared_memory = BackwardMemory(plan.tile, steps, row_tiles).bytes,
                 .cluster = static_cast<unsigned>(blocks)};
  plan.row_tiles = row_tiles;
  if (plan.launch.shared_memory > device_limits().shared_memory) return {};
  return plan;
}

int resident(const ClusterBackwardPlan& plan, Type type) {
  return with_kernel(plan, type, [&](auto* kernel) { return kernel ? resident_clusters(plan.launch, kernel) : 0; });
}

// Cycles of the step clock, and the partial sums (float) of the tile's pairs of sequences from the other blocks.
double microseconds_of(const LstmShape& s, const ClusterBackwardPlan& plan, Type type) {
  const auto& clock = type == Type::kFloat ? cost::kClusterBackwardFloat : cost::kClusterBackwardHalf;
  const double units = static_cast<double>(plan.tile.units) * plan.tile.blocks;
  const double pairs = static_cast<double>(divide_up(std::min<int64_t>(plan.tile.rows, s.batch), 2));
  const double received = pairs * units * sizeof(float) * 2 / cost::kRemoteBytes;
  const double waves = cost::waves(plan.tile.tiles * s.directions, resident(plan, type));
  const double cycles = waves * (clock[plan.unit_tiles / 2][plan.row_tiles - 1] + received);
  return cost::microseconds(cycles, cost::kClusterScale.backward);
}

// Chooses the smallest cluster that holds H units, then the tiles of the batch by best_tiles and
// spread.
std::optional<ClusterBackwardPlan> choose(const LstmShape& s, Type type) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (device_limits().capability < 90 || (type == Type::kFloat && !s.tf32)) return {};
  if (s.steps >= kMost || s.batch > kMost - 32) return {};
  for (const int blocks : {2, 4, 8, 16}) {
    if (s.hidden > static_cast<int64_t>(kUnits) * blocks) continue;
    const auto plan = best_tiles(
        {1, 2}, s.directions, [&](int row_tiles) { return plan_of(s, type, blocks, row_tiles); },
        [&](const ClusterBackwardPlan& plan) { return resident(plan, type); });
    if (!plan) return {};
    return spread(*plan, s, resident(*plan, type) - cost::kHeldClusters);
  }
  return {};
}

}  // namespace

std::optional<LstmPlan<LstmBackwardParams>> plan_lstm_cluster_backward(const LstmShape& s, Type type) {
  const std::optional<ClusterBackwardPlan> chosen = choose(s, type);
  if (!chosen) return {};
  const double share = cost::share_of(chosen->tile.tiles * s.directions, resident(*chosen, type));
  return {
      {0, microseconds_of(s, *chosen, type), share, [plan = *chosen, type](const LstmBackwardParams& p, Stream stream) {
         Launch l = plan.launch;
         l.stream = stream;
         return with_kernel(plan, type, [&](auto* kernel) { return launch_together(l, kernel, p, plan.tile); });
       }}};
}

}  // namespace fastseq::cuda
