#include "cpu/runtime/sequence_tables.h"

#include <algorithm>
#include <numeric>

namespace fastseq::cpu {
namespace {

void read_padded(const char* op, SequenceTable& table, const Tensor& input, const OptionalTensor& lengths) {
  const int64_t T = input.size(0), B = table.seq.batch, steps = B > 0 ? T : 0;
  table.rows = {T, B};
  table.offset.reserve(steps);
  for (int64_t t = 0; t < steps; ++t) table.offset.push_back(t * B);
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

void read_packed(const char* op, SequenceTable& table, const Tensor& input, const Tensor& batch_sizes) {
  const int64_t N = input.size(0), B = table.seq.batch;
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
    const int64_t ended = t + 1 < T ? sizes[t + 1] : 0;
    for (int64_t b = ended < 0 ? 0 : ended; b < sizes[t]; ++b) table.lengths[b] = t + 1;
    if (total > N) break;
  }
  STD_TORCH_CHECK(total == N, op, ": batch_sizes must sum to the ", N, " rows of the packed input, got ",
                  total > N ? "more" : std::to_string(total));
}

}  // namespace

SequenceTable read_sequences(const char* op,
                             const Tensor& input,
                             const Tensor& c0,
                             const OptionalTensor& lengths,
                             const OptionalTensor& batch_sizes) {
  STD_TORCH_CHECK(!lengths || !batch_sizes, op, ": lengths and batch_sizes exclude each other, got both");
  check_rank(op, "c0", c0, 3, "(D, B, H)");
  check_rank(op, "input", input, batch_sizes ? 2 : 3, batch_sizes ? "(N, I)" : "(T, B, I)");
  check_memory(op, "c0", c0);
  check_memory(op, "input", input);
  SequenceTable table;
  Sequences& seq = table.seq;
  seq.batch = c0.size(1);
  seq.packed = batch_sizes.has_value();
  if (batch_sizes) {
    read_packed(op, table, input, *batch_sizes);
  } else {
    read_padded(op, table, input, lengths);
  }
  seq.steps = table.offset.size();
  seq.rows = seq.packed ? table.rows[0] : table.rows[0] * table.rows[1];
  table.order.resize(seq.batch);
  std::iota(table.order.begin(), table.order.end(), 0);
  std::stable_sort(table.order.begin(), table.order.end(),
                   [&](int64_t a, int64_t b) { return table.lengths[a] > table.lengths[b]; });
  table.valid_steps = std::accumulate(table.lengths.begin(), table.lengths.end(), int64_t{0});
  seq.offset = table.offset.data();
  seq.lengths = table.lengths.data();
  seq.order = table.order.data();
  return table;
}

ValidRowTable list_valid_rows(const Sequences& seq, const bool* reverse, int64_t directions) {
  ValidRowTable table;
  for (int64_t t = 0; t < seq.steps; ++t) {
    const int64_t end = t + 1 < seq.steps ? seq.offset[t + 1] : seq.rows;
    for (int64_t row = seq.offset[t]; row < end; ++row) {
      const int64_t b = row - seq.offset[t];
      if (t >= seq.lengths[b]) continue;
      table.position.push_back(row);
      for (int64_t d = 0; d < directions; ++d) {
        const int64_t before = reverse[d] ? t + 1 : t - 1;
        const bool inside = 0 <= before && before < seq.lengths[b];
        table.previous[d].push_back(inside ? seq.offset[before] + b : seq.rows + b);
      }
    }
  }
  return table;
}

}  // namespace fastseq::cpu
