// The calls of torch that all bindings need: new tensors, conversions, and memory for kernels.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <unistd.h>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/check.h"
#include "ops/dtype.h"

#ifdef ALIGN_SIMT
#include "bindings/device_simt.h"
#define ALIGN_SEE(tensor, pointer, given) align::CudaDevice::see(tensor, pointer, given)
#else
#define ALIGN_SEE(tensor, pointer, given)
#endif

// Exists from torch 2.12 on; before, its address is null.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace align {

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// The accumulation type of a tensor's dtype, as torch names it.
inline ScalarType acc_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// ---- Calls of torch: by its C shim where there is a function, since a call through the dispatcher costs up to a
// microsecond, and a layer at sizes of no work has a dozen of them; else by the operator's full name. torch::stable's
// C++ functions gain overloads from one torch to the next, which change what a call with the same arguments means.

// Throws the error message of torch if a call has failed.
inline void check_call(AOTITorchError error, const char* what) {
  if (error == AOTI_TORCH_SUCCESS) return;
  const bool knows = torch_exception_get_what_without_backtrace != nullptr;
  const char* const said = knows ? torch_exception_get_what_without_backtrace() : nullptr;
  refuse(what, " failed: ", said ? said : "torch wrote the reason to stderr");
}

template <size_t kArguments>
Tensor call_operator(const char* name, const char* overload, std::array<StableIValue, kArguments> stack) {
  check_call(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    default:
      return 8;
  }
}

// The memory of this machine. A process that allocates more would be killed when it writes to it. (The allocator of a
// GPU reports an error by itself.)
inline int64_t host_memory() {
  static const int64_t bytes = product({sysconf(_SC_PHYS_PAGES), sysconf(_SC_PAGE_SIZE)});
  return bytes;
}

// In builds for tests new memory holds NaN in every floating-point type, so that a test sees what no kernel has
// written.
inline void fill_new([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef ALIGN_FILL_NEW
  if (bytes > 0) std::memset(memory, 0xFF, size_t(bytes));
#endif
}

// A new tensor on the device of another. All new tensors are made here.
inline Tensor make_empty(const Tensor& like, Sizes sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t bytes = bytes_of(dtype);
  for (size_t d = sizes.size(); d-- > 0;) {
    bytes = product({bytes, sizes[d]});
    if (d > 0) strides[d - 1] = product({strides[d], std::max<int64_t>(sizes[d], 1)});
  }
  ALIGN_CHECK(bytes <= host_memory() || !like.is_cpu(), "a tensor of shape ", text_of(sizes), " would take ", bytes,
              " bytes, this machine has ", host_memory());
  int32_t device_type = 0;
  check_call(aoti_torch_get_device_type(like.get(), &device_type), "the device");
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle created = nullptr;
  check_call(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), type, device_type,
                                      like.get_device_index(), &created),
             "a new tensor");
  Tensor tensor(created);
  if (tensor.is_cpu()) fill_new(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

inline Tensor make_empty(const Tensor& like, Sizes sizes) { return make_empty(like, sizes, like.scalar_type()); }

inline Tensor empty_bytes(const Tensor& like, int64_t bytes) { return make_empty(like, {bytes}, ScalarType::Byte); }

// Uninitialised memory for a CPU kernel. A tensor would take a microsecond more.
inline std::unique_ptr<std::byte[]> host_bytes(int64_t bytes) {
  ALIGN_CHECK(bytes <= host_memory(), "the workspace would take ", bytes, " bytes, this machine has ", host_memory());
  std::unique_ptr<std::byte[]> memory(new (std::nothrow) std::byte[size_t(bytes)]);
  ALIGN_CHECK(memory, "the workspace would take ", bytes, " bytes, which there are not");
  fill_new(memory.get(), bytes);
  return memory;
}

inline Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  const int64_t bytes = product({tensor.numel(), int64_t(tensor.element_size())});
  ALIGN_CHECK(bytes <= host_memory() || !tensor.is_cpu(), "a contiguous copy of a tensor of shape ", shape_of(tensor),
              " would take ", bytes, " bytes, this machine has ", host_memory());
  using torch::stable::detail::from;
  return call_operator<2>("aten::contiguous", "", {from(tensor), from(MemoryFormat::Contiguous)});
}

inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return as_contiguous(tensor);
  using torch::stable::detail::from;
  const std::optional<MemoryFormat> format = MemoryFormat::Contiguous;
  return call_operator<5>("aten::to", "dtype", {from(tensor), from(dtype), from(false), from(false), from(format)});
}

inline OptionalTensor contiguous_as(const OptionalTensor& tensor, ScalarType dtype) {
  return tensor ? OptionalTensor(contiguous_as(*tensor, dtype)) : std::nullopt;
}

// A view of the memory of a tensor with other sizes and strides.
template <size_t kDims>
Tensor view_of(const Tensor& tensor, const std::array<int64_t, kDims>& sizes,
               const std::array<int64_t, kDims>& strides) {
  AtenTensorHandle view = nullptr;
  check_call(aoti_torch__reinterpret_tensor(tensor.get(), kDims, sizes.data(), strides.data(), 0, &view), "a view");
  return Tensor(view);
}

// The memory of a tensor for kernels: data() if a kernel reads it, mutable_data() if a kernel writes it first (outputs,
// and workspaces as mutable_data<void>), and both if it is changed in place.
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

// The dtype in which kernels get the adapters: float32 if all adapters are float32 and x is not float64, otherwise the
// dtype of x. Kernels round float32 adapters to the dtype of x.
inline ScalarType adapter_type(const Tensor& x, const std::vector<Tensor>& adapters) {
  bool all_float = x.scalar_type() != ScalarType::Double;
  for (const Tensor& adapter : adapters) all_float = all_float && adapter.scalar_type() == ScalarType::Float;
  return all_float ? ScalarType::Float : x.scalar_type();
}

}  // namespace align
