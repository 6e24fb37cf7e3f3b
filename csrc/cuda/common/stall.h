// A word of host memory in which a kernel reports that a wait for other blocks ended in vain. No CUDA header, no torch.
#pragma once

namespace fastseq::cuda {

// The word, for the host and for kernels of every device; 0 at first. Null if the driver has no such memory.
unsigned* stall_word();

// Returns true if a kernel has set the word since the last call. Blocks of a kernel that still runs may set it again.
bool take_stall();

}  // namespace fastseq::cuda
