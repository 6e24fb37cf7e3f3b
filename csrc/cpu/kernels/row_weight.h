// A weight whose rows a product reads in place.
#pragma once

#include "cpu/runtime/storage.h"

namespace fastseq::cpu {

template <class S>
struct RowWeight {
  const void* rows;  // (N, K) of `type`
  WeightType type;
  const Acc<S>* scale;  // (N,) of int8 rows, else null
};

}  // namespace fastseq::cpu
