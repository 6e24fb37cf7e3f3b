// Where the steps of every sequence of a call lie, read from lengths or batch_sizes, and how threads share them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../checks.h"
#include "lstm.h"

namespace fastseq {

using OptionalTensor = std::optional<Tensor>;

// Multiply-adds worth waking another thread for, about 10 microseconds of work.
constexpr int64_t kGrain = 1 << 17;

// Owns the memory that `seq` points into, so it can be moved but not copied.
struct SequenceTable {
  std::vector<int64_t> offset, lengths, order;
  Shape rows;  // leading sizes of gates and output: (T, B) or (N,)
  Sequences seq{};

  SequenceTable() = default;
  SequenceTable(SequenceTable&&) = default;
  SequenceTable(const SequenceTable&) = delete;
};

// Checks the arguments and lays out the call; errors name `op` and, for per_step, `name`.
SequenceTable read_sequences(const char* op,
                             const char* name,
                             const Tensor& per_step,             // (T, B, columns), or (N, columns) with batch_sizes
                             const Tensor& c0,                   // (B, H)
                             const OptionalTensor& lengths,      // (B,)
                             const OptionalTensor& batch_sizes,  // (T,)
                             bool reverse);

}  // namespace fastseq
