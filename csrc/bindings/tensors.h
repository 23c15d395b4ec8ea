// What every binding needs of torch: optional tensors, dtype dispatch, checks that name the argument.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "ops/dtype.h"

#ifdef ALIGN_SIMT
#include "bindings/device_simt.h"
#define ALIGN_SEE(tensor, pointer, given) align::Device::see(tensor, pointer, given)
#else
#define ALIGN_SEE(tensor, pointer, given)
#endif

namespace align {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline void check_shape(const Tensor& tensor, const std::vector<int64_t>& expected, const char* name) {
  bool same = tensor.dim() == int64_t(expected.size());
  for (size_t d = 0; same && d < expected.size(); ++d) same = tensor.size(d) == expected[d];
  std::string text = "[";
  for (size_t d = 0; d < expected.size(); ++d) text += (d ? ", " : "") + std::to_string(expected[d]);
  STD_TORCH_CHECK(same, name, " must have shape ", text, "], got ", shape_of(tensor));
}

inline void check_dtype(const Tensor& tensor, ScalarType expected, const char* name, const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, " must be ", what);
}

inline void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(), name,
                  " must be on the device of the other tensors");
}
inline void check_device(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (tensor) check_device(*tensor, like, name);
}

// The accumulation type of a tensor's dtype, as torch names it.
inline ScalarType acc_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  const Tensor cast = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return torch::stable::contiguous(cast);
}

inline OptionalTensor contiguous_as(const OptionalTensor& tensor, ScalarType dtype) {
  return tensor ? OptionalTensor(contiguous_as(*tensor, dtype)) : std::nullopt;
}

inline Tensor empty_bytes(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// Memory for kernels. What a kernel reads before it writes is taken by data(), what it writes first (outputs,
// workspaces: mutable_data<void>) by mutable_data(), and what is read and written in place by both.
template <typename T>
const T* data(const Tensor& tensor) {
  const void* const pointer = tensor.const_data_ptr();
  ALIGN_SEE(tensor, pointer, /*given=*/true);
  return static_cast<const T*>(pointer);
}
template <typename T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <typename T>
T* mutable_data(Tensor& tensor) {
  void* const pointer = tensor.mutable_data_ptr();
  ALIGN_SEE(tensor, pointer, /*given=*/false);
  return static_cast<T*>(pointer);
}

// Calls body(T{}) with the kernel type of a tensor's dtype.
template <typename Body>
void dispatch_dtype(const Tensor& tensor, const char* name, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(float16{});
    case ScalarType::Double:
      return body(double{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

}  // namespace align
