// Checks of operator arguments. Every refusal is a sentence: operator, argument, expected form, actual form.
#pragma once

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

inline void check_form(const char* op, const char* name, const Tensor& t, const Shape& shape, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have the dtype ", dtype, ", got ", t.scalar_type());
  STD_TORCH_CHECK(has_shape(t, shape), op, ": ", name, " must have the shape ", to_string(shape), ", got ",
                  to_string(t.sizes()));
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
