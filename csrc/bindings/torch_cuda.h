// Finds functions of torch's CUDA library at run time: a CPU torch has no such library, and where there is one, torch
// has loaded it for itself alone, so that the default search does not see it.
#pragma once

#include <dlfcn.h>

namespace align {

constexpr const char* kCurrentStream = "aoti_torch_get_current_cuda_stream";
constexpr const char* kAddProduct = "aoti_torch_cuda_addmm_out";

inline void* find_in_torch_cuda(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  return library ? dlsym(library, name) : nullptr;
}

}  // namespace align
