// The operator candidates on the CPU: checks, outputs, threads. The arithmetic is in candidates-inl.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/isa/kernel_table.h"
#include "cpu/kernels/candidates_params.h"
#include "cpu/ops/arguments.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/pool.h"

namespace fastseq::cpu {
namespace {

constexpr int64_t kWorkPerLogit = 8;  // in multiply-adds: an exponential, two comparisons

std::tuple<Tensor, Tensor, Tensor> candidates_cpu(
    Tensor logits, OptionalTensor scores, OptionalTensor forbidden, int64_t last_resort, int64_t count) {
  const char* op = "candidates";
  check_rank(op, "logits", logits, 2, "(B * K, V)");
  const int64_t N = logits.size(0), V = logits.size(1);
  const ScalarType dtype = logits.scalar_type(), acc = accumulate_type(dtype);
  if (scores) check_rank(op, "scores", *scores, 2, "(B, K)");
  const int64_t B = scores ? scores->size(0) : N, K = scores ? scores->size(1) : 1;
  const bool per_row = forbidden && forbidden->dim() == 2;
  const int64_t F = forbidden && forbidden->dim() > 0 ? forbidden->size(forbidden->dim() - 1) : 0;
  STD_TORCH_CHECK(B * K == N, op, ": logits must have a row for each of the ", B, " x ", K, " scores, got ", N);
  STD_TORCH_CHECK(V >= 1 && K >= 1, op, ": logits must have at least one column, and scores one beam, got V = ", V,
                  " and K = ", K);
  STD_TORCH_CHECK(count >= 1 && count <= kMostElements, op, ": count must be at least 1, got ", count);
  check_extent(op, "result", Shape{B, count});
  check_cpu(op, "logits", logits, {N, V}, dtype);
  check_optional(op, "scores", scores, {B, K}, acc);
  check_optional(op, "forbidden", forbidden, per_row ? Shape{N, F} : Shape{F}, ScalarType::Long);

  Tensor totals = result_empty({B, count}, acc);
  Tensor parents = result_empty({B, count}, ScalarType::Long), tokens = result_empty({B, count}, ScalarType::Long);
  with_storage_type(op, dtype, [&](auto zero) {
    using S = decltype(zero);
    CandidatesParams<S> p{};
    p.beams = K;
    p.vocab = V;
    p.count = count;
    p.logits = read<S>(logits);
    p.scores = read<Acc<S>>(scores);
    p.forbidden = read<int64_t>(forbidden);
    p.forbidden_count = F;
    p.forbidden_stride = per_row ? F : 0;
    p.last_resort = last_resort;
    p.totals = write<Acc<S>>(totals);
    p.parents = write<int64_t>(parents);
    p.tokens = write<int64_t>(tokens);
    parallel_for(B, kGrain / (kWorkPerLogit * K * V) + 1,
                 [&](int64_t begin, int64_t end) { kernels<S>().candidates(p, begin, end); });
  });
  return {totals, parents, tokens};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) { m.impl("candidates", TORCH_BOX(&Retried<&candidates_cpu>::run)); }

}  // namespace fastseq::cpu
