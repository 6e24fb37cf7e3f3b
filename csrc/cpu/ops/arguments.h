// Shared by the CPU operators: typed pointers into tensors, dispatch on the dtype, checks, the size of a task.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/runtime/storage.h"

namespace fastseq::cpu {

// Multiply-adds that pay for waking another thread: about 10 microseconds of work.
constexpr int64_t kGrain = 1 << 17;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class S>
const S* read(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}

template <class S>
const S* read(const OptionalTensor& t) {
  return t ? read<S>(*t) : nullptr;
}

// Null for an empty tensor, which stands for a result that is not needed.
template <class S>
S* write(const Tensor& t) {
  return t.numel() ? static_cast<S*>(t.mutable_data_ptr()) : nullptr;
}

// Calls run(S{}) with the storage type of `dtype`.
template <class Run>
void with_storage_type(const char* op, ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Half:
      return run(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": the dtype must be Float, Double, BFloat16 or Half, got ", dtype);
  }
}

inline void check_optional(
    const char* op, const char* name, const OptionalTensor& t, const Shape& shape, ScalarType dtype) {
  if (t) check_cpu(op, name, *t, shape, dtype);
}

inline Shape with_columns(const Shape& rows, int64_t columns) {
  Shape shape = rows;
  shape.push_back(columns);
  return shape;
}

}  // namespace fastseq::cpu
