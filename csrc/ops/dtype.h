// Element types of the kernels, without torch and without CUDA headers.
//
// The 16-bit types only store; arithmetic happens in Acc<T>. They have the layout of __nv_bfloat16 and
// __half, so device code may reinterpret them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace align {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type in which products of T are accumulated: float, or double for double (gradient checks on the CPU).
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Call DO for every type of x, and every type of x and of the adapters, for which kernels are compiled.
// clang-format off
#define ALIGN_FOR_CUDA_TYPES(DO) DO(float) DO(bfloat16) DO(float16)
#define ALIGN_FOR_CPU_TYPES(DO) ALIGN_FOR_CUDA_TYPES(DO) DO(double)
#define ALIGN_FOR_CUDA_TYPES_AND_ADAPTERS(DO) \
  DO(float, float) DO(bfloat16, bfloat16) DO(bfloat16, float) DO(float16, float16) DO(float16, float)
#define ALIGN_FOR_CPU_TYPES_AND_ADAPTERS(DO) ALIGN_FOR_CUDA_TYPES_AND_ADAPTERS(DO) DO(double, double)
// clang-format on

}  // namespace align
