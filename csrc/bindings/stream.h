// torch's current CUDA stream, found at run time: the symbol lives in a library that a CPU torch does not have.
#pragma once

#include <dlfcn.h>

#include <torch/csrc/stable/library.h>

#include "ops/stream.h"

namespace align {

inline Stream current_stream(int32_t device) {
  using CurrentStream = int32_t (*)(int32_t, void**);
  static const auto find = reinterpret_cast<CurrentStream>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  STD_TORCH_CHECK(find != nullptr && find(device, &stream) == 0, "this torch gives no CUDA stream");
  return static_cast<Stream>(stream);
}

}  // namespace align
