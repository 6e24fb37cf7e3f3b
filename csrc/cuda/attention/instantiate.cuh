// Chooses the instantiation of the attention kernels: dtype, width of vector loads, score.
#pragma once

#include "cuda/attention/params.h"
#include "cuda/common/launch.cuh"

namespace fastseq::cuda {

// True if every row begins at a multiple of 16 bytes.
template <class T>
bool rows_aligned(const Rows& x) {
  return aligned({x.data}) && x.batch % kWidth<T> == 0 && x.row % kWidth<T> == 0;
}

// Returns run(T{}, elements of a vector load, additive score); the last two are std::integral_constant.
template <class Run>
std::string with_attention(const AttentionInputParams& in,
                           std::initializer_list<const void*> pointers,  // other tensors that kernels access as vectors
                           std::initializer_list<Rows> rows,
                           Type type,
                           const Run& run) {
  return with_float_type(type, [&](auto zero) {
    using T = decltype(zero);
    bool wide = in.size % kWidth<T> == 0 && in.width % kWidth<T> == 0 && aligned(pointers) &&
                aligned({in.weight, in.bias}) && rows_aligned<T>(in.query) && rows_aligned<T>(in.keys) &&
                rows_aligned<T>(in.values);
    for (const Rows& x : rows) wide = wide && rows_aligned<T>(x);
    const auto with_width = [&](auto width) {
      return in.weight ? run(zero, width, std::true_type{}) : run(zero, width, std::false_type{});
    };
    return wide ? with_width(std::integral_constant<int, kWidth<T>>{}) : with_width(std::integral_constant<int, 1>{});
  });
}

}  // namespace fastseq::cuda
