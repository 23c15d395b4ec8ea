// What every binding needs of torch: optional tensors, dtype dispatch, checks that name the argument.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

inline std::string text_of(Sizes sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

inline std::string shape_of(const Tensor& tensor) { return text_of(tensor.sizes()); }

inline void check_shape(const Tensor& tensor, Sizes expected, const char* name) {
  STD_TORCH_CHECK(tensor.sizes() == expected, name, " must have shape ", text_of(expected), ", got ", shape_of(tensor));
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

// New tensors and views by torch's C shim, and no call where there is nothing to do: a call through the dispatcher
// costs up to a microsecond, and a layer at sizes of no work has a dozen of them.

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  return as_contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

inline OptionalTensor contiguous_as(const OptionalTensor& tensor, ScalarType dtype) {
  return tensor ? OptionalTensor(contiguous_as(*tensor, dtype)) : std::nullopt;
}

// A new tensor on the device of another.
inline Tensor make_empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle created = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), type,
                                                  device_type, like.get_device_index(), &created));
  return Tensor(created);
}

inline Tensor make_empty(const Tensor& like, Sizes sizes) { return make_empty(like, sizes, like.scalar_type()); }

inline Tensor empty_bytes(const Tensor& like, int64_t bytes) { return make_empty(like, {bytes}, ScalarType::Byte); }

// Memory for a CPU kernel, in which nothing is set: a tensor's takes a microsecond more.
inline std::unique_ptr<std::byte[]> host_bytes(int64_t bytes) {
  return std::unique_ptr<std::byte[]>(new std::byte[size_t(bytes)]);
}

// A tensor's memory as a matrix.
inline Tensor matrix(const Tensor& tensor, const std::array<int64_t, 2>& sizes, const std::array<int64_t, 2>& strides) {
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes.data(), strides.data(), 0, &view));
  return Tensor(view);
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

// The dtype in which kernels take adapters: float32 if all are, and x is not float64, else x's. They round them.
inline ScalarType adapter_type(const Tensor& x, std::initializer_list<Tensor> adapters) {
  bool all_float = x.scalar_type() != ScalarType::Double;
  for (const Tensor& adapter : adapters) all_float = all_float && adapter.scalar_type() == ScalarType::Float;
  return all_float ? ScalarType::Float : x.scalar_type();
}

// Calls body(T{}, W{}) with the kernel types of x and of the adapters.
template <typename Body>
void dispatch_types(const Tensor& x, ScalarType adapters, const Body& body) {
  dispatch_dtype(x, "x", [&](auto type) {
    if constexpr (sizeof(type) == 2) {
      if (adapters == ScalarType::Float) return body(type, float{});
    }
    body(type, type);
  });
}

}  // namespace align
