// Opens and closes the part of a source file that one instruction set compiles.
//
// avx512.cpp and its siblings include the same kernel sources (*.inc) once each, inside a namespace of their own. The
// kernels are templates over vector types, so the whole body must be compiled for the instruction set: a function
// that is only inlined into such a one has had its vectors split up before. Everything from outside is included before
// the region opens: an inline function of the standard library compiled inside could be the copy that the linker keeps.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "isa.h"
#include "kernels.h"
#include "storage.h"

#if FASTSEQ_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTSEQ_NOINLINE __attribute__((noinline))
#define FASTSEQ_LAMBDA_INLINE __attribute__((always_inline))
#define FASTSEQ_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define FASTSEQ_REGION_BEGIN(isa) \
  FASTSEQ_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FASTSEQ_REGION_END FASTSEQ_PRAGMA(clang attribute pop)
#else
#define FASTSEQ_REGION_BEGIN(isa) FASTSEQ_PRAGMA(GCC push_options) FASTSEQ_PRAGMA(GCC target(isa))
#define FASTSEQ_REGION_END FASTSEQ_PRAGMA(GCC pop_options)
#endif
