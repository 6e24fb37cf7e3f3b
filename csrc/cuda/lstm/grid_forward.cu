// Planner and launcher of the forward grid recurrence.
#include "cuda/lstm/grid_forward.cuh"

#include <algorithm>
#include <limits>

#include "cuda/common/launch.cuh"
#include "cuda/common/stall.h"
#include "cuda/lstm/cost.h"

namespace fastseq::cuda {
namespace {

using namespace grid_forward;

// Returns run(M{}) for the arithmetic trait M of the call.
template <class Run>
auto with_arithmetic(const LstmShape& s, Type type, const Run& run) {
  switch (type) {
    case Type::kBFloat16:
      return run(MmaHalf<bf16>{});
    case Type::kHalf:
      return run(MmaHalf<half>{});
    default:
      return s.tf32 ? run(MmaTf32{}) : run(FmaFloat{});
  }
}

// Groups per pass (G).
template <class M>
int groups_at_once(int groups) {
  return groups == 1 || std::is_same_v<M, FmaFloat> ? 1 : 2;
}

// Returns the plan with `groups` groups a block, or nullopt if it exceeds the device. Spare multiprocessors become
// teams that split the batch.
template <class M>
std::optional<Plan> plan_of(const LstmShape& s, const DeviceLimits& device, int64_t groups) {
  Plan plan{};
  const int at_once = groups_at_once<M>(static_cast<int>(groups)),
            passes = static_cast<int>(divide_up(groups, at_once));
  plan.groups = static_cast<int>(groups);
  plan.blocks = static_cast<int>(divide_up(divide_up(s.hidden, kUnits), groups));
  const int64_t teams = device.multiprocessors / (s.directions * plan.blocks), tiles = divide_up(s.batch, kTile);
  if (teams == 0) return {};
  plan.tiles = static_cast<int>(divide_up(tiles, std::min(teams, tiles)));
  plan.splits = static_cast<int>(divide_up(tiles, plan.tiles));
  plan.chunks = static_cast<int>(divide_up(s.hidden, 4 * M::kVector));
  plan.warp_chunks = static_cast<int>(divide_up(plan.chunks, kWarps));
  plan.buffer_words = static_cast<unsigned>(plan.tiles) * plan.chunks * kTile * kChunkWords;
  const int kept = std::min(M::kKeptSlices / at_once, plan.warp_chunks);
  plan.shared_slices = (passes * plan.warp_chunks - kept) * at_once;
  plan.shared_memory = at_once == 1 ? Shared<1>::bytes(plan) : Shared<2>::bytes(plan);
  if (plan.shared_memory > device.shared_memory) return {};
  return plan;
}

// Cycles of the step clock, further pairs of tiles, h from L2, products, weights that are read from shared memory.
template <class M>
double cycles_of(const LstmShape& s, const Plan& plan) {
  constexpr int kKind = std::is_same_v<M, FmaFloat> ? 2 : std::is_same_v<M, MmaTf32> ? 1 : 0;
  const int at_once = groups_at_once<M>(plan.groups);
  const double passes = static_cast<double>(divide_up(plan.groups, at_once)), rows = plan.tiles * kTile;
  const double bytes = rows * plan.chunks * 64 * passes - cost::kForwardBytes[kKind];  // besides the clock's
  const double exchange = std::max(0.0, bytes) / cost::kL2Bytes;
  const double products = rows * 32.0 * plan.groups * static_cast<double>(s.hidden) / cost::kProducts[kKind];
  const double weights = plan.pairs() * plan.shared_slices * static_cast<double>(kSliceBytes) / cost::kSharedBytes;
  const double further = (plan.pairs() * passes - 1) * cost::kNextPair;
  return cost::kGridForward[kKind][at_once - 1] + further + exchange + products + weights;
}

template <class M>
std::optional<Plan> best_plan(const LstmShape& s) {
  const DeviceLimits device = device_limits();
  std::optional<Plan> best;
  for (int64_t groups = 1; groups <= divide_up(s.hidden, kUnits); ++groups) {
    const std::optional<Plan> plan = plan_of<M>(s, device, groups);
    if (plan && (!best || cycles_of<M>(s, *plan) < cycles_of<M>(s, *best))) best = plan;
  }
  return best;
}

template <class M, int G>
Outcome launch_plan(const LstmForwardParams& p, const Plan& plan, Stream stream) {
  const Launch l{.grid = dim3(static_cast<unsigned>(p.shape.directions * plan.splits * plan.blocks)),
                 .block = dim3(kThreads),
                 .shared_memory = plan.shared_memory,
                 .stream = stream,
                 .cooperative = true};
  return launch_together(l, lstm_grid_forward_kernel<M, G>, p, plan);
}

template <class M>
std::optional<LstmPlan<LstmForwardParams>> runnable(const LstmShape& s) {
  std::optional<Plan> best = best_plan<M>(s);
  if (!best) return {};
  best->stalled = stall_word();
  const size_t workspace = s.directions * best->splits * best->team_words() * sizeof(uint32_t);
  const double us = cost::microseconds(cycles_of<M>(s, *best), cost::kGridScale.forward);
  const double blocks = static_cast<double>(s.directions) * best->splits * best->blocks;
  return {{workspace, us, blocks / device_limits().multiprocessors,
           [plan = *best](const LstmForwardParams& p, Stream stream) {
             if constexpr (!std::is_same_v<M, FmaFloat>) {
               if (plan.groups > 1) return launch_plan<M, 2>(p, plan, stream);
             }
             return launch_plan<M, 1>(p, plan, stream);
           }}};
}

}  // namespace

std::optional<LstmPlan<LstmForwardParams>> plan_lstm_grid_forward(const LstmShape& s, Type type) {
  if (type == Type::kDouble || device_limits().capability < 80) return {};
  if (std::max(s.steps, s.batch + kPair) > std::numeric_limits<int>::max() || s.hidden > 65536) return {};
  if (s.batch >= 256 && s.hidden >= 1024) return {};  // GEMM-bound, not latency-bound: cuDNN is faster
  return with_arithmetic(s, type, [&](auto m) { return runnable<decltype(m)>(s); });
}

}  // namespace fastseq::cuda
