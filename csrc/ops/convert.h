// Exact conversions between float and the 16-bit formats by integer arithmetic: the same bits on the CPU, on CUDA and
// in a vector. Narrowing rounds to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops/dtype.h"

#if defined(__CUDACC__)
#define ALIGN_CONVERT __host__ __device__ __forceinline__
#else
#define ALIGN_CONVERT inline __attribute__((always_inline))
#endif

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call, so the ABI of passing them does not matter
#endif

namespace align {

template <typename To, typename From>
ALIGN_CONVERT To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- 16-bit formats in 32-bit integers. F and U are float and uint32_t, or vectors of them.

template <typename F, typename U>
ALIGN_CONVERT F bfloat16_to_float(const U& h) {
  return bit_cast<F>(h << 16);
}

template <typename U, typename F>
ALIGN_CONVERT U float_to_bfloat16(const F& value) {
  const U u = bit_cast<U>(value);
  const U nearest_even = u + ((u >> 16) & 1u) + 0x7FFFu;
  const U quiet_nan = u | 0x400000u;
  return (value != value ? quiet_nan : nearest_even) >> 16;
}

template <typename F, typename U>
ALIGN_CONVERT F float16_to_float(const U& h) {
  const U magnitude = h & 0x7FFFu;
  const U normal = (magnitude << 13) + (112u << 23);  // the exponents' biases differ by 112
  const U special = normal + (112u << 23);            // infinity and NaN: exponent 31 becomes 255
  // 2^-14 (1 + m/1024) - 2^-14 = m 2^-24, without a denormal operand on the way.
  const F subnormal = bit_cast<F>((magnitude << 13) + 0x38800000u) - 0x1p-14f;
  const U finite = magnitude < 0x400u ? bit_cast<U>(subnormal) : normal;
  return bit_cast<F>((magnitude >= 0x7C00u ? special : finite) | ((h & 0x8000u) << 16));
}

template <typename U, typename F>
ALIGN_CONVERT U float_to_float16(const F& value) {
  const U u = bit_cast<U>(value);
  const U a = u & 0x7FFFFFFFu;
  const U normal = (a + 0xFFFu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 1/2, whose last place is float16's smallest subnormal, rounds to it.
  const U subnormal = bit_cast<U>(bit_cast<F>(a) + 0.5f) - 0x3F000000u;
  const U finite = a < 0x38800000u ? subnormal : normal;  // below 2^-14
  const U overflow = a > 0x7F800000u ? (a & 0u) + 0x7E00u : (a & 0u) + 0x7C00u;
  return (a >= 0x477FF000u ? overflow : finite) | ((u >> 16) & 0x8000u);  // 65520 rounds to infinity
}

// ---- Scalars

template <typename T>
ALIGN_CONVERT Acc<T> widen(T value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return bfloat16_to_float<float>(uint32_t(value.bits));
  } else if constexpr (std::is_same_v<T, float16>) {
    return float16_to_float<float>(uint32_t(value.bits));
  } else {
    return value;
  }
}

template <typename T>
ALIGN_CONVERT T narrow(Acc<T> value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return {uint16_t(float_to_bfloat16<uint32_t>(value))};
  } else if constexpr (std::is_same_v<T, float16>) {
    return {uint16_t(float_to_float16<uint32_t>(value))};
  } else {
    return value;
  }
}

}  // namespace align
