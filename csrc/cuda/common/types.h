// Shared by operators, launchers and kernels: element type, stream, divide_up.
#pragma once

#include <cstdint>
#include <string>

#include "lstm_math.h"  // FASTSEQ_INLINE

namespace fastseq::cuda {

enum class Type { kFloat, kDouble, kBFloat16, kHalf };

// cudaStream_t; nullptr on the host-side device.
using Stream = void*;

// The result of a launch whose blocks must run at the same time. error: "" for success. refused: the device has no room
// for the blocks, and nothing was enqueued.
struct Outcome {
  std::string error;
  bool refused = false;
};

// count / size, rounded up.
FASTSEQ_INLINE constexpr int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace fastseq::cuda
