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

}  // namespace align
