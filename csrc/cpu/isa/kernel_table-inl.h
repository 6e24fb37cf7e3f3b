// Collects the kernels of one instruction set into its table. Included by each isa/*.cpp of a set; see region.h.
#pragma once

#include "cpu/isa/kernel_table.h"
#include "cpu/isa/region.h"
#include "cpu/kernels/attention_backward-inl.h"
#include "cpu/kernels/attention_forward-inl.h"
#include "cpu/kernels/attention_tanh-inl.h"
#include "cpu/kernels/candidates-inl.h"
#include "cpu/kernels/cross_entropy-inl.h"
#include "cpu/kernels/decoder_backward-inl.h"
#include "cpu/kernels/decoder_forward-inl.h"
#include "cpu/kernels/decoder_greedy-inl.h"
#include "cpu/kernels/decoder_products-inl.h"
#include "cpu/kernels/dot-inl.h"
#include "cpu/kernels/dot_int8-inl.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/lstm_backward-inl.h"
#include "cpu/kernels/lstm_cell-inl.h"
#include "cpu/kernels/lstm_forward-inl.h"
#include "cpu/kernels/lstm_gradients-inl.h"
#include "cpu/kernels/lstm_variant_backward-inl.h"
#include "cpu/kernels/lstm_variant_forward-inl.h"
#include "cpu/kernels/pack-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// The kernels that depend on Operand<S>: packed weights and the products that read them.
template <class S>
void set_lstm_kernels(Kernels<S>& table) {
  table.gate_units = kLanes<S>;
  table.panel_columns = 4 * kLanes<S>;
  table.operand_bytes = sizeof(Operand<S>);
  table.pair = kPair<S>;
  table.int8_in_place = kIntegerDot;
  table.skinny_rows = kDotRows;
  table.cell_step_bytes = cell_step_bytes<S>;
  table.cell_step = cell_step<S>;
  table.linear_bytes = linear_bytes<S>;
  table.linear_rows = linear_rows<S>;
  table.pack_gates = [](const void* weight, WeightType type, const Acc<S>* scale, int64_t H, int64_t K, int64_t panel,
                        void* packed) {
    with_weight<S>(weight, type, [&](const auto* w) { pack_gates<S>(w, scale, H, K, panel, packed); });
  };
  table.pack_columns = pack_weight_columns<S>;
  table.pack_rows = pack_rows<S>;
  table.forward_shared_bytes = forward_shared_bytes<S>;
  table.forward_member_bytes = forward_member_bytes<S>;
  table.lstm_forward = lstm_forward<S>;
  table.lstm_backward = lstm_backward<S>;
  table.weight_gradient_bytes = weight_gradient_bytes<S>;
  table.lstm_weight_gradients = lstm_weight_gradients<S>;
  table.lstm_projection_gradients = lstm_projection_gradients<S>;
  table.lstm_input_gradients = lstm_input_gradients<S>;
  table.variant_forward_bytes = variant_forward_bytes<S>;
  table.lstm_variant_forward = lstm_variant_forward<S>;
  table.variant_backward_bytes = variant_backward_bytes<S>;
  table.lstm_variant_backward = lstm_variant_backward<S>;
  table.fma_chain = fma_chain<S>;
}

template <class S>
Kernels<S> make_kernels() {
  Kernels<S> table{};
  set_lstm_kernels(table);
  table.cell_forward = cell_forward<S>;
  table.cell_backward = cell_backward<S>;
  table.attention_forward = attention_forward<S>;
  table.attention_backward = attention_backward<S>;
  table.attention_prepare = attention_prepare<S>;
  table.cross_entropy = cross_entropy<S>;
  table.candidates = candidates<S>;
  if constexpr (sizeof(S) == sizeof(Acc<S>)) {
    table.decoder_pack = decoder_pack<S>;
    table.decoder_forward = decoder_forward<S>;
    table.decoder_greedy = decoder_greedy<S>;
    table.decoder_backward = decoder_backward<S>;
  }
  return table;
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
