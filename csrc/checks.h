// Checks of operator arguments. Every refusal is a sentence: operator, argument, expected form, actual form.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace fastseq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

template <class Sizes>
std::string to_string(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline bool has_shape(const Tensor& t, const Shape& shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) != shape[i]) return false;
  }
  return true;
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank, const char* layout) {
  STD_TORCH_CHECK(t.dim() == rank, op, ": ", name, " must have the shape ", layout, ", got ", to_string(t.sizes()));
}

// Most elements that a tensor may have, counting a size of 0 as 1. Operators multiply sizes by small factors; up to
// this limit the products fit in 64 bits.
constexpr int64_t kMostElements = int64_t{1} << 48;

template <class Sizes>
void check_extent(const char* op, const char* name, const Sizes& sizes) {
  int64_t elements = 1;
  bool fits = true;
  for (const int64_t size : sizes) {
    const int64_t factor = size == 0 ? 1 : size;
    fits = fits && !__builtin_mul_overflow(elements, factor, &elements) && elements <= kMostElements;
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must have at most 2^48 elements, got the shape ", to_string(sizes));
}

// Checks that the sizes of `t` multiply to at most kMostElements, and that its storage reaches to its last element: a
// call of untyped_storage().resize_(0), as FSDP makes them, frees the memory and leaves the shape.
inline void check_memory(const char* op, const char* name, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  check_extent(op, name, sizes);
  int64_t last = 0, bytes = 0, needed = 0;  // index of the last element in the storage; bytes of the storage
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &last));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  bool fits = true;
  for (size_t i = 0; i < sizes.size(); ++i) {
    int64_t distance = 0;
    if (sizes[i] == 0) return;  // no elements
    fits = fits && !__builtin_mul_overflow(sizes[i] - 1, strides[i], &distance) &&
           !__builtin_add_overflow(last, distance, &last);
  }
  fits = fits && !__builtin_mul_overflow(last + 1, static_cast<int64_t>(t.element_size()), &needed);
  STD_TORCH_CHECK(fits && needed <= bytes && t.const_data_ptr() != nullptr, op, ": ", name,
                  " must lie in its storage, ", "got the shape ", to_string(sizes), " in a storage of ", bytes,
                  " bytes; was it freed or resized after the tensor was made?");
}

// Checks dtype, shape and memory.
inline void check_form(const char* op, const char* name, const Tensor& t, const Shape& shape, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have the dtype ", dtype, ", got ", t.scalar_type());
  STD_TORCH_CHECK(has_shape(t, shape), op, ": ", name, " must have the shape ", to_string(shape), ", got ",
                  to_string(t.sizes()));
  check_memory(op, name, t);
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous; call .contiguous() on it");
}

// Checks for a CPU tensor of this shape and dtype, at any strides.
inline void check_cpu_strided(const char* op, const char* name, const Tensor& t, const Shape& shape, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be a CPU tensor; move it with .cpu()");
  check_form(op, name, t, shape, dtype);
}

// Checks for a contiguous CPU tensor of this shape and dtype.
inline void check_cpu(const char* op, const char* name, const Tensor& t, const Shape& shape, ScalarType dtype) {
  check_cpu_strided(op, name, t, shape, dtype);
  check_contiguous(op, name, t);
}

// Dtype that tensors of `dtype` are computed in.
inline ScalarType accumulate_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace fastseq
