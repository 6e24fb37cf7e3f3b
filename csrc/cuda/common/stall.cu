#include "cuda/common/stall.h"

#include "cuda/common/launch.cuh"

namespace fastseq::cuda {
namespace {

#ifdef FASTSEQ_HOST_DEVICE

unsigned* allocated() {
  static unsigned word = 0;
  return &word;
}

#else

// The first call may stand in the capture of a CUDA graph, which forbids allocations that its mode does not relax.
unsigned* allocated() {
  void* word = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t error = cudaHostAlloc(&word, sizeof(unsigned), cudaHostAllocPortable | cudaHostAllocMapped);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (!error_text(error).empty()) return nullptr;
  *static_cast<unsigned*>(word) = 0;
  return static_cast<unsigned*>(word);
}

#endif

}  // namespace

unsigned* stall_word() {
  static unsigned* const word = allocated();
  return word;
}

bool take_stall() {
  unsigned* word = stall_word();
  return word && __atomic_exchange_n(word, 0u, __ATOMIC_ACQ_REL) != 0;
}

}  // namespace fastseq::cuda
