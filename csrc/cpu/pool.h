// Memory that calls hand on to later calls: fresh pages from the system cost more than a short call computes.
#pragma once

#include <cstdint>

#include "../checks.h"

namespace fastseq {

// Scratch memory of at least `bytes`, 64-byte aligned, given back at the end of the scope.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  template <class T = char>
  T* at(int64_t byte) const {
    return reinterpret_cast<T*>(data_ + byte);
  }

 private:
  int64_t size_;
  char* data_;
};

// An uninitialised contiguous tensor on the CPU whose memory comes from the pool and returns there.
Tensor pooled_empty(const Tensor& like, const Shape& shape, ScalarType dtype);

// Gives unused memory back to the system; returns how many bytes that were.
int64_t empty_pool();

}  // namespace fastseq
