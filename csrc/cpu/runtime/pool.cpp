#include "cpu/runtime/pool.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastseq::cpu {
namespace {

constexpr int64_t kSmallestPooled = 1 << 16;      // bytes; smaller blocks go to malloc and free
constexpr int64_t kHugePage = 1 << 21;            // bytes; larger blocks are whole huge pages where the system has them
constexpr int64_t kKeptLimit = int64_t{1} << 30;  // unused bytes in the pool; blocks beyond it are freed

// Fills all memory that the pool hands out with NaN if $FASTSEQ_POISON is 1, for tests.
bool poisoned() {
  static const bool value = [] {
    const char* text = std::getenv("FASTSEQ_POISON");
    return text && std::strcmp(text, "1") == 0;
  }();
  return value;
}

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;  // no rounding up, no reuse: AddressSanitizer checks exact, freed blocks only
#else
constexpr bool kSanitized = false;
#endif

// Rounds up to one of few sizes, so that blocks can be reused: powers of two with three steps between, then huge pages.
int64_t block_size(int64_t bytes) {
  if (kSanitized) return bytes;
  if (bytes >= kHugePage) return (bytes + kHugePage - 1) / kHugePage * kHugePage;
  int64_t power = 64;
  while (power * 2 <= bytes) power *= 2;
  const int64_t step = power < 256 ? 64 : power / 4;
  return (bytes + step - 1) / step * step;
}

class Pool {
 public:
  char* take(int64_t size) {
    if (size >= kSmallestPooled) {
      std::lock_guard<std::mutex> lock(mutex_);
      auto& blocks = unused_[size];
      if (!blocks.empty()) {
        char* block = blocks.back();
        blocks.pop_back();
        kept_ -= size;
        return block;
      }
    }
    return allocate(size);
  }

  void give(int64_t size, char* block) {
    if (size >= kSmallestPooled) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!kSanitized && kept_ + size <= kKeptLimit) {
        unused_[size].push_back(block);
        kept_ += size;
        return;
      }
    }
    std::free(block);
  }

  int64_t empty() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [size, blocks] : unused_) {
      for (char* block : blocks) std::free(block);
    }
    unused_.clear();
    const int64_t freed = kept_;
    kept_ = 0;
    return freed;
  }

 private:
  static char* allocate(int64_t size) {
    void* block = nullptr;
    if (posix_memalign(&block, size >= kHugePage ? kHugePage : 64, size) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (size >= kHugePage) madvise(block, size, MADV_HUGEPAGE);  // a hint: failure costs speed only
#endif
    return static_cast<char*>(block);
  }

  std::mutex mutex_;
  std::unordered_map<int64_t, std::vector<char*>> unused_;
  int64_t kept_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

char* take(int64_t size) {
  char* const block = pool().take(size);
  if (poisoned()) std::memset(block, 0xff, size);
  return block;
}

}  // namespace

PooledScratch::PooledScratch(int64_t bytes) : size_(block_size(bytes + 1)), data_(take(size_)) {}

PooledScratch::~PooledScratch() { pool().give(size_, data_); }

Tensor pooled_empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (int64_t size : shape) bytes *= size;
  if (bytes == 0 || (bytes < kSmallestPooled && !poisoned())) return torch::stable::new_empty(like, shape, dtype);
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  const int64_t size = block_size(bytes);
  return torch::stable::from_blob(take(size), shape, strides, like.device(), dtype,
                                  [size](void* block) { pool().give(size, static_cast<char*>(block)); });
}

int64_t empty_pool() { return pool().empty(); }

}  // namespace fastseq::cpu
