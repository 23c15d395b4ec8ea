// ALIGN_SIMT: the CUDA bindings run on host tensors, their kernels on the SIMT engine (cpp_tests/simt), which checks
// every access. Whatever data() and mutable_data() of tensors.h hand out while a CudaDevice lives is device memory,
// with the extents of the tensor; an error that the engine finds is an error of the operator.
#pragma once

#include <algorithm>
#include <exception>
#include <map>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "bindings/check.h"
#include "ops/stream.h"
#include "report.h"

namespace align {

class CudaDevice {
 public:
  static constexpr bool kCuda = true;
  explicit CudaDevice(const torch::stable::Tensor&) : first_report_(simt::reports().size()) {
    ALIGN_CHECK(current_ == nullptr, "a binding with a CudaDevice calls another one: the engine knows one at a time");
    current_ = this;
    simt::options().traffic = false;  // reports are kept as long as the process lives
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  // Forgets the memory, and throws if the kernels went wrong.
  ~CudaDevice() noexcept(false) {
    current_ = nullptr;
    for (const auto& [begin, region] : regions_) simt::device_unregister(reinterpret_cast<void*>(begin));
    std::string errors;
    for (size_t i = first_report_; i < simt::reports().size(); ++i) {
      errors += simt::describe(simt::reports()[i]);
    }
    if (std::uncaught_exceptions() == 0) ALIGN_CHECK(errors.empty(), "SIMT engine: ", errors);
  }

  Stream stream() const { return nullptr; }

  // Registers a tensor's memory; given: it holds values, else a kernel must write before it reads. Tensors that share
  // bytes become one region.
  static void see(const torch::stable::Tensor& tensor, const void* data, bool given) {
    if (current_ != nullptr && tensor.numel() > 0) current_->add(tensor, reinterpret_cast<uintptr_t>(data), given);
  }

 private:
  struct Region {
    uintptr_t end;
    std::string name;
    bool given;
  };

  void add(const torch::stable::Tensor& tensor, uintptr_t begin, bool given) {
    Region region = {begin, "tensor [", given};
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      last += (tensor.size(d) - 1) * tensor.stride(d);
      region.name += (d ? ", " : "") + std::to_string(tensor.size(d));
    }
    region.end += (size_t(last) + 1) * tensor.element_size();
    region.name += "] of " + std::to_string(tensor.element_size()) + "-byte elements";

    for (auto it = regions_.begin(); it != regions_.end();) {
      const auto& [other, known] = *it;
      if (other <= begin && region.end <= known.end && (known.given || !given)) return;
      if (begin < known.end && other < region.end) {
        begin = std::min(begin, other);
        region.end = std::max(region.end, known.end);
        region.given = region.given || known.given;
        simt::device_unregister(reinterpret_cast<void*>(other));
        it = regions_.erase(it);
      } else {
        ++it;
      }
    }
    simt::device_register(reinterpret_cast<void*>(begin), region.end - begin, region.name, region.given);
    regions_.emplace(begin, region);
  }

  static inline thread_local CudaDevice* current_ = nullptr;
  size_t first_report_;
  std::map<uintptr_t, Region> regions_;  // by begin, disjoint
};

}  // namespace align
