// Memory pool shared by all calls: fresh pages from the system cost more time than a short call computes.
#pragma once

#include <cstdint>

#include "checks.h"

namespace fastseq::cpu {

// Scratch memory of at least `bytes`, 64-byte aligned, returned to the pool at the end of the scope.
class PooledScratch {
 public:
  explicit PooledScratch(int64_t bytes);
  ~PooledScratch();
  PooledScratch(const PooledScratch&) = delete;

  template <class T = char>
  T* at(int64_t byte) const {
    return reinterpret_cast<T*>(data_ + byte);
  }

 private:
  int64_t size_;
  char* data_;
};

// An uninitialised contiguous CPU tensor whose memory comes from the pool and returns to it.
Tensor pooled_empty(const Tensor& like, const Shape& shape, ScalarType dtype);

// Frees all unused memory of the pool. Returns the number of bytes.
int64_t empty_pool();

}  // namespace fastseq::cpu
