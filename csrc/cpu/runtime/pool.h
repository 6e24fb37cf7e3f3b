// Memory of the CPU operators. Scratch memory and saved activations come from a pool shared by all calls: fresh pages
// from the system cost more time than a short call computes. Results come from torch's allocator.
#pragma once

#include <cstdint>

#include "checks.h"
#include "cpu/runtime/out_of_memory.h"

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

// An uninitialised contiguous CPU tensor that is saved for the backward. Its memory comes from the pool and returns to
// it, so torch can neither resize nor free its storage: it must not reach users.
Tensor pooled_empty(const Shape& shape, ScalarType dtype);

// An uninitialised contiguous CPU tensor for a result, in memory of torch's allocator.
Tensor result_empty(const Shape& shape, ScalarType dtype);

// Frees all unused memory of the pool. Returns the number of bytes.
int64_t empty_pool();

// An operator that empties the pool and starts again if it runs out of memory. Register &Retried<&op>::run for op.
template <auto op>
struct Retried;
template <class R, class... Arguments, R (*op)(Arguments...)>
struct Retried<op> {
  static R run(const Arguments&... arguments) {
    try {
      return op(arguments...);
    } catch (const std::bad_alloc&) {
      empty_pool();
    }
    try {
      return op(arguments...);
    } catch (const OutOfMemory&) {
      throw;
    } catch (const std::bad_alloc&) {
      throw OutOfMemory();
    }
  }
};

}  // namespace fastseq::cpu
