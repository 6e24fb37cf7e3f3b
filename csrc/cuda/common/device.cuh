// Every non-portable instruction of the CUDA kernels, each with a host fallback. With FASTSEQ_HOST_DEVICE the same
// kernels compile for the CPU and run in tests/cuda/emulator. Kernels contain no #if and no asm.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef FASTSEQ_HOST_DEVICE
#include "cpu/runtime/storage.h"
#include "cuda_names.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <type_traits>
#endif

#include "lstm_math.h"

// Shared memory: a static array of the block (16-byte aligned); the dynamic bytes of the launch, declared once a
// kernel.
#ifdef FASTSEQ_HOST_DEVICE
#define FASTSEQ_SHARED(T, name, count)          \
  T* name = static_cast<T*>(host::shared_array( \
      [] {                                      \
        static const char here = 0;             \
        return (const void*)&here;              \
      }(),                                      \
      sizeof(T) * (count)))
#define FASTSEQ_DYNAMIC_SHARED(name) unsigned char* name = (unsigned char*)host::world().running->block->shared
#else
#define FASTSEQ_SHARED(T, name, count) __shared__ alignas(16) T name[count]
#define FASTSEQ_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#define FASTSEQ_DEVICE __device__ __forceinline__

namespace fastseq::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Element types. Arithmetic on double is in double, on all others in float.
#ifdef FASTSEQ_HOST_DEVICE
using bf16 = BFloat16;
using half = Half;
FASTSEQ_DEVICE float to_float(bf16 x) { return load(x); }
FASTSEQ_DEVICE float to_float(half x) { return load(x); }
FASTSEQ_DEVICE void from_float(float x, bf16* out) { store(x, out); }
FASTSEQ_DEVICE void from_float(float x, half* out) { store(x, out); }
#else
using bf16 = __nv_bfloat16;
using half = __half;
FASTSEQ_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
FASTSEQ_DEVICE float to_float(half x) { return __half2float(x); }
FASTSEQ_DEVICE void from_float(float x, bf16* out) { *out = __float2bfloat16_rn(x); }
FASTSEQ_DEVICE void from_float(float x, half* out) { *out = __float2half_rn(x); }
#endif
FASTSEQ_DEVICE float to_float(float x) { return x; }
FASTSEQ_DEVICE double to_float(double x) { return x; }
FASTSEQ_DEVICE void from_float(float x, float* out) { *out = x; }
FASTSEQ_DEVICE void from_float(double x, double* out) { *out = x; }

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulateOf<T>::type;

// N adjacent elements: one load or store instruction if they make 4, 8 or 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
};

// Elements of the widest vector of T, 16 bytes.
template <class T>
constexpr int kWidth = static_cast<int>(16 / sizeof(T));

// Loads N elements; p is aligned to N elements.
template <int N, class T>
FASTSEQ_DEVICE void load_vector(Acc<T> (&out)[N], const T* p) {
  const Vector<T, N> v = *reinterpret_cast<const Vector<T, N>*>(p);
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = to_float(v.element[k]);
}

template <int N, class T>
FASTSEQ_DEVICE void store_vector(T* p, const Acc<T> (&x)[N]) {
  Vector<T, N> v;
#pragma unroll
  for (int k = 0; k < N; ++k) from_float(x[k], &v.element[k]);
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

// Loads N numbers of the accumulation type, in as many 16-byte loads as needed.
template <int N, class A>
FASTSEQ_DEVICE void load_wide(A (&out)[N], const A* p) {
  constexpr int kPart = N < kWidth<A> ? N : kWidth<A>;
#pragma unroll
  for (int k = 0; k < N; k += kPart) {
    const Vector<A, kPart> v = *reinterpret_cast<const Vector<A, kPart>*>(p + k);
#pragma unroll
    for (int i = 0; i < kPart; ++i) out[k + i] = v.element[i];
  }
}

template <int N, class A>
FASTSEQ_DEVICE void store_wide(A* p, const A (&x)[N]) {
  constexpr int kPart = N < kWidth<A> ? N : kWidth<A>;
#pragma unroll
  for (int k = 0; k < N; k += kPart) {
    Vector<A, kPart> v;
#pragma unroll
    for (int i = 0; i < kPart; ++i) v.element[i] = x[k + i];
    *reinterpret_cast<Vector<A, kPart>*>(p + k) = v;
  }
}

// Packs two 16-bit numbers into one operand register of a matrix instruction, the first in the low half.
template <class T>
FASTSEQ_DEVICE uint32_t pack_pair(float low, float high) {
  uint32_t bits;
#ifdef FASTSEQ_HOST_DEVICE
  Vector<T, 2> v;
  from_float(low, &v.element[0]);
  from_float(high, &v.element[1]);
  memcpy(&bits, &v, sizeof bits);
#else
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#endif
  return bits;
}

// The low halves of two words as one word: `a` in the low half with kFirstSecond, in the high half with kSecondFirst.
constexpr uint32_t kFirstSecond = 0x5410, kSecondFirst = 0x1054;

FASTSEQ_DEVICE uint32_t low_halves(uint32_t a, uint32_t b, uint32_t order) {
#ifdef FASTSEQ_HOST_DEVICE
  return order == kFirstSecond ? (a & 0xffffu) | b << 16 : (b & 0xffffu) | a << 16;
#else
  return __byte_perm(a, b, order);
#endif
}

// 2^x with an error of 2 ulp (ex2.approx.ftz).
FASTSEQ_DEVICE float exp2_fast(float x) {
#ifdef FASTSEQ_HOST_DEVICE
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

constexpr float kLog2E = 1.44269504f;

FASTSEQ_DEVICE float exp_fast(float x) { return exp2_fast(x * kLog2E); }

FASTSEQ_DEVICE float reciprocal_fast(float x) {
#ifdef FASTSEQ_HOST_DEVICE
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Sigmoid and tanh for results stored in T. float and double: accurate to a few ulp. 16-bit types: special-function
// instructions, whose error is below the rounding to T. No overflow: 1 / 2^inf = 0.
template <class T>
FASTSEQ_DEVICE Acc<T> sigmoid_for(Acc<T> x) {
  if constexpr (sizeof(T) == 2)
    return reciprocal_fast(1.0f + exp2_fast(-kLog2E * x));
  else
    return sigmoid(x);
}

template <class T>
FASTSEQ_DEVICE Acc<T> tanh_for(Acc<T> x) {
  if constexpr (sizeof(T) == 2)
    return fmaf(-2.0f, reciprocal_fast(1.0f + exp2_fast(2.0f * kLog2E * x)), 1.0f);
  else
    return tanh(x);
}

// tanh with a relative error of 2^-11 (tanh.approx), for results stored in bfloat16. The host fallback has the same
// error.
FASTSEQ_DEVICE float tanh_fast(float x) {
#ifdef FASTSEQ_HOST_DEVICE
  return float_from_bits((float_bits(tanh(x)) + 0x1000u) & ~0x1fffu);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

FASTSEQ_DEVICE int lane_id() { return threadIdx.x & 31; }

// Reads threadIdx.x anew (volatile). In a loop with high register pressure the compiler then recomputes the values
// derived from it at each use instead of keeping them in registers.
FASTSEQ_DEVICE int thread_now() {
#ifdef FASTSEQ_HOST_DEVICE
  return threadIdx.x;
#else
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
#endif
}

FASTSEQ_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// N warp sums at once, N a power of 2 up to 32: lane k returns the sum over all lanes of x[k / (32 / N)]. Overwrites x.
template <int N, int Offset = 16, class A, int Size>
FASTSEQ_DEVICE A warp_sums(A (&x)[Size]) {
  if constexpr (N > 1) {
    const bool upper = lane_id() & Offset;
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      const A kept = upper ? x[k + N / 2] : x[k], sent = upper ? x[k] : x[k + N / 2];
      x[k] = kept + __shfl_xor_sync(kAllLanes, sent, Offset);
    }
    return warp_sums<N / 2, Offset / 2>(x);
  } else {
#pragma unroll
    for (int offset = Offset; offset; offset /= 2) x[0] += __shfl_xor_sync(kAllLanes, x[0], offset);
    return x[0];
  }
}

FASTSEQ_DEVICE float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// Loads global memory that other blocks write during the kernel, bypassing L1, which is not coherent. T: 4, 8 or 16
// bytes.
template <class T>
FASTSEQ_DEVICE T load_l2(const T* p) {
#ifdef FASTSEQ_HOST_DEVICE
  return *p;
#else
  return __ldcg(p);
#endif
}

// Loads N elements that no thread reads again. A 16-byte load bypasses L1 and so evicts nothing from it.
template <int N, class T>
FASTSEQ_DEVICE void load_vector_l2(Acc<T> (&out)[N], const T* p) {
  if constexpr (sizeof(T) * N == 16) {
    const uint4 bits = load_l2(reinterpret_cast<const uint4*>(p));
    Vector<T, N> v;
    memcpy(&v, &bits, sizeof v);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = to_float(v.element[k]);
  } else {
    load_vector(out, p);
  }
}

template <class T>
FASTSEQ_DEVICE void store_l2(T* p, T x) {
#ifdef FASTSEQ_HOST_DEVICE
  *p = x;
#else
  __stcg(p, x);
#endif
}

// Flags between blocks of one grid. A thread that acquires the value sees every write that the releasing thread made
// before the release; after __syncthreads, every write of its block.
FASTSEQ_DEVICE void add_release(unsigned* flag, unsigned x) {
#ifdef FASTSEQ_HOST_DEVICE
  __atomic_fetch_add(flag, x, __ATOMIC_RELEASE);
  host::note_progress();
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(flag), "r"(x) : "memory");
#endif
}

FASTSEQ_DEVICE void store_release(unsigned* flag, unsigned x) {
#ifdef FASTSEQ_HOST_DEVICE
  __atomic_store_n(flag, x, __ATOMIC_RELEASE);
  host::note_progress();
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(x) : "memory");
#endif
}

// Returns the old value.
FASTSEQ_DEVICE unsigned exchange(unsigned* p, unsigned x) {
#ifdef FASTSEQ_HOST_DEVICE
  host::note_progress();
  return __atomic_exchange_n(p, x, __ATOMIC_ACQ_REL);
#else
  return atomicExch(p, x);
#endif
}

FASTSEQ_DEVICE unsigned load_acquire(const unsigned* flag) {
#ifdef FASTSEQ_HOST_DEVICE
  host::poll();
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
#else
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
  return x;
#endif
}

// Prints a line on the host's standard output, at its next synchronisation.
FASTSEQ_DEVICE void report(const char* message) {
  printf("fastseq: %s [block %u thread %u]\n", message, blockIdx.x, threadIdx.x);
}

// Aborts the kernel with an error that the next CUDA call of the host reports.
FASTSEQ_DEVICE void abort_kernel(const char* message) {
#ifdef FASTSEQ_HOST_DEVICE
  host::fail(message);
#else
  report(message);
  __trap();
#endif
}

// Units of 2^24 ns, 16.8 ms, of a clock that all multiprocessors share. The host-side device counts rounds of its
// scheduler.
FASTSEQ_DEVICE unsigned coarse_clock() {
#ifdef FASTSEQ_HOST_DEVICE
  return static_cast<unsigned>(host::world().passes >> 6);
#else
  uint64_t nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  return static_cast<unsigned>(nanoseconds >> 24);
#endif
}

// When a wait for another block ends in vain. Cooperative blocks should run at the same time; a driver that places them
// one by one leaves some out while another kernel, such as one of NCCL, holds their multiprocessors.
struct SpinLimit {
  unsigned units;  // of coarse_clock(), below 2^21; 0: wait for ever
  unsigned* stop;  // a word, 0 at first: not 0 once a wait of these blocks has ended in vain. Null: none
};

// Clock of one wait, in one register: the low 10 bits count polls, the others hold the time of the first look at the
// clock, which is taken every kPolls polls.
struct SpinTimeout {
#ifdef FASTSEQ_HOST_DEVICE
  static constexpr unsigned kPolls = 64;
#else
  static constexpr unsigned kPolls = 1024;
#endif
  unsigned state = 0;

  // Call once per poll. Returns true if the caller is to stop waiting.
  FASTSEQ_DEVICE bool expired(const SpinLimit& limit) {
    if (++state % kPolls) return false;
    state -= kPolls;
    if (limit.stop && load_acquire(limit.stop)) return true;
    const unsigned now = coarse_clock() << 10;
    if (state == 0) state = now | 1u << 10;
    if (limit.units == 0 || (now - state) >> 10 < limit.units || now - state >= 1u << 31) return false;
    if (limit.stop && exchange(limit.stop, 1)) return true;
    report("a block has waited longer than FASTSEQ_SPIN_TIMEOUT allows for others that have no multiprocessor");
    return true;
  }
};

// Waits until *flag reaches `goal`. The flag starts at 0 and only grows; the comparison is modulo 2^32. Returns false
// if the limit ends the wait.
FASTSEQ_DEVICE bool wait_for_flag(const unsigned* flag, unsigned goal, const SpinLimit& limit = {}) {
  SpinTimeout timeout;
  while (static_cast<int>(load_acquire(flag) - goal) < 0) {
    if (timeout.expired(limit)) return false;
  }
  return true;
}

// Barrier of all threads of `blocks` blocks of a cooperative grid. counter: 0 before the first round. round: 1, 2, ...
// Returns false, to thread 0 only, if the limit ends the wait.
FASTSEQ_DEVICE bool grid_barrier(unsigned* counter, unsigned round, unsigned blocks, const SpinLimit& limit = {}) {
  bool complete = true;
  __syncthreads();
  if (threadIdx.x == 0) {
    add_release(counter, 1);
    complete = wait_for_flag(counter, round * blocks, limit);
  }
  __syncthreads();
  return complete;
}

// Asynchronous 16-byte copies to shared memory, in groups. The host fallback copies as late as the wait.
FASTSEQ_DEVICE void copy_async16(void* shared, const void* global) {
#ifdef FASTSEQ_HOST_DEVICE
  host::copy_async(shared, global, 16);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}

FASTSEQ_DEVICE void commit_copies() {
#ifdef FASTSEQ_HOST_DEVICE
  host::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the last `Pending` committed groups of this thread are in flight.
template <int Pending>
FASTSEQ_DEVICE void wait_copies() {
#ifdef FASTSEQ_HOST_DEVICE
  host::wait_copies(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace fastseq::cuda

#include "cuda/common/cluster.cuh"  // thread block clusters
#include "cuda/common/mma.cuh"      // tensor cores
#include "cuda/common/words.cuh"    // words between blocks
