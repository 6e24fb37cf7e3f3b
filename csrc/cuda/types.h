// What operators and launchers share: the element type of tensors, the stream.
#pragma once

namespace fastseq::cuda {

enum class Type { kFloat, kDouble, kBFloat16, kHalf };

// A cudaStream_t; nullptr on the host-side device.
using Stream = void*;

}  // namespace fastseq::cuda
