// One decoding step, both products and the cell: one block per hidden unit and Rows sequences. Bound by the bytes of
// the weights.
//
// A block reads the unit's four gate rows of W_ih and W_hh once: 16 bytes a lane, 512 bytes a warp, bypassing L1. Input
// and h go through L1, where the blocks of a multiprocessor share them. Warps take chunks of 32 N columns in turn,
// first of W_ih, then of W_hh, and add their sums through shared memory in a fixed order.
#pragma once

#include "cuda/common/cell_math.cuh"

namespace fastseq::cuda {

constexpr int kStepWarps = 4;

template <class T, class W>
struct StepPointers {
  int64_t batch, input_size, hidden, bias_stride;
  const T* input;      // (B, I)
  const T* h;          // (B, H)
  const T* c;          // (B, H)
  const W* weight_ih;  // (4H, I)
  const W* weight_hh;  // (4H, H)
  const T* bias_ih;    // (4H,) or (B, 4H), or null
  const T* bias_hh;    // (4H,) or null
  T* h_n;              // (B, H)
  T* c_n;              // (B, H)
};

// Loads N columns of a row that many blocks read. float inputs with bfloat16 weights take two loads.
template <int N, class T>
FASTSEQ_DEVICE void load_shared_row(Acc<T> (&out)[N], const T* p) {
  if constexpr (sizeof(T) * N <= 16)
    load_vector(out, p);
  else
    load_wide(out, p);
}

// sums[row][gate] += x (B, depth) . gate rows of `weight` (4H, depth), over N columns from `column` on.
template <int N, int Rows, class T, class W>
FASTSEQ_DEVICE void add_products(Acc<T> (&sums)[Rows * 4],
                                 const T* __restrict__ x,
                                 const W* __restrict__ weight,
                                 const int64_t (&rows)[Rows],
                                 int64_t depth,
                                 int64_t hidden,
                                 int64_t unit,
                                 int64_t column) {
  Acc<W> w[4][N];
#pragma unroll
  for (int q = 0; q < 4; ++q) load_vector_l2(w[q], weight + (q * hidden + unit) * depth + column);
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    Acc<T> v[N];
    load_shared_row(v, x + rows[r] * depth + column);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int k = 0; k < N; ++k) sums[r * 4 + q] += v[k] * w[q][k];
    }
  }
}

// Adds the biases to `gates`, the products of one row and unit, computes the cell and stores h and c.
template <class T, class W>
FASTSEQ_DEVICE void finish_step(const StepPointers<T, W>& p, int64_t row, int64_t unit, Acc<T> (&gates)[4]) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    if (p.bias_ih) gates[q] += to_float(p.bias_ih[row * p.bias_stride + q * p.hidden + unit]);
    if (p.bias_hh) gates[q] += to_float(p.bias_hh[q * p.hidden + unit]);
  }
  const int64_t at = row * p.hidden + unit;
  Acc<T> c = to_float(p.c[at]);
  if constexpr (std::is_same_v<T, double>)
    p.h_n[at] = lstm_cell_forward(gates[0], gates[1], gates[2], gates[3], c);
  else
    from_float(lstm_cell_for<T>(gates[0], gates[1], gates[2], gates[3], c), p.h_n + at);
  from_float(c, p.c_n + at);
}

// N divides input_size and hidden. The blocks of a unit are adjacent: all but the first read its weights from L2.
template <class T, class W, int N, int Rows>
__global__ void __launch_bounds__(kStepWarps * 32) lstm_step_kernel(StepPointers<T, W> p) {
  using A = Acc<T>;
  FASTSEQ_SHARED(A, partial, kStepWarps * Rows * 4);
  const unsigned tiles = static_cast<unsigned>((p.batch + Rows - 1) / Rows);
  const int64_t unit = blockIdx.x / tiles, first = static_cast<int64_t>(blockIdx.x % tiles) * Rows;
  const int warp = threadIdx.x / 32, lane = lane_id();
  int64_t rows[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) rows[r] = min(first + r, p.batch - 1);  // past the batch: the last row, not stored

  constexpr int64_t kChunk = 32 * N;
  const int64_t input_chunks = (p.input_size + kChunk - 1) / kChunk, chunks = (p.hidden + kChunk - 1) / kChunk;
  A sums[Rows * 4] = {};
  for (int64_t k = warp; k < input_chunks + chunks; k += kStepWarps) {
    const bool recurrent = k >= input_chunks;
    const int64_t depth = recurrent ? p.hidden : p.input_size;
    const int64_t column = (recurrent ? k - input_chunks : k) * kChunk + lane * N;
    if (column >= depth) continue;
    add_products<N, Rows>(sums, recurrent ? p.h : p.input, recurrent ? p.weight_hh : p.weight_ih, rows, depth, p.hidden,
                          unit, column);
  }

  constexpr int kSums = Rows * 4, kLanesOfSum = 32 / kSums;
  const A sum = warp_sums<kSums>(sums);
  if (lane % kLanesOfSum == 0) partial[warp * kSums + lane / kLanesOfSum] = sum;
  __syncthreads();
  if (threadIdx.x >= Rows || first + threadIdx.x >= p.batch) return;
  A gates[4] = {};
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    for (int from = 0; from < kStepWarps; ++from) gates[q] += partial[from * kSums + threadIdx.x * 4 + q];
  }
  finish_step(p, first + threadIdx.x, unit, gates);
}

}  // namespace fastseq::cuda
