// Vectors of W bytes by GCC's vector extensions, and the choice of W at run time: 64 bytes with AVX-512, 32 with AVX2,
// 16 elsewhere.
//
// Everything here is inlined into its caller, because only run_widest's callees are compiled for the wide instruction
// sets: a helper or lambda that is not inlined would stay at the baseline.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "ops/convert.h"
#include "ops/dtype.h"

#define ALIGN_INLINE inline __attribute__((always_inline))
#define ALIGN_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define ALIGN_X86_LEVELS 1
#endif

namespace align::cpu {

// ---- Instruction sets

// The widest vectors run_widest may choose. Tests lower it to reach the narrower code on a wide machine.
inline int vector_bytes_limit = 64;

inline bool starts_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }
// ONEDNN_MAX_CPU_ISA, which limits what torch's own products use, in upper case; empty: no limit.
inline const std::string& isa_limit() {
  static const std::string limit = [] {
    const char* given = std::getenv("ONEDNN_MAX_CPU_ISA");
    std::string text = given ? given : "";
    for (char& letter : text) letter = letter >= 'a' && letter <= 'z' ? char(letter - 'a' + 'A') : letter;
    return text;
  }();
  return limit;
}

#ifdef ALIGN_X86_LEVELS
template <typename Body>
__attribute__((target("arch=x86-64-v4"))) void run_v4(const Body& body) {
  body(std::integral_constant<int, 64>{});
}
template <typename Body>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const Body& body) {
  body(std::integral_constant<int, 32>{});
}
// The widest vectors that this processor has and the limit allows: SSE41 (16 bytes), AVX2 (32), any other 64.
inline int native_vector_bytes() {
  static const int bytes = [] {
    const bool none = starts_with(isa_limit(), "SSE") || isa_limit() == "AVX";
    if (none || !__builtin_cpu_supports("x86-64-v3")) return 16;
    return starts_with(isa_limit(), "AVX2") || !__builtin_cpu_supports("x86-64-v4") ? 32 : 64;
  }();
  return bytes;
}
#else
inline int native_vector_bytes() { return 16; }
#endif

// Calls body(std::integral_constant<int, W>) for the widest W of this processor, compiled for its instruction set.
// body must be an ALIGN_INLINE_LAMBDA.
template <typename Body>
void run_widest(const Body& body) {
#ifdef ALIGN_X86_LEVELS
  const int bytes = native_vector_bytes() < vector_bytes_limit ? native_vector_bytes() : vector_bytes_limit;
  if (bytes >= 64) return run_v4(body);
  if (bytes >= 32) return run_v3(body);
#endif
  body(std::integral_constant<int, 16>{});
}

// ---- Types

template <typename A, int W>
constexpr int kLanes = W / int(sizeof(A));

template <typename A, int W>
struct VectorOf {
  typedef A Type __attribute__((vector_size(W)));
};
template <typename A, int W>
using Vec = typename VectorOf<A, W>::Type;

// The unsigned integer of the size of A.
template <typename A>
using UInt = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

// ---- Vectors

template <int W, typename T>
ALIGN_INLINE Vec<Acc<T>, W> load(const T* source) {
  using V = Vec<Acc<T>, W>;
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    V v;
    std::memcpy(&v, source, W);
    return v;
  } else {
    Vec<uint32_t, W> bits;  // a loop: GCC 12 makes one instruction of it, and four of __builtin_convertvector
    for (int lane = 0; lane < kLanes<float, W>; ++lane) bits[lane] = source[lane].bits;
    if constexpr (std::is_same_v<T, bfloat16>) {
      return bfloat16_to_float<V>(bits);
    } else {
      return float16_to_float<V>(bits);
    }
  }
}

template <int W, typename T>
ALIGN_INLINE void store(T* target, const Vec<Acc<T>, W>& v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    std::memcpy(target, &v, W);
  } else {
    using U = Vec<uint32_t, W>;
    using Half = Vec<uint16_t, W / 2>;
    U wide;
    if constexpr (std::is_same_v<T, bfloat16>) {
      wide = float_to_bfloat16<U>(v);
    } else {
      wide = float_to_float16<U>(v);
    }
    const Half bits = __builtin_convertvector(wide, Half);
    std::memcpy(target, &bits, sizeof bits);
  }
}

// Loads the first count elements; the other lanes are zero.
template <int W, typename T>
ALIGN_INLINE Vec<Acc<T>, W> load_first(const T* source, int64_t count) {
  constexpr int kAll = kLanes<Acc<T>, W>;
  if (count == kAll) return load<W>(source);
  T padded[kAll] = {};
  std::memcpy(padded, source, count * sizeof(T));
  return load<W>(padded);
}

template <int W, typename T>
ALIGN_INLINE void store_first(T* target, const Vec<Acc<T>, W>& v, int64_t count) {
  constexpr int kAll = kLanes<Acc<T>, W>;
  if (count == kAll) return store<W>(target, v);
  T all[kAll];
  store<W>(all, v);
  std::memcpy(target, all, count * sizeof(T));
}

// Sets the lanes of v to zero whose bit in kept is not set.
template <int W, typename A>
ALIGN_INLINE Vec<A, W> select_lanes(const Vec<A, W>& v, uint32_t kept) {
#ifdef ALIGN_X86_LEVELS
  if constexpr (W == 64 && sizeof(A) == 4) {  // GCC 12 makes six instructions of the expression below
    Vec<A, W> result;
    asm("vmovaps %1, %0%{%2%}%{z%}" : "=v"(result) : "v"(v), "Yk"(uint16_t(kept)));
    return result;
  }
#endif
  Vec<UInt<A>, W> lane_bit;
  for (int lane = 0; lane < kLanes<A, W>; ++lane) lane_bit[lane] = UInt<A>(1) << lane;
  return (lane_bit & UInt<A>(kept)) != 0 ? v : Vec<A, W>{};
}

// Lane l of the result is low[l] + low[l + kDistance] where bit kDistance of l is clear, and high[l - kDistance] +
// high[l] where it is set.
template <int kDistance, typename V, int... lane>
ALIGN_INLINE V add_halves(const V& low, const V& high, std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
  return __builtin_shufflevector(low, high, ((lane & kDistance) ? n + lane - kDistance : lane)...) +
         __builtin_shufflevector(low, high, ((lane & kDistance) ? n + lane : lane + kDistance)...);
}

// Lane l of the result is the sum of v[l]'s lanes, for as many vectors as a vector has lanes.
template <typename A, int W, int kCount = kLanes<A, W>>
ALIGN_INLINE Vec<A, W> lane_sums(const Vec<A, W>* v) {
  if constexpr (kCount == 1) {
    return *v;
  } else {
    constexpr int kHalf = kCount / 2;
    return add_halves<kHalf>(lane_sums<A, W, kHalf>(v), lane_sums<A, W, kHalf>(v + kHalf),
                             std::make_integer_sequence<int, kLanes<A, W>>{});
  }
}

}  // namespace align::cpu
