// Reads lengths or batch_sizes, with all checks, into the tables that kernels walk along.
#pragma once

#include <optional>
#include <vector>

#include "../checks.h"
#include "lstm.h"

namespace fastseq {

using OptionalTensor = std::optional<Tensor>;

// Owns the memory that `seq` points into, so it can be moved but not copied.
struct SequenceTable {
  std::vector<int64_t> offset, lengths, order;
  Shape rows;  // leading sizes of per-step tensors: (T, B) or (N,)
  int64_t valid_steps = 0;
  Sequences seq{};

  SequenceTable() = default;
  SequenceTable(SequenceTable&&) = default;
  SequenceTable(const SequenceTable&) = delete;
};

// Checks the arguments and lays out the call; errors name `op`.
SequenceTable read_sequences(const char* op,
                             const Tensor& input,                 // (T, B, I), or (N, I) with batch_sizes
                             const Tensor& c0,                    // (D, B, H)
                             const OptionalTensor& lengths,       // (B,)
                             const OptionalTensor& batch_sizes);  // (T,)

// Where all valid steps lie and, per direction, the row of hidden_states (rows + B) that each started from.
struct ValidRowTable {
  std::vector<int64_t> position, previous[2];
  ValidRows rows() const {
    return {static_cast<int64_t>(position.size()), position.data(), {previous[0].data(), previous[1].data()}};
  }
};
ValidRowTable list_valid_rows(const Sequences& seq, const bool* reverse, int64_t directions);

}  // namespace fastseq
