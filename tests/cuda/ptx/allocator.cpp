// An allocator of CPU tensors that records the exact size of each tensor, so that the interpreter detects accesses past
// its end. Fills new memory with 0xff (NaN).
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <map>

namespace {

std::map<void*, size_t>& buffers() {
  static std::map<void*, size_t> instance;
  return instance;
}

void release(void* p) {
  buffers().erase(p);
  std::free(p);
}

struct Watched final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const size_t room = (size + 255) / 128 * 128;  // whole 16-byte words stay inside
    void* p = std::aligned_alloc(128, room);
    TORCH_CHECK(p, "out of memory");
    std::memset(p, 0xff, room);
    buffers()[p] = size;
    return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void fastseq_ptx_watch(int on) {
  static Watched watched;
  static c10::Allocator* const before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &watched : before, /*priority=*/255);
}

// Writes addresses and sizes of up to `room` buffers. Returns the number of buffers.
extern "C" __attribute__((visibility("default"))) size_t fastseq_ptx_buffers(size_t* pairs, size_t room) {
  size_t count = 0;
  for (const auto& [p, size] : buffers()) {
    if (count < room) {
      pairs[2 * count] = reinterpret_cast<size_t>(p);
      pairs[2 * count + 1] = size;
    }
    ++count;
  }
  return count;
}
