// Planner and launcher of the forward cluster recurrence: cluster size, tile of the batch.
#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/lstm/cluster_forward.cuh"
#include "cuda/lstm/cost.h"
#include "cuda/lstm/params.h"

namespace fastseq::cuda {
namespace {

using namespace cluster;

struct ClusterForwardPlan {
  ForwardTile tile;
  Launch launch;
  int registers = 0, row_tiles = 0;  // R, N
};

// Returns run(kernel) for the plan's instantiation; run(nullptr) if there is none.
template <class Run>
auto with_kernel(const ClusterForwardPlan& plan, Type type, const Run& run) {
  return with_float_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Kernel = void (*)(LstmForwardParams, ForwardTile);
    const int R = plan.registers, N = plan.row_tiles;
    Kernel kernel = nullptr;
    if (plan.launch.block.x > 256) {  // 128 registers a thread suffice for N = 1 only
      if (R == 8 && N == 1) kernel = lstm_cluster_forward_kernel<T, 512, 8, 1>;
    } else {
      if (R == 4 && N == 1) kernel = lstm_cluster_forward_kernel<T, 256, 4, 1>;
      if (R == 4 && N == 2) kernel = lstm_cluster_forward_kernel<T, 256, 4, 2>;
      if (R == 4 && N == 4) kernel = lstm_cluster_forward_kernel<T, 256, 4, 4>;
      if (R == 8 && N == 1) kernel = lstm_cluster_forward_kernel<T, 256, 8, 1>;
      if (R == 8 && N == 2) kernel = lstm_cluster_forward_kernel<T, 256, 8, 2>;
      if (R == 8 && N == 4) kernel = lstm_cluster_forward_kernel<T, 256, 8, 4>;
      if (R == 16 && N == 1) kernel = lstm_cluster_forward_kernel<T, 256, 16, 1>;
      if (R == 16 && N == 2) kernel = lstm_cluster_forward_kernel<T, 256, 16, 2>;
      if constexpr (sizeof(T) == 2) {  // spills with float on sm_100
        if (R == 16 && N == 4) kernel = lstm_cluster_forward_kernel<T, 256, 16, 4>;
      }
    }
    return run(kernel);
  });
}

// Returns the plan with clusters of `blocks` blocks and tiles of 8 * row_tiles sequences, or nullopt if it does not
// fit.
std::optional<ClusterForwardPlan> plan_of(const LstmShape& s, Type type, int blocks, int row_tiles) {
  ClusterForwardPlan plan;
  const int step = type == Type::kFloat ? kStep<float> : kStep<bf16>;
  const int units = static_cast<int>(divide_up(divide_up(s.hidden, blocks), 8) * 8);
  const int threads = 8 * units;  // two warps per 8 units
  const int steps = static_cast<int>(divide_up(static_cast<int64_t>(blocks) * units, 2 * step));
  const int64_t tiles = divide_up(s.batch, 8 * row_tiles), clusters = tiles * s.directions;
  if (threads > 512 || clusters * blocks > std::numeric_limits<int32_t>::max()) return {};
  plan.registers = threads > 256 || (steps > 4 && steps <= 8) ? 8 : steps <= 4 ? 4 : 16;
  plan.tile = {blocks, units, std::max(steps, plan.registers), static_cast<int>(tiles), 8 * row_tiles};
  plan.launch = {.grid = dim3(static_cast<unsigned>(clusters * blocks)),
                 .block = dim3(threads),
                 .shared_memory = ForwardMemory(plan.tile, plan.registers, row_tiles).bytes,
                 .cluster = static_cast<unsigned>(blocks)};
  plan.row_tiles = row_tiles;
  if (plan.launch.shared_memory > device_limits().shared_memory) return {};
  return plan;
}

int resident(const ClusterForwardPlan& plan, Type type) {
  return with_kernel(plan, type, [&](auto* kernel) { return kernel ? resident_clusters(plan.launch, kernel) : 0; });
}

// Cycles of the step clock, weights that are read from shared memory, h of the tile's sequences from the other blocks.
double microseconds_of(const LstmShape& s, const ClusterForwardPlan& plan, Type type) {
  const auto& clock = type == Type::kFloat ? cost::kClusterForwardFloat : cost::kClusterForwardHalf;
  const int row = plan.launch.block.x > 256 ? 3 : plan.registers / 8, column = plan.row_tiles / 2;
  const double size = type == Type::kFloat ? 4 : 2, warps = plan.launch.block.x / 32;
  const double shared = std::max(0, plan.tile.steps - plan.registers) * warps * 1024 / cost::kSharedBytes;
  const double rows = static_cast<double>(std::min<int64_t>(plan.tile.rows, s.batch));
  const double received = rows * static_cast<double>(s.hidden) * size / cost::kRemoteBytes;
  const double waves = cost::waves(plan.tile.tiles * s.directions, resident(plan, type));
  return cost::microseconds(waves * (clock[row][column] + shared + received), cost::kClusterScale.forward);
}

// Chooses the smallest cluster with at most 32 units a block (256 threads, 255 registers each), else the smallest with
// at most 64. Then chooses the tiles of the batch by best_tiles and spread.
std::optional<ClusterForwardPlan> choose(const LstmShape& s, Type type) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (device_limits().capability < 90 || (type == Type::kFloat && !s.tf32)) return {};
  constexpr int64_t kMostHidden = 512;  // above, reading W_hh from shared memory costs more than exchanging h by L2
  if (s.hidden > kMostHidden || s.steps > kMost || s.batch > kMost - 32) return {};
  for (const int most_units : {32, 64}) {
    for (const int blocks : {2, 4, 8, 16}) {
      if (s.hidden > static_cast<int64_t>(most_units) * blocks) continue;
      const auto plan = best_tiles(
          {1, 2, 4}, s.directions, [&](int row_tiles) { return plan_of(s, type, blocks, row_tiles); },
          [&](const ClusterForwardPlan& plan) { return resident(plan, type); });
      if (plan) return spread(*plan, s, resident(*plan, type) - cost::kHeldClusters);
    }
  }
  return {};
}

}  // namespace

std::optional<LstmPlan<LstmForwardParams>> plan_lstm_cluster_forward(const LstmShape& s, Type type) {
  const std::optional<ClusterForwardPlan> chosen = choose(s, type);
  if (!chosen) return {};
  const double share = cost::share_of(chosen->tile.tiles * s.directions, resident(*chosen, type));
  return {
      {0, microseconds_of(s, *chosen, type), share, [plan = *chosen, type](const LstmForwardParams& p, Stream stream) {
         Launch l = plan.launch;
         l.stream = stream;
         return with_kernel(plan, type, [&](auto* kernel) { return launch_together(l, kernel, p, plan.tile); });
       }}};
}

}  // namespace fastseq::cuda
