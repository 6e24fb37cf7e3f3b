// The cost model by which `auto` and the launchers choose a kernel of the recurrence: every constant, and nothing else.
//
// Not measured yet. kScale corrects the model by a GPU's figures: benchmarks/gpu_check.py prints it anew.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/lstm/params.h"

namespace fastseq::cuda::cost {

// Measured over modelled microseconds, forward and backward.
struct Scale {
  double forward, backward;
};
inline constexpr Scale kClusterScale{1, 1}, kGridScale{1, 1}, kStepsScale{1, 1}, kTorchScale{1, 1};

// Cycles of a step by the step clock: tests/cuda/step_clock.json, which tests/cuda/test_step_cost.py compares.
// 0: there is no such kernel. Half stands for both 16-bit types, Float for TF32.
inline constexpr int kClusterForwardHalf[4][3] = {// [R = 4, 8, 16; 8 with 512 threads][N = 1, 2, 4]
                                                  {1024, 1742, 3118},
                                                  {1125, 1952, 3574},
                                                  {1346, 2428, 4454},
                                                  {1888, 0, 0}};
inline constexpr int kClusterForwardFloat[4][3] = {
    {1168, 1921, 3806}, {1278, 2259, 4150}, {1506, 2706, 0}, {2198, 0, 0}};
inline constexpr int kClusterBackwardHalf[3][2] = {
    {1318, 1756}, {1374, 2254}, {1962, 2888}};  // [M = 1, 2, 4][N = 1, 2]
inline constexpr int kClusterBackwardFloat[3][2] = {{1564, 2378}, {1799, 2913}, {0, 0}};
inline constexpr int kGridForward[3][2] = {{3430, 3825}, {3523, 4027}, {4509, 0}};      // [half, TF32, float][G = 1, 2]
inline constexpr int kGridBackward[3][2] = {{2359, 2472}, {2325, 2431}, {3088, 3622}};  // [half, TF32, float][R = 1, 2]

// The clock holds the first tile of the batch and one chunk of K. Bytes a cycle beyond: a block's shared memory, other
// blocks' shared memory, L2 (arXiv 2402.13499, H800). Products a cycle and multiprocessor: 60 % of tensor-core peak.
inline constexpr double kSharedBytes = 128, kRemoteBytes = 12.6, kL2Bytes = 35;
inline constexpr double kForwardBytes[3] = {32768, 32768, 16384};  // of h, in the clock of the forward grid
inline constexpr double kProducts[3] = {1200, 600, 100};           // [half, TF32, float]
inline constexpr double kNextPair = 350, kNextTile = 175;          // cycles of a grid's further tiles, alone
inline constexpr double kGridGain = 0.95;        // the cost of a grid, in clusters', below which it precedes them
inline constexpr double kCycles = 1980;          // a microsecond (H200)
inline constexpr int kHeldClusters = 1;          // dies of one model differ by it; other work may hold it
inline constexpr double kSecondTile = 0.9;       // the cost of R = 2 below which R = 1 gives way
inline constexpr double kMultiprocessors = 132;  // of the device to which the next line belongs
inline constexpr double kProductRate[3] = {320e6, 165e6, 35e6};  // operations a microsecond of one small product
inline constexpr double kWeightBytes = 4.2e6;                    // a microsecond, from L2

// Microseconds: at least; beside the reading of weights; beside the product.
struct Launches {
  double least, weights, product;
};
inline constexpr Launches kTorchForward{4.7, 3.7, 3}, kTorchBackward{9, 6, 4};    // cuDNN: two kernels a step
inline constexpr Launches kStepsForward{7, 6, 4.5}, kStepsBackward{9, 8.5, 5.5};  // step_loop.h: three launches

// Index of the tables: half, TF32, float.
inline int kind_of(Type type, bool tf32) { return type != Type::kFloat ? 0 : tf32 ? 1 : 2; }

inline double microseconds(double cycles, double scale) { return cycles / kCycles * scale; }

// Rounds of clusters, each of which runs the whole sequence.
inline double waves(int64_t clusters, int resident) {
  return static_cast<double>(divide_up(clusters, std::max(1, resident - kHeldClusters)));
}

// The part of the device that these clusters hold.
inline double share_of(int64_t clusters, int resident) {
  return static_cast<double>(clusters) / std::max(1, resident - kHeldClusters);
}

// A step with one product of all rows, on a device of so many multiprocessors: by cuDNN, or by step_loop.h.
inline double of_launches(const LstmShape& s, Type type, const Launches& l, double scale, double multiprocessors) {
  const double H = static_cast<double>(s.hidden), size = type == Type::kFloat ? 4 : 2;
  const double share = std::clamp(multiprocessors, 1.0, kMultiprocessors) / kMultiprocessors;
  const double product = 8 * H * H * static_cast<double>(s.batch) / (kProductRate[kind_of(type, s.tf32)] * share);
  const double weights = 4 * H * H * size / (kWeightBytes * share);
  return static_cast<double>(s.directions) * scale * std::max({l.least, l.weights + weights, l.product + product});
}

}  // namespace fastseq::cuda::cost
