// CUDA names that kernels use directly, defined for the host-side device.
#pragma once

#include <cmath>
#include <cstdio>

#include "asynchronous.h"
#include "world.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define threadIdx (host::world().running->index)
#define blockIdx (host::world().running->block->index)
#define blockDim (host::world().block)
#define gridDim (host::world().grid)

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

HOST_RAW inline void __syncthreads() {
  host::Block* block = host::world().running->block;
  host::arrive_and_wait(block->barrier, block->live, "__syncthreads");
}

HOST_RAW inline void __syncwarp(unsigned mask = ~0u) {
  host::Warp* warp = host::world().running->warp;
  if (mask != ~0u) host::fail("__syncwarp: a mask without all lanes is not modelled");
  host::arrive_and_wait(warp->barrier, warp->live, "__syncwarp");
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int = 32) {
  return host::exchange(mask, value, "__shfl_sync")[from & 31];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int = 32) {
  const int lane = host::world().running->linear & 31;
  return host::exchange(mask, value, "__shfl_xor_sync")[(lane ^ with) & 31];
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int = 32) {
  const int lane = host::world().running->linear & 31;
  return host::exchange(mask, value, "__shfl_down_sync")[lane + by < 32 ? lane + by : lane];
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto seen = host::exchange(mask, predicate, "__ballot_sync");
  unsigned bits = 0;
  for (int lane = 0; lane < host::world().running->warp->size; ++lane) bits |= (seen[lane] ? 1u : 0u) << lane;
  return bits;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

using std::max;
using std::min;
