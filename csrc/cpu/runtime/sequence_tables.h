// Checks lengths or batch_sizes and turns them into the row tables that kernels iterate over.
#pragma once

#include <vector>

#include "checks.h"
#include "cpu/runtime/sequences.h"

namespace fastseq::cpu {

// Owns the arrays that `seq` points to, so it can be moved but not copied.
struct SequenceTable {
  std::vector<int64_t> offset, lengths, order;
  Shape rows;  // leading sizes of per-step tensors: (T, B) or (N,)
  int64_t valid_steps = 0;
  Sequences seq{};

  SequenceTable() = default;
  SequenceTable(SequenceTable&&) = default;
  SequenceTable(const SequenceTable&) = delete;
};

// Checks the arguments and builds the table of one call. Errors name `op`.
SequenceTable read_sequences(const char* op,
                             const Tensor& input,                 // (T, B, I), or (N, I) with batch_sizes
                             const Tensor& c0,                    // (D, B, H)
                             const OptionalTensor& lengths,       // (B,)
                             const OptionalTensor& batch_sizes);  // (T,)

// Owns the arrays of ValidRows. previous: rows of hidden_states (rows + B, H), where rows + b holds h0 of sequence b.
struct ValidRowTable {
  std::vector<int64_t> position, previous[2];
  ValidRows rows() const {
    return {static_cast<int64_t>(position.size()), position.data(), {previous[0].data(), previous[1].data()}};
  }
};
ValidRowTable list_valid_rows(const Sequences& seq, const bool* reverse, int64_t directions);

}  // namespace fastseq::cpu
