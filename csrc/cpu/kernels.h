// The kernels of every instruction set, behind one table of function pointers per storage type S.
#pragma once

#include <cstdint>

#include "attention.h"
#include "lstm.h"
#include "lstm_cell.h"
#include "storage.h"
#include "team.h"

namespace fastseq {

// Sizes are in units (`lanes`) or bytes; packed weights are opaque to everyone else.
template <class S>
struct Kernels {
  // Hidden units in one panel of gates, columns in one panel of columns, bytes of one operand, depths in one lane.
  int64_t gate_units, panel_columns, operand_bytes, pair;

  void (*cell_forward)(const CellForward<S>&, int64_t begin, int64_t end);  // rows of the batch
  void (*cell_backward)(const CellBackward<S>&, int64_t begin, int64_t end);
  void (*cell_step)(const CellStep<S>&, int64_t begin, int64_t end, const void** pointers, void* scratch);  // panels

  void (*pack_gates)(const S* weight, int64_t H, int64_t K, int64_t panel, void* packed);
  void (*pack_columns)(const S* weight, int64_t K, int64_t N, int64_t panel, void* packed);

  int64_t (*forward_shared_bytes)(const LstmForward<S>&);
  int64_t (*forward_member_bytes)(const LstmForward<S>&);
  void (*lstm_forward)(const LstmForward<S>&,
                       int64_t direction,
                       int64_t block,
                       Team& team,
                       int64_t members,
                       Team::Share share,
                       void* shared,   // scratch of the team
                       void* member);  // scratch of each member
  void (*lstm_backward)(const LstmBackward<S>&,
                        int64_t direction,
                        int64_t block,
                        Team& team,
                        int64_t members,
                        Team::Share share,
                        void* shared);  // (block rows, H) of Acc<S>
  int64_t (*weight_gradient_bytes)(const LstmBackward<S>&);
  void (*lstm_weight_gradients)(
      const LstmBackward<S>&, int64_t direction, const ValidRows&, int64_t begin, int64_t end, void* scratch);
  void (*lstm_input_gradients)(const LstmBackward<S>&, const ValidRows&, int64_t panel, int64_t begin, int64_t end);

  // As many multiply-adds as registers hold at once, `steps` times: what the peak is measured with. Returns the number
  // of floating-point operations.
  int64_t (*fma_chain)(int64_t steps);

  // Sentences [begin, end), with attention_scratch() bytes of memory. See attention.h.
  void (*attention_forward)(const AttentionForward<S>& p, int64_t begin, int64_t end, void* scratch);
  void (*attention_backward)(const AttentionBackward<S>& p, int64_t begin, int64_t end, void* scratch);
  void (*attention_prepare)(const AttentionPrepare<S>& p, int64_t begin, int64_t end, void* scratch);
};

// The table of machine_isa().
template <class S>
const Kernels<S>& kernels();

}  // namespace fastseq
