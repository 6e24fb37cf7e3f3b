// Planner and launcher of the backward grid recurrence.
#include "cuda/lstm/grid_backward.cuh"

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/common/stall.h"
#include "cuda/lstm/cost.h"

namespace fastseq::cuda {
namespace {

using namespace grid_backward;

// Sets pass_tiles and shared_memory: weights, carry, lengths and the sums of one pass. Returns false if the bytes
// exceed `limit`.
template <class Product, int R>
bool add_shared_memory(Plan& plan, size_t limit) {
  using Block = grid_backward::Block<Product, R>;
  const size_t in_shared = std::max(0, plan.warp_chunks - Block::kHeld);
  const size_t fixed = plan.warps * in_shared * R * Product::kParts * 32 * sizeof(uint4) +
                       plan.group_tiles * kTileRows * (Block::kBlockUnits * sizeof(float2) + sizeof(int));
  const size_t of_tile = kMaxWarps * Block::kTileSums * sizeof(float);
  constexpr int kMostTiles = 4;
  plan.pass_tiles = std::min(plan.group_tiles, kMostTiles);
  while (plan.pass_tiles > 1 && fixed + plan.pass_tiles * of_tile > limit) --plan.pass_tiles;
  plan.shared_memory = fixed + plan.pass_tiles * of_tile;
  return plan.shared_memory <= limit;
}

// Returns the plan with R tiles of units a block, or nullopt. One block per multiprocessor: slices of units times
// groups of rows.
template <class Product, int R>
std::optional<Plan> plan_with(const LstmShape& s, const DeviceLimits& device) {
  Plan plan{};
  const int64_t slices = divide_up(s.hidden, kTileUnits * R), tiles = divide_up(s.batch, kTileRows);
  if (device.capability < 80 || s.directions * slices > device.multiprocessors || tiles > (1 << 24)) return {};
  plan.unit_tiles = R;
  plan.slices = static_cast<int>(slices);
  plan.tiles = static_cast<int>(tiles);
  const int64_t most_groups = device.multiprocessors / (s.directions * slices);
  plan.group_tiles = static_cast<int>(divide_up(tiles, most_groups));
  plan.groups = static_cast<int>(divide_up(tiles, plan.group_tiles));
  plan.chunks = plan.slices * kTileUnits * R / Product::kUnits;
  plan.warps = static_cast<int>(std::clamp<int64_t>(divide_up(plan.chunks, 4), 4, kMaxWarps));
  plan.warp_chunks = static_cast<int>(divide_up(plan.chunks, plan.warps));
  plan.warps = static_cast<int>(divide_up(plan.chunks, plan.warp_chunks));  // so every warp has a chunk
  if (!add_shared_memory<Product, R>(plan, device.shared_memory)) return {};
  return plan;
}

// Cycles of the step clock, further tiles, gate gradients from L2, products, weights read from shared memory.
template <class Product>
double cycles_of(const LstmShape& s, const Plan& plan) {
  constexpr int kKind = std::is_same_v<Product, FmaFloat> ? 2 : std::is_same_v<Product, MmaTf32> ? 1 : 0;
  const int R = plan.unit_tiles, kept = Product::held_parts(R) / Product::kParts / R;
  const double rows = plan.group_tiles * kTileRows, numbers = plan.chunks * Product::kUnits * 4.0;
  const double exchange = rows * numbers * sizeof(typename Product::Element) / cost::kL2Bytes;
  const double products = rows * kTileUnits * R * 4.0 * static_cast<double>(s.hidden) / cost::kProducts[kKind];
  const double shared = plan.warps * std::max(0, plan.warp_chunks - kept) * R * Product::kParts * 32.0 * sizeof(uint4);
  const double further = (plan.group_tiles - 1) * cost::kNextTile;
  return cost::kGridBackward[kKind][R - 1] + further + exchange + products +
         plan.group_tiles * shared / cost::kSharedBytes;
}

// Two tiles of units a block halve the slices, so that a block reads half of the rows' gradients.
template <class Product>
std::optional<Plan> plan_of(const LstmShape& s) {
  const DeviceLimits device = device_limits();
  const std::optional<Plan> one = plan_with<Product, 1>(s, device), two = plan_with<Product, 2>(s, device);
  if (!one || !two) return one ? one : two;
  return cycles_of<Product>(s, *two) < cost::kSecondTile * cycles_of<Product>(s, *one) ? two : one;
}

// Returns run(Product{}) for the arithmetic trait of the call.
template <class Run>
auto with_product(const LstmShape& s, Type type, const Run& run) {
  switch (type) {
    case Type::kBFloat16:
      return run(MmaHalf<bf16>{});
    case Type::kHalf:
      return run(MmaHalf<half>{});
    default:
      return s.tf32 ? run(MmaTf32{}) : run(FmaFloat{});
  }
}

template <class Product, int R>
Outcome launch_plan(const LstmBackwardParams& p, const Plan& plan, Stream stream) {
  const Launch l{.grid = dim3(plan.slices, plan.groups, static_cast<unsigned>(p.shape.directions)),
                 .block = dim3(32 * plan.warps),
                 .shared_memory = plan.shared_memory,
                 .stream = stream,
                 .cooperative = true};
  return launch_together(l, lstm_grid_backward_kernel<Product, R>, p, plan);
}

// Bytes of the workspace: stop words, then both buffers of the exchange.
template <class Product>
size_t workspace_of(const LstmShape& s, const Plan& plan) {
  const size_t stops = s.directions * plan.groups * kStopStride * sizeof(unsigned);
  const size_t numbers =
      2 * s.directions * plan.tiles * kTileRows * static_cast<size_t>(plan.chunks) * Product::kUnits * 4;
  return stops + numbers * sizeof(typename Product::Element);
}

template <class Product>
std::optional<LstmPlan<LstmBackwardParams>> runnable(const LstmShape& s) {
  std::optional<Plan> best = plan_of<Product>(s);
  if (!best) return {};
  best->stalled = stall_word();
  const double us = cost::microseconds(cycles_of<Product>(s, *best), cost::kGridScale.backward);
  const double blocks = static_cast<double>(s.directions) * best->slices * best->groups;
  return {{workspace_of<Product>(s, *best), us, blocks / device_limits().multiprocessors,
           [plan = *best](const LstmBackwardParams& p, Stream stream) {
             return plan.unit_tiles == 2 ? launch_plan<Product, 2>(p, plan, stream)
                                         : launch_plan<Product, 1>(p, plan, stream);
           }}};
}

}  // namespace

std::optional<LstmPlan<LstmBackwardParams>> plan_lstm_grid_backward(const LstmShape& s, Type type) {
  if (type == Type::kDouble) return {};
  return with_product(s, type, [&](auto product) { return runnable<decltype(product)>(s); });
}

}  // namespace fastseq::cuda
