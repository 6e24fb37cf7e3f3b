// The operators lstm_variant_forward and lstm_variant_backward on the CPU: checks, outputs, packing, threads. The
// arithmetic is in lstm_variant_forward-inl.h and lstm_variant_backward-inl.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/isa/kernel_table.h"
#include "cpu/kernels/lstm_variant_params.h"
#include "cpu/ops/arguments.h"
#include "cpu/ops/lstm_layer.h"
#include "cpu/runtime/pool.h"
#include "cpu/runtime/sequence_tables.h"

namespace fastseq::cpu {
namespace {

// The arguments that both operators share. Refers to tensors of the call.
struct VariantArguments {
  const char* op;
  const Tensor &c0, &weight_hh;                          // (1, B, H), (4H, H)
  const OptionalTensor &norm_hh, &norm_c, &norm_c_bias;  // (4H,), (H,), (H,)
  const OptionalTensor &hidden_mask, &keep_h, &keep_c;   // (B, H), (T, B, H) each
  double rate_h, rate_c;
  bool reverse;

  int64_t batch() const { return c0.size(1); }
  int64_t hidden() const { return c0.size(2); }
  ScalarType dtype() const { return c0.scalar_type(); }
};

void check_variant(const VariantArguments& v, const SequenceTable& table) {
  const int64_t B = v.batch(), H = v.hidden();
  const ScalarType dtype = v.dtype();
  STD_TORCH_CHECK(v.c0.size(0) == 1, v.op, ": c0 must have the shape (1, B, H), got ", to_string(v.c0.sizes()));
  check_extent(v.op, "gates", Shape{table.seq.rows, 4 * H});
  check_extent(v.op, "weight_hh", Shape{4 * H, H});
  check_cpu(v.op, "c0", v.c0, {1, B, H}, dtype);
  check_cpu(v.op, "weight_hh", v.weight_hh, {4 * H, H}, dtype);
  check_optional(v.op, "norm_hh", v.norm_hh, {4 * H}, dtype);
  check_optional(v.op, "norm_c", v.norm_c, {H}, dtype);
  check_optional(v.op, "norm_c_bias", v.norm_c_bias, {H}, dtype);
  const int norms = v.norm_hh.has_value() + v.norm_c.has_value() + v.norm_c_bias.has_value();
  STD_TORCH_CHECK(norms == 0 || norms == 3, v.op, ": give norm_hh, norm_c and norm_c_bias, or none; got ", norms);
  check_optional(v.op, "hidden_mask", v.hidden_mask, {B, H}, accumulate_type(dtype));
  check_optional(v.op, "keep_h", v.keep_h, with_columns(table.rows, H), ScalarType::Bool);
  check_optional(v.op, "keep_c", v.keep_c, with_columns(table.rows, H), ScalarType::Bool);
}

// Fills the fields that both passes share. Divides the batch among threads: each runs blocks of sequences alone.
template <class S>
void read_variant(const VariantArguments& v, const SequenceTable& table, LstmVariantParams<S>& p) {
  const int64_t B = v.batch(), H = v.hidden();
  const int64_t threads =
      std::clamp<int64_t>(table.valid_steps * 4 * H * H / kGrain, 1, torch::stable::get_num_threads());
  p.seq = table.seq;
  p.hidden = H;
  p.blocks = std::max<int64_t>(1, std::min(B, threads * divide_up(divide_up(B, threads), kBlockRows)));
  p.reverse = v.reverse;
  p.c0 = read<S>(v.c0);
  p.norm_hh = read<S>(v.norm_hh);
  p.norm_c = read<S>(v.norm_c);
  p.norm_c_bias = read<S>(v.norm_c_bias);
  p.hidden_mask = read<Acc<S>>(v.hidden_mask);
  p.zoneout_h = {read<uint8_t>(v.keep_h), static_cast<Acc<S>>(v.rate_h)};
  p.zoneout_c = {read<uint8_t>(v.keep_c), static_cast<Acc<S>>(v.rate_c)};
}

// Calls run(block, scratch) for all blocks, with `bytes` of scratch memory each.
template <class Run>
void run_blocks(int64_t blocks, int64_t bytes, const Run& run) {
  const int64_t aligned = divide_up(bytes, 64) * 64;
  const PooledScratch scratch(blocks * aligned);
  run_tasks(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i, scratch.at(i * aligned));
  });
}

template <class S>
void forward(const VariantArguments& v, const SequenceTable& table, LstmVariantForwardParams<S>& p) {
  const Kernels<S>& k = kernels<S>();
  const int64_t H = p.hidden, panels = divide_up(H, k.gate_units);
  const bool in_place = table.valid_steps < std::max<int64_t>(32, 4 * k.gate_units) || v.batch() <= k.skinny_rows;
  const PooledScratch packed(in_place ? 0 : packed_bytes<S>(panels, 4 * k.gate_units, H));
  p.hh = {{v.weight_hh.const_data_ptr(), WeightType::kStorage, nullptr}, in_place ? nullptr : packed.at(0)};
  pack_all(in_place ? 0 : 1, panels, 4 * k.gate_units * H, [&](int64_t, int64_t panel) {
    k.pack_gates(p.hh.rows, p.hh.type, nullptr, H, H, panel, const_cast<void*>(p.hh.packed));
  });
  run_blocks(p.blocks, k.variant_forward_bytes(p),
             [&](int64_t block, void* scratch) { k.lstm_variant_forward(p, block, scratch); });
}

template <class S>
void backward(const VariantArguments& v, LstmVariantBackwardParams<S>& p, const Tensor& grad_norms) {
  const Kernels<S>& k = kernels<S>();
  const int64_t H = p.hidden, panels = divide_up(H, k.panel_columns);
  const PooledScratch packed(packed_bytes<S>(panels, k.panel_columns, 4 * H));
  pack_all(1, panels, k.panel_columns * 4 * H,
           [&](int64_t, int64_t panel) { k.pack_columns(read<S>(v.weight_hh), 4 * H, H, panel, packed.at(0)); });
  p.packed_hh = packed.at(0);
  const int64_t sums = p.norm_hh ? 6 * H : 0;
  const PooledScratch partial(p.blocks * sums * sizeof(Acc<S>));
  p.grad_norms = sums ? partial.at<Acc<S>>(0) : nullptr;
  if (sums) fill_zero(p.grad_norms, p.blocks * sums);
  run_blocks(p.blocks, k.variant_backward_bytes(p),
             [&](int64_t block, void* scratch) { k.lstm_variant_backward(p, block, scratch); });
  Acc<S>* const total = write<Acc<S>>(grad_norms);
  for (int64_t j = 0; j < sums; ++j) {
    total[j] = 0;
    for (int64_t block = 0; block < p.blocks; ++block) total[j] += p.grad_norms[block * sums + j];
  }
}

using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResults lstm_variant_forward_cpu(Tensor gates,
                                        Tensor h0,
                                        Tensor c0,
                                        Tensor weight_hh,
                                        OptionalTensor norm_hh,
                                        OptionalTensor norm_c,
                                        OptionalTensor norm_c_bias,
                                        OptionalTensor hidden_mask,
                                        OptionalTensor keep_h,
                                        OptionalTensor keep_c,
                                        double rate_h,
                                        double rate_c,
                                        OptionalTensor lengths,
                                        bool reverse,
                                        bool need_backward,
                                        bool need_cell_states) {
  const char* op = "lstm_variant_forward";
  check_memory(op, "gates", gates);
  const SequenceTable table = read_sequences(op, gates, c0, lengths, std::nullopt);
  const VariantArguments v{op,          c0,     weight_hh, norm_hh, norm_c, norm_c_bias,
                           hidden_mask, keep_h, keep_c,    rate_h,  rate_c, reverse};
  check_variant(v, table);
  const int64_t B = v.batch(), H = v.hidden();
  const ScalarType dtype = v.dtype(), acc = accumulate_type(dtype);
  check_cpu(op, "gates", gates, with_columns(table.rows, 4 * H), dtype);
  check_cpu(op, "h0", h0, {1, B, H}, dtype);
  const bool need_norms = need_backward && norm_hh;
  const auto saved = [&](bool need, int64_t columns, ScalarType type) {
    return pooled_empty(need ? with_columns(table.rows, columns) : Shape{0}, type);
  };
  Tensor output = result_empty(with_columns(table.rows, H), dtype);
  Tensor h_n = result_empty({1, B, H}, dtype), c_n = result_empty({1, B, H}, dtype);
  Tensor cell_states = saved(need_backward || need_cell_states, H, acc);
  Tensor activations = saved(need_backward, 4 * H, dtype), operands = saved(need_backward, H, dtype);
  Tensor normal = saved(need_norms, 4 * H, dtype), statistics = saved(need_norms, kStatistics, acc);
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    LstmVariantForwardParams<S> p{};
    read_variant<S>(v, table, p);
    p.gates = read<S>(gates);
    p.h0 = read<S>(h0);
    p.output = write<S>(output);
    p.h_n = write<S>(h_n);
    p.c_n = write<S>(c_n);
    p.cell_states = write<Acc<S>>(cell_states);
    p.activations = write<S>(activations);
    p.operands = write<S>(operands);
    p.normal = write<S>(normal);
    p.statistics = write<Acc<S>>(statistics);
    forward(v, table, p);
  });
  return {output, h_n, c_n, cell_states, activations, operands, normal, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_variant_backward_cpu(OptionalTensor grad_output,
                                                                             OptionalTensor grad_h_n,
                                                                             OptionalTensor grad_c_n,
                                                                             OptionalTensor grad_cell_states,
                                                                             Tensor c0,
                                                                             Tensor weight_hh,
                                                                             OptionalTensor norm_hh,
                                                                             OptionalTensor norm_c,
                                                                             OptionalTensor norm_c_bias,
                                                                             OptionalTensor hidden_mask,
                                                                             OptionalTensor keep_h,
                                                                             OptionalTensor keep_c,
                                                                             double rate_h,
                                                                             double rate_c,
                                                                             OptionalTensor lengths,
                                                                             bool reverse,
                                                                             Tensor cell_states,
                                                                             Tensor activations,
                                                                             OptionalTensor normal,
                                                                             OptionalTensor statistics) {
  const char* op = "lstm_variant_backward";
  check_memory(op, "activations", activations);
  const SequenceTable table = read_sequences(op, activations, c0, lengths, std::nullopt);
  const VariantArguments v{op,          c0,     weight_hh, norm_hh, norm_c, norm_c_bias,
                           hidden_mask, keep_h, keep_c,    rate_h,  rate_c, reverse};
  check_variant(v, table);
  const int64_t B = v.batch(), H = v.hidden();
  const ScalarType dtype = v.dtype(), acc = accumulate_type(dtype);
  const Shape state{1, B, H}, per_step = with_columns(table.rows, H), gates = with_columns(table.rows, 4 * H);
  check_optional(op, "grad_output", grad_output, per_step, dtype);
  check_optional(op, "grad_cell_states", grad_cell_states, per_step, dtype);
  check_optional(op, "grad_h_n", grad_h_n, state, dtype);
  check_optional(op, "grad_c_n", grad_c_n, state, dtype);
  check_cpu(op, "cell_states", cell_states, per_step, acc);
  check_cpu(op, "activations", activations, gates, dtype);
  check_optional(op, "normal", normal, gates, dtype);
  check_optional(op, "statistics", statistics, with_columns(table.rows, kStatistics), acc);
  STD_TORCH_CHECK(normal.has_value() == norm_hh.has_value() && statistics.has_value() == norm_hh.has_value(), op,
                  ": give normal and statistics with the norms, and only then");
  Tensor grad_gates = result_empty(gates, dtype), grad_products = result_empty(norm_hh ? gates : Shape{0}, dtype);
  Tensor grad_h0 = result_empty(state, dtype), grad_c0 = result_empty(state, dtype);
  Tensor grad_norms = result_empty(norm_hh ? Shape{6 * H} : Shape{0}, acc);
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    LstmVariantBackwardParams<S> p{};
    read_variant<S>(v, table, p);
    p.grad_output = read<S>(grad_output);
    p.grad_cell_states = read<S>(grad_cell_states);
    p.grad_h_n = read<S>(grad_h_n);
    p.grad_c_n = read<S>(grad_c_n);
    p.cell_states = read<Acc<S>>(cell_states);
    p.activations = read<S>(activations);
    p.normal = read<S>(normal);
    p.statistics = read<Acc<S>>(statistics);
    p.grad_gates = write<S>(grad_gates);
    p.grad_products = write<S>(grad_products);
    p.grad_h0 = write<S>(grad_h0);
    p.grad_c0 = write<S>(grad_c0);
    backward(v, p, grad_norms);
  });
  return {grad_gates, grad_products, grad_h0, grad_c0, grad_norms};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("lstm_variant_forward", TORCH_BOX(&Retried<&lstm_variant_forward_cpu>::run));
  m.impl("lstm_variant_backward", TORCH_BOX(&Retried<&lstm_variant_backward_cpu>::run));
}

}  // namespace fastseq::cpu
