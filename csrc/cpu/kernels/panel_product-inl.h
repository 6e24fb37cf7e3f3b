// Product of rows with a packed weight, divided among the members of a team. A panel: 4 * kLanes neighbouring columns.
#pragma once

#include <cstdint>

#include "cpu/isa/region.h"
#include "cpu/kernels/gemm-inl.h"
#include "cpu/kernels/lstm_params.h"
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/panel_tasks.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

// A weight packed in panels, which multiplies rows of `rows` elements.
struct PackedWeight {
  const void* packed;
  int64_t rows, columns;
};

// Calls finish(row, column, sum) with vectors of the first `multiplied` of `rows` rows times a weight, and with 0 for
// the others, for the columns of this member of the job's team.
template <class S, int64_t CHUNK = kAccumulationChunk, class Job, class Finish>
FASTSEQ_INLINE void multiply_panels(const Job& job,
                                    const PackedWeight& weight,
                                    const Operand<S>* const* a,  // (multiplied) rows of weight.rows elements
                                    int64_t multiplied,
                                    int64_t rows,
                                    int64_t step,  // alternates the order of panels
                                    const Finish& finish_vector) {
  constexpr int64_t kWidth = 4 * kLanes<S>;
  const int64_t depth = padded_depth<S>(weight.rows), N = weight.columns;
  const PanelTasks own{(N + kWidth - 1) / kWidth, rows, job.members, job.share};
  alignas(64) Acc<S> sums[kBlockRows * kWidth];
  for (int64_t k = 0; k < own.count(); ++k) {
    const PanelTasks::Task task = own.at(k, step), next = own.at(k + 1 < own.count() ? k + 1 : 0, step);
    const auto finish = [&](int64_t first, int64_t count) FASTSEQ_NOINLINE {
      for (int64_t r = first; r < first + count; ++r) {
        for (int64_t j = 0, column = task.panel * kWidth; j < kWidth && column < N;
             j += kLanes<S>, column += kLanes<S>) {
          finish_vector(task.row + r, column, vload(sums + r * kWidth + j));
        }
      }
    };
    const int64_t given = multiplied - task.row, n = given < 0 ? 0 : given < task.rows ? given : task.rows;
    multiply_block<S, CHUNK>(a + task.row, n, panel_at<S>(weight.packed, task.panel, depth), depth,
                             panel_at<S>(weight.packed, next.panel, depth), false, sums, finish);
    fill_zero(sums + n * kWidth, (task.rows - n) * kWidth);
    finish(n, task.rows - n);
  }
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
