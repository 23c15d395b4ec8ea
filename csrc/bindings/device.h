// Where the CUDA bindings run their kernels: torch's current device and stream, or the SIMT engine.
//
//   const Device device(x);                                  // first in the binding
//   cuda::some_op<T>({data<T>(x), ...}, device.stream());
//
// STABLE_TORCH_LIBRARY_IMPL(align_ext, ALIGN_DEVICE_KEY, m): the dispatch key of the tensors that such a build takes.
#pragma once

#include <initializer_list>

#include "bindings/tensors.h"
#include "ops/stream.h"

#ifdef ALIGN_SIMT
#include "bindings/device_simt.h"
#define ALIGN_DEVICE_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>

#include "bindings/torch_cuda.h"
#define ALIGN_DEVICE_KEY CUDA

namespace align {

// Makes a tensor's device the current one, and gives its current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  Stream stream() const {
    using CurrentStream = int32_t (*)(int32_t, void**);
    static const auto find = reinterpret_cast<CurrentStream>(find_in_torch_cuda(kCurrentStream));
    void* stream = nullptr;
    ALIGN_CHECK(find != nullptr && find(index_, &stream) == 0, "this torch gives no CUDA stream");
    return static_cast<Stream>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace align
#endif

namespace align {

// Calls body(T{}) with the kernel type of a tensor's dtype. float64 is for gradient checks, on the CPU only.
template <typename Body>
void dispatch_cuda_dtype(const Tensor& tensor, const char* name, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(float16{});
    default:
      refuse(name, " must be float32, bfloat16 or float16 on CUDA, got ", name_of(tensor.scalar_type()));
  }
}

// Calls body(T{}, W{}) with the kernel types of x and of the adapters.
template <typename Body>
void dispatch_cuda_types(const Tensor& x, ScalarType adapters, const Body& body) {
  dispatch_cuda_dtype(x, "x",
                      [&](auto type) { adapters == ScalarType::Float ? body(type, float{}) : body(type, type); });
}

}  // namespace align
