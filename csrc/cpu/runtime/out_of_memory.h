// Exhausted memory: MemoryError in Python, with a sentence.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <new>

namespace fastseq::cpu {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(int64_t bytes) {
    std::snprintf(text_, sizeof text_, "fastseq: out of memory: %" PRId64 " bytes could not be allocated; %s", bytes,
                  kAdvice);
  }
  OutOfMemory() { std::snprintf(text_, sizeof text_, "fastseq: out of memory; %s", kAdvice); }
  const char* what() const noexcept override { return text_; }

 private:
  static constexpr const char* kAdvice = "use a smaller batch, fewer steps or fewer positions";
  char text_[160];
};

}  // namespace fastseq::cpu
