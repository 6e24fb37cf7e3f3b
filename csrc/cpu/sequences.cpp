#include "sequences.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>

namespace fastseq {
namespace {

void read_padded(const char* op, SequenceTable& table, const Tensor& per_step, const OptionalTensor& lengths) {
  const int64_t T = per_step.size(0), B = table.seq.batch;
  table.rows = {T, B};
  for (int64_t t = 0; t < T; ++t) table.offset.push_back(t * B);
  table.lengths.assign(B, T);
  if (!lengths) return;
  check_cpu(op, "lengths", *lengths, {B}, ScalarType::Long);
  const int64_t* values = static_cast<const int64_t*>(lengths->const_data_ptr());
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = values[b];
    STD_TORCH_CHECK(0 <= length && length <= T, op, ": lengths must lie in 0 .. ", T, ", got lengths[", b,
                    "] = ", length);
    table.lengths[b] = length;
  }
}

void read_packed(const char* op, SequenceTable& table, const Tensor& per_step, const Tensor& batch_sizes) {
  const int64_t N = per_step.size(0), B = table.seq.batch;
  check_rank(op, "batch_sizes", batch_sizes, 1, "(T,)");
  const int64_t T = batch_sizes.size(0);
  check_cpu(op, "batch_sizes", batch_sizes, {T}, ScalarType::Long);
  table.rows = {N};
  table.lengths.assign(B, 0);
  const int64_t* sizes = static_cast<const int64_t*>(batch_sizes.const_data_ptr());
  STD_TORCH_CHECK(T == 0 || sizes[0] == B, op, ": batch_sizes[0] must be the batch size of h0 and c0, ", B, ", got ",
                  sizes[0]);
  int64_t total = 0;
  for (int64_t t = 0; t < T; ++t) {
    STD_TORCH_CHECK(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]), op,
                    ": batch_sizes must be positive and never increase, got batch_sizes[", t, "] = ", sizes[t]);
    table.offset.push_back(total);
    total += sizes[t];
    for (int64_t b = 0; b < sizes[t]; ++b) table.lengths[b] = t + 1;
  }
  STD_TORCH_CHECK(total == N, op, ": batch_sizes must sum to the ", N, " rows of the packed input, got ", total);
}

// As many blocks as threads, or a multiple: block k takes every blocks-th sequence, so all get long and short ones.
void share_among_threads(SequenceTable& table) {
  constexpr int64_t kRowsPerBlock = 32;  // their states stay in the L1 or L2 cache
  Sequences& seq = table.seq;
  const int64_t valid_steps = std::accumulate(table.lengths.begin(), table.lengths.end(), int64_t{0});
  const int64_t work = valid_steps * 4 * seq.hidden * seq.hidden;
  const int64_t threads = std::clamp<int64_t>(work / kGrain, 1, torch::stable::get_num_threads());
  const int64_t rows_per_thread = (seq.batch + threads - 1) / threads;
  const int64_t blocks = threads * ((rows_per_thread + kRowsPerBlock - 1) / kRowsPerBlock);
  seq.blocks = std::min(blocks, seq.batch);
  seq.block_rows = seq.blocks == 0 ? 0 : (seq.batch + seq.blocks - 1) / seq.blocks;
}

}  // namespace

SequenceTable read_sequences(const char* op,
                             const char* name,
                             const Tensor& per_step,
                             const Tensor& c0,
                             const OptionalTensor& lengths,
                             const OptionalTensor& batch_sizes,
                             bool reverse) {
  STD_TORCH_CHECK(!lengths || !batch_sizes, op, ": lengths and batch_sizes exclude each other, got both");
  check_rank(op, "c0", c0, 2, "(B, H)");
  check_rank(op, name, per_step, batch_sizes ? 2 : 3, batch_sizes ? "(N, columns)" : "(T, B, columns)");
  SequenceTable table;
  Sequences& seq = table.seq;
  seq.batch = c0.size(0);
  seq.hidden = c0.size(1);
  seq.packed = batch_sizes.has_value();
  seq.reverse = reverse;
  if (batch_sizes) {
    read_packed(op, table, per_step, *batch_sizes);
  } else {
    read_padded(op, table, per_step, lengths);
  }
  seq.steps = table.offset.size();
  table.order.resize(seq.batch);
  std::iota(table.order.begin(), table.order.end(), 0);
  std::stable_sort(table.order.begin(), table.order.end(),
                   [&](int64_t a, int64_t b) { return table.lengths[a] > table.lengths[b]; });
  seq.offset = table.offset.data();
  seq.lengths = table.lengths.data();
  seq.order = table.order.data();
  share_among_threads(table);
  return table;
}

}  // namespace fastseq
