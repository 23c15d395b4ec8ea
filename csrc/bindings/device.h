// The devices of the operators. A binding is a template over its Device, so that one file serves the CPU and CUDA:
//
//   template <class Device> Tensor some_op(const Tensor& x) {
//     check(x);
//     const Device device(x);  // after the checks, before the first call of data()
//     if constexpr (Device::kCuda) { cuda::some_op(..., device.stream()); } else { cpu::some_op(...); }
//   }
//   template <class Device> void implement(auto& m) { m.impl("some_op", TORCH_BOX(&some_op<Device>)); }
//   ALIGN_IMPLEMENT_ON_DEVICES(implement)
#pragma once

#include "bindings/tensors.h"
#include "ops/stream.h"

#if defined(ALIGN_SIMT)
#include "bindings/device_simt.h"
#elif defined(ALIGN_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "bindings/torch_cuda.h"
#endif

namespace align {

struct CpuDevice {
  static constexpr bool kCuda = false;
  explicit CpuDevice(const Tensor&) {}
};

#if defined(ALIGN_SIMT)  // the CUDA kernels run on tensors of the CPU
#define ALIGN_IMPLEMENT_ON_DEVICES(implement) \
  STABLE_TORCH_LIBRARY_IMPL(align_ext, CPU, m) { implement<CudaDevice>(m); }
#elif defined(ALIGN_WITH_CUDA)
#define ALIGN_IMPLEMENT_ON_DEVICES(implement)                               \
  STABLE_TORCH_LIBRARY_IMPL(align_ext, CPU, m) { implement<CpuDevice>(m); } \
  STABLE_TORCH_LIBRARY_IMPL(align_ext, CUDA, m) { implement<CudaDevice>(m); }

// Makes a tensor's device the current one, and gives its current stream.
class CudaDevice {
 public:
  static constexpr bool kCuda = true;
  explicit CudaDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

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
#else
#define ALIGN_IMPLEMENT_ON_DEVICES(implement) \
  STABLE_TORCH_LIBRARY_IMPL(align_ext, CPU, m) { implement<CpuDevice>(m); }
#endif

// Calls body(T{}) with the kernel type of a tensor's dtype. Only the CPU has float64, which is for gradient checks.
template <class Device, typename Body>
void dispatch_dtype(const Tensor& tensor, const char* name, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(float16{});
    case ScalarType::Double:
      if constexpr (!Device::kCuda) return body(double{});
      [[fallthrough]];
    default:
      refuse(name, " must be float32, bfloat16", Device::kCuda ? " or float16 on CUDA" : ", float16 or float64",
             ", got ", name_of(tensor.scalar_type()));
  }
}

// Calls body(T{}, TA{}) with the kernel types of x and of the adapters.
template <class Device, typename Body>
void dispatch_types(const Tensor& x, ScalarType adapters, const Body& body) {
  dispatch_dtype<Device>(x, "x", [&](auto type) {
    if constexpr (sizeof(type) == 2) {
      if (adapters == ScalarType::Float) return body(type, float{});
    }
    body(type, type);
  });
}

}  // namespace align
