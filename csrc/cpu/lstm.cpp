#include "lstm.h"

#include "isa.h"
#include "matmul.h"

namespace fastseq {
namespace {

template <class T>
FASTSEQ_INLINE void fill_zero(T* out, int64_t count) {
  std::memset(static_cast<void*>(out), 0, count * sizeof(T));  // all bits zero is 0 in every storage type
}

template <class S>
FASTSEQ_INLINE void load_row(const S* in, int64_t count, Acc<S>* out) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) out[j] = load(in[j]);
}

template <class S>
FASTSEQ_INLINE void load_row_or_zero(const S* in, int64_t count, Acc<S>* out) {
  if (in) {
    load_row(in, count, out);
  } else {
    fill_zero(out, count);
  }
}

template <class S>
FASTSEQ_INLINE void add_row(const S* in, int64_t count, Acc<S>* out) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) out[j] += load(in[j]);
}

template <class S>
FASTSEQ_INLINE void store_row(const Acc<S>* in, int64_t count, S* out) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) store(in[j], out + j);
}

// The sequences of one block, longest first, so that those still running are a prefix.
struct Block {
  const Sequences& seq;
  int64_t block;
  int64_t rows;

  FASTSEQ_INLINE Block(const Sequences& sequences, int64_t index)
      : seq(sequences), block(index), rows((sequences.batch - index + sequences.blocks - 1) / sequences.blocks) {}

  FASTSEQ_INLINE int64_t sequence(int64_t row) const { return seq.order[block + row * seq.blocks]; }
  FASTSEQ_INLINE int64_t length(int64_t row) const { return seq.lengths[sequence(row)]; }

  // How many rows, of the first `candidates`, have more than `step` steps: a prefix.
  FASTSEQ_INLINE int64_t running(int64_t step, int64_t candidates) const {
    while (candidates > 0 && length(candidates - 1) <= step) --candidates;
    return candidates;
  }

  // Row of gates and output that holds the step-th processed step of a sequence.
  FASTSEQ_INLINE int64_t position(int64_t row, int64_t step) const {
    const int64_t t = seq.reverse ? length(row) - 1 - step : step;
    return seq.offset[t] + sequence(row);
  }

  // Zeros in the rows past the end of every sequence.
  template <class T>
  FASTSEQ_INLINE void clear_padding(T* out, int64_t columns) const {
    if (seq.packed || !out) return;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t t = length(r); t < seq.steps; ++t) fill_zero(out + (seq.offset[t] + sequence(r)) * columns, columns);
    }
  }
};

// One row, one step: gates (4H) become activations, c (H) the new cell state; h to output and, rounded as there, to h.
template <class S>
FASTSEQ_INLINE void forward_row(
    int64_t H, Acc<S>* __restrict gates, Acc<S>* __restrict c, Acc<S>* __restrict h, S* __restrict output) {
#pragma omp simd
  for (int64_t j = 0; j < H; ++j) {
    store(lstm_cell_forward(gates[j], gates[H + j], gates[2 * H + j], gates[3 * H + j], c[j]), output + j);
    h[j] = load(output[j]);
  }
}

template <class S, int BYTES>
FASTSEQ_INLINE void forward_block(const LstmForward<S>& p, int64_t index) {
  using A = Acc<S>;
  const Block block(p.seq, index);
  const int64_t H = p.seq.hidden, stride = padded<A>(4 * H);
  A* const gates = p.scratch + index * forward_scratch<S>(p.seq);  // (rows, stride)
  A* const h = gates + block.rows * stride;                        // (rows, H)
  A* const c = h + block.rows * H;                                 // (rows, H)

  for (int64_t r = 0; r < block.rows; ++r) {
    load_row(p.h0 + block.sequence(r) * H, H, h + r * H);
    load_row(p.c0 + block.sequence(r) * H, H, c + r * H);
  }
  int64_t rows = block.rows;
  for (int64_t step = 0; (rows = block.running(step, rows)) > 0; ++step) {
    for (int64_t r = 0; r < rows; ++r) load_row(p.gates + block.position(r, step) * 4 * H, 4 * H, gates + r * stride);
    matmul_add<A, BYTES>(rows, H, 4 * H, h, H, p.weight, gates, stride);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = block.position(r, step);
      forward_row<S>(H, gates + r * stride, c + r * H, h + r * H, p.output + row * H);
      if (p.activations) std::memcpy(p.activations + row * 4 * H, gates + r * stride, 4 * H * sizeof(A));
      if (p.cell_states) std::memcpy(p.cell_states + row * H, c + r * H, H * sizeof(A));
    }
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    store_row<S>(h + r * H, H, p.h_n + block.sequence(r) * H);
    store_row<S>(c + r * H, H, p.c_n + block.sequence(r) * H);
  }
  block.clear_padding(p.output, H);
  block.clear_padding(p.activations, 4 * H);
  block.clear_padding(p.cell_states, H);
}

// One row, one step. dh, dc: gradients of h and c after the step; dc becomes the gradient of c before it.
template <class S>
FASTSEQ_INLINE void backward_row(int64_t H,
                                 const Acc<S>* __restrict gates,  // (4H,) activations
                                 const Acc<S>* __restrict c_prev,
                                 const Acc<S>* __restrict c,
                                 const Acc<S>* __restrict dh,
                                 Acc<S>* __restrict dc,
                                 Acc<S>* __restrict dgates) {  // (4H,)
#pragma omp simd
  for (int64_t j = 0; j < H; ++j) {
    const CellGradient<Acc<S>> d =
        lstm_cell_backward(gates[j], gates[H + j], gates[2 * H + j], gates[3 * H + j], c_prev[j], c[j], dh[j], dc[j]);
    dgates[j] = d.i;
    dgates[H + j] = d.f;
    dgates[2 * H + j] = d.g;
    dgates[3 * H + j] = d.o;
    dc[j] = d.c;
  }
}

template <class S, int BYTES>
FASTSEQ_INLINE void backward_block(const LstmBackward<S>& p, int64_t index) {
  using A = Acc<S>;
  const Block block(p.seq, index);
  const int64_t H = p.seq.hidden, stride = padded<A>(H);
  A* const dgates = p.scratch + index * backward_scratch<S>(p.seq);  // (rows, 4H)
  A* const dh = dgates + block.rows * 4 * H;                         // (rows, stride)
  A* const dc = dh + block.rows * stride;                            // (rows, H)
  A* const c_first = dc + block.rows * H;                            // (H,) initial cell state of one sequence

  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t b = block.sequence(r);
    load_row_or_zero(p.grad_h_n ? p.grad_h_n + b * H : nullptr, H, dh + r * stride);
    load_row_or_zero(p.grad_c_n ? p.grad_c_n + b * H : nullptr, H, dc + r * H);
  }
  for (int64_t step = block.length(0) - 1; step >= 0; --step) {
    const int64_t rows = block.running(step, block.rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = block.position(r, step);
      if (p.grad_output) add_row(p.grad_output + row * H, H, dh + r * stride);
      if (p.grad_cell_states) add_row(p.grad_cell_states + row * H, H, dc + r * H);
      if (step == 0) load_row(p.c0 + block.sequence(r) * H, H, c_first);
      const A* c_prev = step == 0 ? c_first : p.cell_states + block.position(r, step - 1) * H;
      backward_row<S>(H, p.activations + row * 4 * H, c_prev, p.cell_states + row * H, dh + r * stride, dc + r * H,
                      dgates + r * 4 * H);
      store_row<S>(dgates + r * 4 * H, 4 * H, p.grad_gates + row * 4 * H);
      fill_zero(dh + r * stride, stride);
    }
    matmul_add<A, BYTES>(rows, 4 * H, H, dgates, 4 * H, p.weight, dh, stride);
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    store_row<S>(dh + r * stride, H, p.grad_h0 + block.sequence(r) * H);
    store_row<S>(dc + r * H, H, p.grad_c0 + block.sequence(r) * H);
  }
  block.clear_padding(p.grad_gates, 4 * H);
}

#if FASTSEQ_X86
template <class S>
FASTSEQ_TARGET_AVX2 void forward_avx2(const LstmForward<S>& p, int64_t block) {
  forward_block<S, 32>(p, block);
}
template <class S>
FASTSEQ_TARGET_AVX2 void backward_avx2(const LstmBackward<S>& p, int64_t block) {
  backward_block<S, 32>(p, block);
}
template <class S>
FASTSEQ_TARGET_AVX512 void forward_avx512(const LstmForward<S>& p, int64_t block) {
  forward_block<S, 64>(p, block);
}
template <class S>
FASTSEQ_TARGET_AVX512 void backward_avx512(const LstmBackward<S>& p, int64_t block) {
  backward_block<S, 64>(p, block);
}
#endif

}  // namespace

template <class S>
void lstm_forward_block(const LstmForward<S>& p, int64_t block) {
#if FASTSEQ_X86
  if (machine_isa() >= Isa::kAvx512) return forward_avx512(p, block);
  if (machine_isa() == Isa::kAvx2) return forward_avx2(p, block);
#endif
  forward_block<S, 16>(p, block);
}

template <class S>
void lstm_backward_block(const LstmBackward<S>& p, int64_t block) {
#if FASTSEQ_X86
  if (machine_isa() >= Isa::kAvx512) return backward_avx512(p, block);
  if (machine_isa() == Isa::kAvx2) return backward_avx2(p, block);
#endif
  backward_block<S, 16>(p, block);
}

#define FASTSEQ_INSTANTIATE(S)                                         \
  template void lstm_forward_block<S>(const LstmForward<S>&, int64_t); \
  template void lstm_backward_block<S>(const LstmBackward<S>&, int64_t);
FASTSEQ_INSTANTIATE(float)
FASTSEQ_INSTANTIATE(double)
FASTSEQ_INSTANTIATE(BFloat16)
FASTSEQ_INSTANTIATE(Half)
#undef FASTSEQ_INSTANTIATE

}  // namespace fastseq
