// The kernels of every instruction set, behind one table of function pointers per storage type S.
#pragma once

#include <cstdint>

#include "attention.h"
#include "storage.h"

namespace fastseq {

template <class S>
struct Kernels {
  // As many multiply-adds as registers hold at once, `steps` times: what the peak is measured with. Returns the number
  // of floating-point operations.
  int64_t (*fma_chain)(int64_t steps);

  // Sentences [begin, end), with attention_scratch() bytes of memory. See attention.h.
  void (*attention_forward)(const AttentionForward<S>& p, int64_t begin, int64_t end, void* scratch);
  void (*attention_backward)(const AttentionBackward<S>& p, int64_t begin, int64_t end, void* scratch);
  void (*attention_prepare)(const AttentionPrepare<S>& p, int64_t begin, int64_t end, void* scratch);
};

// The table of machine_isa().
template <class S>
const Kernels<S>& kernels();

}  // namespace fastseq
