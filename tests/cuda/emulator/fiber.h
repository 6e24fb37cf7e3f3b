// A fiber (a call stack that runs until it switches back) represents one CUDA thread. ThreadSanitizer is notified of
// every switch, without a happens-before edge. Only barriers, shuffles and release/acquire pairs create edges, so it
// reports races between CUDA threads as if they were CPU threads.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define HOST_TSAN 1
// Exclude the device's own code from the race detector: HOST_RAW the body of a function, Unseen the functions it calls.
#define HOST_RAW __attribute__((no_sanitize_thread, noinline))
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, size_t);
void __tsan_write_range(void*, size_t);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
#define HOST_TSAN 0
#define HOST_RAW
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
inline void __tsan_read_range(void*, size_t) {}
inline void __tsan_write_range(void*, size_t) {}
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __asan_poison_memory_region(void const volatile*, size_t);
void __asan_unpoison_memory_region(void const volatile*, size_t);
}
#else
inline void __asan_poison_memory_region(void const volatile*, size_t) {}
inline void __asan_unpoison_memory_region(void const volatile*, size_t) {}
#endif

namespace host {

struct Unseen {
#if HOST_TSAN
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  ~Unseen() {}  // avoids the unused-variable warning
#endif
};

// Saves the stack pointer in *from and continues at `to`. Callee-saved registers are on the stacks.
#if defined(__x86_64__)
extern "C" void fastseq_host_switch(void** from, void* to);
asm(R"(
.text
.weak fastseq_host_switch
.type fastseq_host_switch,@function
fastseq_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastseq_host_switch,.-fastseq_host_switch
)");
constexpr int kSavedRegisters = 6;
#else
#error "the host-side device switches stacks on x86-64 only: port fastseq_host_switch"
#endif

constexpr size_t kStackBytes = 64 << 10;

struct Stack {
  char* memory = nullptr;
  void* pointer = nullptr;  // stack pointer at the last switch
  void* tsan = nullptr;

  HOST_RAW void start(void (*entry)());
  HOST_RAW void end(bool returned);
};

// Stacks to reuse in the next launch. Mapping a stack costs more than running a thread of a small kernel; creating a
// ThreadSanitizer fiber costs far more. Reuse is safe, because every launch is ordered after the previous one.
inline std::vector<Stack>& idle_stacks() {
  static std::vector<Stack> stacks;
  return stacks;
}

HOST_RAW inline void Stack::start(void (*entry)()) {
  if (idle_stacks().empty()) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0));
  } else {
    *this = idle_stacks().back();
    idle_stacks().pop_back();
    __asan_unpoison_memory_region(memory, kStackBytes);
  }
  void** top = reinterpret_cast<void**>(memory + kStackBytes);
  *--top = nullptr;  // return address; entry() never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  pointer = top;
#if HOST_TSAN
  if (!tsan) tsan = __tsan_create_fiber(0);
#endif
}

// returned: the kernel returned on this stack. Otherwise destroys ThreadSanitizer's fiber, whose call stack is not
// empty.
HOST_RAW inline void Stack::end(bool returned) {
#if HOST_TSAN
  if (!returned) {
    __tsan_destroy_fiber(tsan);
    tsan = nullptr;
  }
#endif
  idle_stacks().push_back(*this);
}

// Switches from the running stack to `to`.
HOST_RAW inline void switch_stack(Stack& from, Stack& to) {
#if HOST_TSAN
  constexpr unsigned kNoEdge = 1;
  __tsan_switch_to_fiber(to.tsan, kNoEdge);
#endif
  fastseq_host_switch(&from.pointer, to.pointer);
}

}  // namespace host
