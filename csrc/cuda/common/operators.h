// Shared by the CUDA operators: checks, pointers, stream. Includes no CUDA header, so the library loads without a GPU.
//
// FASTSEQ_HOST_DEVICE registers the same operators for CPU tensors in namespace fastseq_sim (tests/cuda/emulator).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <numeric>
#include <optional>

#include "checks.h"
#include "cuda/common/types.h"

#ifdef FASTSEQ_HOST_DEVICE
#define FASTSEQ_LIBRARY fastseq_sim
#define FASTSEQ_DISPATCH CPU
#else
#define FASTSEQ_LIBRARY fastseq
#define FASTSEQ_DISPATCH CUDA
#endif

// Defined in libtorch_cuda, which a CPU build of torch lacks.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fastseq::cuda {

// Makes the device of `t` current during its lifetime. stream(): torch's current stream on that device.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) {
    if (!t.is_cuda()) return;  // the host-side device
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "fastseq: got a CUDA tensor, but torch was built without CUDA");
    guard_.emplace(t.get_device_index());
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  Stream stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Stream stream_ = nullptr;
};

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && (!a.is_cuda() || a.get_device_index() == b.get_device_index());
}

// Checks the shape and dtype of `t`, and that it is on the device of `like`. Accepts any strides.
inline void check_like_strided(
    const char* op, const char* name, const Tensor& t, const Shape& shape, ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(same_device(t, like), op, ": ", name, " must be on the same device as the other tensors");
  check_form(op, name, t, shape, dtype);
}

// check_like_strided, and `t` must be contiguous.
inline void check_like(
    const char* op, const char* name, const Tensor& t, const Shape& shape, ScalarType dtype, const Tensor& like) {
  check_like_strided(op, name, t, shape, dtype, like);
  check_contiguous(op, name, t);
}

inline void check_like(const char* op,
                       const char* name,
                       const OptionalTensor& t,
                       const Shape& shape,
                       ScalarType dtype,
                       const Tensor& like) {
  if (t) check_like(op, name, *t, shape, dtype, like);
}

// Returns `t`, or a copy if kernels cannot read its rows as vectors. Rows must begin at multiples of gcd(row bytes,
// 16). Tensors that torch allocates do; views may not.
inline Tensor with_aligned_rows(const Tensor& t) {
  const auto row = t.size(t.dim() - 1) * static_cast<int64_t>(t.element_size());
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return address % std::gcd(row, int64_t{16}) == 0 ? t : torch::stable::clone(t);
}

inline Type type_of(const char* op, ScalarType dtype, bool allow_double) {
  if (dtype == ScalarType::Float) return Type::kFloat;
  if (dtype == ScalarType::BFloat16) return Type::kBFloat16;
  if (dtype == ScalarType::Half) return Type::kHalf;
  STD_TORCH_CHECK(allow_double && dtype == ScalarType::Double, op, ": the dtype must be Float, BFloat16 or Half",
                  allow_double ? " or Double" : "", ", got ", dtype);
  return Type::kDouble;
}

inline const void* read(const Tensor& t) { return t.const_data_ptr(); }

inline const void* read(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// Null for a tensor without elements: such a result is not computed.
inline void* write(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// error: the launcher's result.
inline void check_launch(const char* op, const std::string& error) {
  STD_TORCH_CHECK(error.empty(), op, ": the CUDA kernel was not launched: ", error);
}

}  // namespace fastseq::cuda
