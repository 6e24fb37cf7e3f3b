// Launcher of the recurrence in clusters: which cluster, which tile of the batch.
#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/lstm/params.h"
#include "cuda/lstm/cluster_forward.cuh"

namespace fastseq::cuda {
namespace {

using namespace cluster;

struct Plan {
  ClusterTile tile;
  Launch launch;
  int registers = 0, row_tiles = 0;  // R, N
};

// run(kernel) with the kernel of these template arguments, or a null pointer: there is none.
template <class Run>
auto with_kernel(const Plan& plan, Type type, const Run& run) {
  return with_float_type(type, [&](auto zero) {
    using T = decltype(zero);
    using Kernel = void (*)(LstmForward, ClusterTile);
    const int R = plan.registers, N = plan.row_tiles;
    Kernel kernel = nullptr;
    if (plan.launch.block.x > 256) {  // 128 registers a thread: for one tile
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
      if constexpr (sizeof(T) == 2) {  // of floats it spills on sm_100
        if (R == 16 && N == 4) kernel = lstm_cluster_forward_kernel<T, 256, 16, 4>;
      }
    }
    return run(kernel);
  });
}

// A launch with clusters of so many blocks and tiles of 8 * row_tiles sequences; row_tiles 0 where it cannot be.
Plan plan_of(const LstmShape& s, Type type, int blocks, int row_tiles) {
  Plan plan;
  const int step = type == Type::kFloat ? kStep<float> : kStep<bf16>;
  const int units = static_cast<int>(divide_up(divide_up(s.hidden, blocks), 8) * 8);
  const int threads = 8 * units;  // two warps for 8 units
  const int steps = static_cast<int>(divide_up(static_cast<int64_t>(blocks) * units, 2 * step));
  const int64_t tiles = divide_up(s.batch, 8 * row_tiles), clusters = tiles * s.directions;
  if (threads > 512 || clusters * blocks > std::numeric_limits<int32_t>::max()) return plan;
  plan.registers = threads > 256 || (steps > 4 && steps <= 8) ? 8 : steps <= 4 ? 4 : 16;
  plan.tile = {blocks, units, std::max(steps, plan.registers), static_cast<int>(tiles)};
  plan.launch = {.grid = dim3(static_cast<unsigned>(clusters * blocks)),
                 .block = dim3(threads),
                 .shared_memory = ClusterMemory(plan.tile, plan.registers, row_tiles).bytes,
                 .cluster = static_cast<unsigned>(blocks)};
  if (plan.launch.shared_memory <= device_limits().shared_memory) plan.row_tiles = row_tiles;
  return plan;
}

int resident(const Plan& plan, Type type) {
  return with_kernel(plan, type, [&](auto* kernel) { return kernel ? resident_clusters(plan.launch, kernel) : 0; });
}

// The smallest cluster whose blocks have 32 units (a block has 256 threads then, and so the most registers), else what
// fits; of its tiles of the batch the best.
Plan choose(const LstmShape& s, Type type) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (device_limits().capability < 90 || (type == Type::kFloat && !s.tf32)) return {};
  constexpr int64_t kMostHidden = 512;  // beyond it shared memory would be read longer than h travels through L2
  if (s.hidden > kMostHidden || s.steps > kMost || s.batch > kMost - 32) return {};
  for (const int most_units : {32, 64}) {
    for (const int blocks : {2, 4, 8, 16}) {
      if (s.hidden > static_cast<int64_t>(most_units) * blocks) continue;
      const Plan plan = best_tiles(
          {1, 2, 4}, s.directions, [&](int row_tiles) { return plan_of(s, type, blocks, row_tiles); },
          [&](const Plan& plan) { return resident(plan, type); });
      if (plan.row_tiles) return plan;
    }
  }
  return {};
}

}  // namespace

bool lstm_cluster_forward_fits(const LstmShape& s, Type type) { return choose(s, type).row_tiles > 0; }

size_t lstm_cluster_forward_workspace(const LstmShape&, Type) { return 0; }

std::string launch_lstm_cluster_forward(const LstmForward& p, Type type, Stream stream) {
  Plan plan = choose(p.shape, type);
  if (!plan.row_tiles) return "no cluster of this device holds the recurrent weights";
  plan.launch.stream = stream;
  return with_kernel(plan, type, [&](auto* kernel) { return launch(plan.launch, kernel, p, plan.tile); });
}

}  // namespace fastseq::cuda
