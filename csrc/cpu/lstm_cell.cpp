#include "lstm_cell.h"

#include "isa.h"

namespace fastseq {
namespace {

template <class S>
FASTSEQ_INLINE void forward_rows(const CellForward<S>& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  const int64_t H = p.hidden;
  for (int64_t b = begin; b < end; ++b) {
    const S* __restrict gates = p.gates + b * 4 * H;
    const S* __restrict c = p.c + b * H;
    S* __restrict h = p.h + b * H;
    S* __restrict c_n = p.c_n + b * H;
    A* __restrict activations = p.activations + b * 4 * H;
#pragma omp simd
    for (int64_t j = 0; j < H; ++j) {
      A i = load(gates[j]), f = load(gates[H + j]), g = load(gates[2 * H + j]), o = load(gates[3 * H + j]);
      A cell = load(c[j]);
      store(lstm_cell_forward(i, f, g, o, cell), h + j);
      store(cell, c_n + j);
      activations[j] = i;
      activations[H + j] = f;
      activations[2 * H + j] = g;
      activations[3 * H + j] = o;
    }
  }
}

template <class S>
FASTSEQ_INLINE void backward_rows(const CellBackward<S>& p, int64_t begin, int64_t end) {
  using A = Acc<S>;
  const int64_t H = p.hidden;
  for (int64_t b = begin; b < end; ++b) {
    const A* __restrict gates = p.activations + b * 4 * H;
    const S* __restrict c = p.c + b * H;
    const S* __restrict c_n = p.c_n + b * H;
    const S* __restrict grad_h = p.grad_h ? p.grad_h + b * H : nullptr;
    const S* __restrict grad_c_n = p.grad_c_n ? p.grad_c_n + b * H : nullptr;
    S* __restrict grad_gates = p.grad_gates + b * 4 * H;
    S* __restrict grad_c = p.grad_c + b * H;
#pragma omp simd
    for (int64_t j = 0; j < H; ++j) {
      const A dh = grad_h ? load(grad_h[j]) : A(0);
      const A dc = grad_c_n ? load(grad_c_n[j]) : A(0);
      const CellGradient<A> d = lstm_cell_backward(gates[j], gates[H + j], gates[2 * H + j], gates[3 * H + j],
                                                   load(c[j]), load(c_n[j]), dh, dc);
      store(d.i, grad_gates + j);
      store(d.f, grad_gates + H + j);
      store(d.g, grad_gates + 2 * H + j);
      store(d.o, grad_gates + 3 * H + j);
      store(d.c, grad_c + j);
    }
  }
}

#if FASTSEQ_X86
template <class S>
FASTSEQ_TARGET_AVX2 void forward_avx2(const CellForward<S>& p, int64_t begin, int64_t end) {
  forward_rows(p, begin, end);
}
template <class S>
FASTSEQ_TARGET_AVX2 void backward_avx2(const CellBackward<S>& p, int64_t begin, int64_t end) {
  backward_rows(p, begin, end);
}
#endif

}  // namespace

template <class S>
void cell_forward(const CellForward<S>& p, int64_t begin, int64_t end) {
#if FASTSEQ_X86
  if (machine_isa() != Isa::kBaseline) return forward_avx2(p, begin, end);
#endif
  forward_rows(p, begin, end);
}

template <class S>
void cell_backward(const CellBackward<S>& p, int64_t begin, int64_t end) {
#if FASTSEQ_X86
  if (machine_isa() != Isa::kBaseline) return backward_avx2(p, begin, end);
#endif
  backward_rows(p, begin, end);
}

#define FASTSEQ_INSTANTIATE(S)                                            \
  template void cell_forward<S>(const CellForward<S>&, int64_t, int64_t); \
  template void cell_backward<S>(const CellBackward<S>&, int64_t, int64_t);
FASTSEQ_INSTANTIATE(float)
FASTSEQ_INSTANTIATE(double)
FASTSEQ_INSTANTIATE(BFloat16)
FASTSEQ_INSTANTIATE(Half)
#undef FASTSEQ_INSTANTIATE

}  // namespace fastseq
