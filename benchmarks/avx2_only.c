// Hides AVX-512, AMX and AVX-VNNI from the libraries of a process, for those that have no variable of their own
// (onnxruntime, OpenVINO): CPUID traps, and a signal handler answers it without their bits. Linux, an Intel processor
// with cpuid_fault in /proc/cpuinfo.
//
//   gcc -O2 -shared -fPIC -o avx2_only.so benchmarks/avx2_only.c
//   LD_PRELOAD=$PWD/avx2_only.so fastseq bench --suite alternatives
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

// arch_prctl, not through errno: the handler may interrupt any code.
static long allow_cpuid(long allowed) {
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "0"(SYS_arch_prctl), "D"(ARCH_SET_CPUID), "S"(allowed) : "rcx", "r11", "memory");
  return result;
}

static void mask(uint32_t leaf, uint32_t subleaf, uint32_t* r) {  // r: eax, ebx, ecx, edx
  if (leaf != 7) return;
  if (subleaf == 0) {
    r[1] &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);  // AVX512F .. VL
    r[2] &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);  // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    r[3] &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);  // ..., AMX, AVX512_FP16
  } else if (subleaf == 1) {
    r[0] &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23);  // AVX_VNNI, AVX512_BF16, AMX_FP16, AVX_IFMA
    r[3] &= ~(1u << 4 | 1u << 5 | 1u << 10 | 1u << 19);  // AVX_VNNI_INT8, AVX_NE_CONVERT, AVX_VNNI_INT16, AVX10
  }
}

static void on_fault(int signal, siginfo_t* info, void* context) {
  (void)info;
  greg_t* const g = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* const code = (const uint8_t*)g[REG_RIP];
  if (code[0] != 0x0f || code[1] != 0xa2) {  // another fault: die of it
    struct sigaction plain;
    memset(&plain, 0, sizeof plain);
    plain.sa_handler = SIG_DFL;
    sigaction(signal, &plain, NULL);
    return;
  }
  const uint32_t leaf = (uint32_t)g[REG_RAX], subleaf = (uint32_t)g[REG_RCX];
  uint32_t r[4];
  allow_cpuid(1);
  __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
  allow_cpuid(0);
  mask(leaf, subleaf, r);
  g[REG_RAX] = r[0], g[REG_RBX] = r[1], g[REG_RCX] = r[2], g[REG_RDX] = r[3];
  g[REG_RIP] += 2;
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, NULL);
  if (allow_cpuid(0) != 0) {
    fputs("avx2_only: this processor or kernel cannot trap CPUID (no cpuid_fault in /proc/cpuinfo)\n", stderr);
    exit(1);
  }
}
