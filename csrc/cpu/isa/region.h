// Opens and closes the part of a kernel file (*-inl.h) that is compiled for one instruction set.
//
// isa/avx2.cpp and the files of the other sets define the macros below and include kernel_table-inl.h. A set is one
// translation unit: `#pragma once` gives it one copy of every kernel, in the namespace fastseq::cpu::FASTSEQ_ISA.
//
//   FASTSEQ_ISA           name of the namespace
//   FASTSEQ_TARGET        features for the compiler, such as "avx2,fma"; undefined for the portable kernels
//   FASTSEQ_VECTOR_BYTES  16, 32 or 64
//   FASTSEQ_BF16_DOT      1 if bfloat16 products use the AVX-512 dot-product instruction
//
// Kernels are templates over vector types, so the whole body must be compiled for the instruction set. The compiler
// splits up the vectors of a function outside the region before it inlines the function into such a body.
//
// Every kernel file includes first and opens its region afterwards. An inline function of the standard library compiled
// inside a region could be the copy that the linker keeps, and would then run on machines without the instructions.
#pragma once

#include "cpu/isa/isa.h"

#if FASTSEQ_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FASTSEQ_ISA  // a kernel file compiled alone, as editors do
#define FASTSEQ_ISA baseline
#define FASTSEQ_VECTOR_BYTES 16
#define FASTSEQ_BF16_DOT 0
#endif

#define FASTSEQ_NOINLINE __attribute__((noinline))
#define FASTSEQ_LAMBDA_INLINE __attribute__((always_inline))

#define FASTSEQ_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define FASTSEQ_PUSH_TARGET(features) \
  FASTSEQ_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FASTSEQ_POP_TARGET FASTSEQ_PRAGMA(clang attribute pop)
#else
#define FASTSEQ_PUSH_TARGET(features) FASTSEQ_PRAGMA(GCC push_options) FASTSEQ_PRAGMA(GCC target(features))
#define FASTSEQ_POP_TARGET FASTSEQ_PRAGMA(GCC pop_options)
#endif

#ifdef FASTSEQ_TARGET
#define FASTSEQ_REGION_BEGIN FASTSEQ_PUSH_TARGET(FASTSEQ_TARGET)
#define FASTSEQ_REGION_END FASTSEQ_POP_TARGET
#else
#define FASTSEQ_REGION_BEGIN
#define FASTSEQ_REGION_END
#endif
