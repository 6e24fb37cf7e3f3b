// One table of kernel function pointers per storage type S, filled for the instruction set in use.
#pragma once

#include <cstdint>

#include "cpu/kernels/attention_params.h"
#include "cpu/kernels/candidates_params.h"
#include "cpu/kernels/cross_entropy_params.h"
#include "cpu/kernels/decoder_params.h"
#include "cpu/kernels/lstm_cell_params.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/kernels/lstm_variant_params.h"
#include "cpu/runtime/sequences.h"
#include "cpu/runtime/storage.h"
#include "cpu/runtime/team.h"

namespace fastseq::cpu {

// Layouts of packed weights are private to the kernels; callers see their sizes only.
template <class S>
struct Kernels {
  int64_t gate_units;     // hidden units in one panel of gates
  int64_t panel_columns;  // columns in one panel of columns
  int64_t operand_bytes;  // bytes of one operand of a product
  int64_t pair;           // depths in one lane
  bool int8_in_place;     // rows of int8 weights are read in place for every batch
  int64_t skinny_rows;    // largest batch for which a step reads rows of W in place instead of packing them

  void (*cell_forward)(const LstmCellForwardParams<S>&, int64_t begin, int64_t end);    // rows of the batch
  void (*cell_backward)(const LstmCellBackwardParams<S>&, int64_t begin, int64_t end);  // rows of the batch
  int64_t (*cell_step_bytes)(const LstmStepParams<S>&);
  void (*cell_step)(const LstmStepParams<S>&, int64_t begin, int64_t end, void* scratch);  // panels of gates
  int64_t (*linear_bytes)(const LinearParams<S>&);
  void (*linear_rows)(const LinearParams<S>&, int64_t begin, int64_t end, void* scratch);  // vectors of outputs

  // weight: (4H, K) of `type`; scale: (4H,) or null.
  void (*pack_gates)(
      const void* weight, WeightType type, const Acc<S>* scale, int64_t H, int64_t K, int64_t panel, void* packed);
  void (*pack_columns)(const S* weight, int64_t K, int64_t N, int64_t panel, void* packed);  // weight: (K, N)
  void (*pack_rows)(const S* weight, int64_t N, int64_t K, int64_t panel, void* packed);     // weight: (N, K)

  int64_t (*forward_shared_bytes)(const LstmForwardParams<S>&);
  int64_t (*forward_member_bytes)(const LstmForwardParams<S>&);
  void (*lstm_forward)(const LstmForwardParams<S>&,
                       int64_t direction,
                       int64_t block,
                       ThreadTeam& team,
                       int64_t members,
                       ThreadTeam::Share share,
                       void* shared,   // forward_shared_bytes of the team
                       void* member);  // forward_member_bytes of this member
  void (*lstm_backward)(const LstmBackwardParams<S>&,
                        int64_t direction,
                        int64_t block,
                        ThreadTeam& team,
                        int64_t members,
                        ThreadTeam::Share share,
                        void* shared);  // (block rows, H) of Acc<S>
  int64_t (*weight_gradient_bytes)(const LstmBackwardParams<S>&);
  void (*lstm_weight_gradients)(
      const LstmBackwardParams<S>&, int64_t direction, const ValidRows&, int64_t begin, int64_t end, void* scratch);
  void (*lstm_projection_gradients)(
      const LstmBackwardParams<S>&, int64_t direction, const ValidRows&, int64_t begin, int64_t end, void* scratch);
  void (*lstm_input_gradients)(
      const LstmBackwardParams<S>&, const ValidRows&, int64_t panel, int64_t begin, int64_t end);

  // One block of sequences each.
  int64_t (*variant_forward_bytes)(const LstmVariantForwardParams<S>&);
  void (*lstm_variant_forward)(const LstmVariantForwardParams<S>&, int64_t block, void* scratch);
  int64_t (*variant_backward_bytes)(const LstmVariantBackwardParams<S>&);
  void (*lstm_variant_backward)(const LstmVariantBackwardParams<S>&, int64_t block, void* scratch);

  // Decoder, for S = float and double; null for other types.
  void (*decoder_pack)(const DecoderWeight<S>&, bool is_gates, int64_t panel, S* scratch, void* packed);
  void (*decoder_forward)(const DecoderForwardParams<S>&,
                          int64_t begin,  // sentences
                          int64_t end,
                          ThreadTeam& team,
                          int64_t members,
                          ThreadTeam::Share share,
                          void* scratch);  // attention_scratch_bytes of this member
  void (*decoder_greedy)(const DecoderGreedyParams<S>&,
                         ThreadTeam& team,
                         int64_t members,
                         ThreadTeam::Share share,
                         void* scratch);  // attention_scratch_bytes of this member
  void (*decoder_backward)(const DecoderBackwardParams<S>&,
                           int64_t begin,  // sentences
                           int64_t end,
                           ThreadTeam& team,
                           int64_t members,
                           ThreadTeam::Share share,
                           void* scratch);  // attention_scratch_bytes of this member

  // Measures the peak: `steps` rounds of as many multiply-adds as registers hold. Returns floating-point operations.
  int64_t (*fma_chain)(int64_t steps);

  // Sentences [begin, end), with attention_scratch_bytes() of scratch memory.
  void (*attention_forward)(const AttentionForwardParams<S>&, int64_t begin, int64_t end, void* scratch);
  void (*attention_backward)(const AttentionBackwardParams<S>&, int64_t begin, int64_t end, void* scratch);
  void (*attention_prepare)(const AttentionPrepareParams<S>&, int64_t begin, int64_t end, void* scratch);

  void (*cross_entropy)(const CrossEntropyParams<S>&, int64_t begin, int64_t end);  // tasks of kCrossEntropyRows rows
  void (*candidates)(const CandidatesParams<S>&, int64_t begin, int64_t end);       // sentences
};

// The table of machine_isa(), for S = float, double, BFloat16 and Half.
template <class S>
const Kernels<S>& kernels();

}  // namespace fastseq::cpu
