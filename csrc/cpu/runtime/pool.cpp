#include "cpu/runtime/pool.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
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
constexpr int64_t kLargestInHeap = 1 << 25;       // bytes; glibc maps and unmaps larger blocks one by one

// Fills scratch memory, saved tensors and results with NaN if $FASTSEQ_POISON is 1, for tests.
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

// Asks for huge pages where whole ones fit. A hint: failure costs speed only.
void advise_huge_pages([[maybe_unused]] char* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

class Pool {
 public:
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  char* take(int64_t size) {
    if (size >= kSmallestPooled) {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto blocks = unused_.find(size);
      if (blocks != unused_.end() && !blocks->second.empty()) {
        char* block = blocks->second.back();
        blocks->second.pop_back();
        kept_ -= size;
        return block;
      }
    }
    return allocate(size);
  }

  void give(int64_t size, char* block) {
    if (size >= kSmallestPooled) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!kSanitized && kept_ + size <= kKeptLimit && keep(size, block)) return;
    }
    std::free(block);
  }

  // Frees all unused blocks. Returns their bytes.
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
  // Returns false if the list of blocks cannot grow. Destructors call it, so it does not throw.
  bool keep(int64_t size, char* block) noexcept {
    try {
      unused_[size].push_back(block);
    } catch (const std::bad_alloc&) {
      return false;
    }
    kept_ += size;
    return true;
  }

  static char* allocate(int64_t size) {
    void* block = nullptr;
    if (posix_memalign(&block, size >= kHugePage ? kHugePage : 64, size) != 0) throw OutOfMemory(size);
    if (size >= kHugePage) advise_huge_pages(static_cast<char*>(block), size);
    return static_cast<char*>(block);
  }

  std::mutex mutex_;
  std::unordered_map<int64_t, std::vector<char*>> unused_;
  int64_t kept_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool = *new Pool;

// Makes glibc keep the memory of freed results for the next call. It returns the end of the heap to the system at twice
// the size of the largest mapped block freed so far, 256 KiB at first: then each call faults all pages of its results.
// Freeing one block of the largest size that counts raises that to 64 MiB, without a page touched.
[[maybe_unused]] const bool heap_grown = [] {
  void* volatile block = std::malloc(kLargestInHeap - 4096);  // volatile: compilers drop a pair of malloc and free
  std::free(block);
  return true;
}();

// A fork copies the lock and of all threads only the caller. The caller holds the lock meanwhile, so that the child can
// release it.
[[maybe_unused]] const int fork_handlers =
    pthread_atfork([] { pool.lock(); }, [] { pool.unlock(); }, [] { pool.unlock(); });

int64_t bytes_of(const Shape& shape, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Double || dtype == ScalarType::Long ? 8 : dtype == ScalarType::Float ? 4 : 2;
  if (dtype == ScalarType::Bool) bytes = 1;
  for (const int64_t size : shape) bytes *= size;
  return bytes;
}

Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  return strides;
}

int32_t aoti_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Double) return aoti_torch_dtype_float64();
  if (dtype == ScalarType::Long) return aoti_torch_dtype_int64();
  if (dtype == ScalarType::Bool) return aoti_torch_dtype_bool();
  if (dtype == ScalarType::BFloat16) return aoti_torch_dtype_bfloat16();
  return dtype == ScalarType::Half ? aoti_torch_dtype_float16() : aoti_torch_dtype_float32();
}

char* take(int64_t size) {
  char* const block = pool.take(size);
  if (poisoned()) std::memset(block, 0xff, size);
  return block;
}

}  // namespace

PooledScratch::PooledScratch(int64_t bytes) : size_(block_size(bytes + 1)), data_(take(size_)) {}

PooledScratch::~PooledScratch() { pool.give(size_, data_); }

Tensor result_empty(const Shape& shape, ScalarType dtype) {
  const int64_t bytes = bytes_of(shape, dtype);
  const Shape strides = contiguous_strides(shape);
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), aoti_dtype(dtype),
                                                        aoti_torch_device_type_cpu(), 0, &handle);
  if (error != AOTI_TORCH_SUCCESS) throw OutOfMemory(bytes);
  const Tensor result(handle);
  if (bytes >= kLargestInHeap) advise_huge_pages(static_cast<char*>(result.mutable_data_ptr()), bytes);
  if (poisoned() && bytes) std::memset(result.mutable_data_ptr(), 0xff, bytes);
  return result;
}

Tensor pooled_empty(const Shape& shape, ScalarType dtype) {
  const int64_t bytes = bytes_of(shape, dtype);
  if (bytes < kSmallestPooled) return result_empty(shape, dtype);
  const Shape strides = contiguous_strides(shape);
  const int64_t size = block_size(bytes);
  return torch::stable::from_blob(take(size), shape, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  dtype, [size](void* block) { pool.give(size, static_cast<char*>(block)); });
}

int64_t empty_pool() { return pool.empty(); }

}  // namespace fastseq::cpu
