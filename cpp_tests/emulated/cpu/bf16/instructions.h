// The instructions of csrc/cpu/bf16/instructions.h, and those of AVX-512 that stand around them, on any processor: the
// tests of the bfloat16 units compile the kernels with this file in its place. Each function does what Intel's
// documentation says of the instruction of its name, but that a tile's sums are added in another order. What a
// processor refuses ends the process.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/bf16/units.h"
#include "ops/convert.h"

#define BF16_TARGET
#define BF16_INLINE inline __attribute__((always_inline))
#define BF16_LAMBDA __attribute__((always_inline))

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in the file in whose place this one is

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef double __v8df __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef long long __v8di __attribute__((vector_size(64)));
typedef int __v16si __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;

namespace align::cpu {
namespace emulated {

template <typename Lane, int kLanes>
struct Lanes {
  Lane at[kLanes];

  template <typename Vector>
  static Lanes of(const Vector& v) {
    static_assert(sizeof(Vector) == sizeof(Lanes));
    Lanes lanes;
    std::memcpy(&lanes, &v, sizeof v);
    return lanes;
  }
  template <typename Vector>
  Vector as() const {
    Vector v;
    std::memcpy(&v, at, sizeof v);
    return v;
  }
};
using Floats = Lanes<float, 16>;
using Words = Lanes<uint16_t, 32>;
using HalfWords = Lanes<uint16_t, 16>;
using Ints = Lanes<uint32_t, 16>;

inline uint16_t rounded(float value) {
  if (std::fpclassify(value) == FP_SUBNORMAL) value = std::copysign(0.0f, value);
  return float_to_bfloat16<uint32_t>(value);
}
inline float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}
inline float widened(uint16_t bits) { return flushed(bfloat16_to_float<float>(uint32_t(bits))); }
// A sum and the products of two pairs, the second pair first.
inline float dot(float sum, const uint16_t* left, const uint16_t* right) {
  sum = flushed(flushed(sum) + widened(left[1]) * widened(right[1]));
  return flushed(sum + widened(left[0]) * widened(right[0]));
}

}  // namespace emulated

inline Bf16Unit find_bf16_unit() { return Bf16Unit::kAmx; }

// ---- AVX-512: memory

inline __m512i _mm512_loadu_si512(const void* from) {
  __m512i v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void _mm512_storeu_si512(void* to, __m512i v) { std::memcpy(to, &v, sizeof v); }
inline void _mm512_store_si512(void* to, __m512i v) { _mm512_storeu_si512(__builtin_assume_aligned(to, 64), v); }
inline __m512 _mm512_loadu_ps(const void* from) { return (__m512)_mm512_loadu_si512(from); }
inline __m512 _mm512_load_ps(const void* from) { return _mm512_loadu_ps(__builtin_assume_aligned(from, 64)); }
inline void _mm512_storeu_ps(void* to, __m512 v) { _mm512_storeu_si512(to, (__m512i)v); }
inline void _mm512_store_ps(void* to, __m512 v) { _mm512_storeu_ps(__builtin_assume_aligned(to, 64), v); }

// What is not of the mask is not touched: it may lie beyond the end of the memory.
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  emulated::Floats lanes = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) lanes.at[i] = static_cast<const float*>(from)[i];
  }
  return lanes.as<__m512>();
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
  emulated::Words lanes = {};
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) std::memcpy(&lanes.at[i], static_cast<const uint16_t*>(from) + i, 2);
  }
  return lanes.as<__m512i>();
}
inline void _mm512_mask_storeu_epi16(void* to, __mmask32 mask, __m512i v) {
  const auto lanes = emulated::Words::of(v);
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<uint16_t*>(to) + i, &lanes.at[i], 2);
  }
}

// ---- AVX-512: vectors

inline __m512i _mm512_set1_epi32(int value) {
  emulated::Ints lanes;
  std::fill_n(lanes.at, 16, uint32_t(value));
  return lanes.as<__m512i>();
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_slli_epi32(__m512i v, unsigned count) {
  auto lanes = emulated::Ints::of(v);
  for (uint32_t& lane : lanes.at) lane <<= count;
  return lanes.as<__m512i>();
}
inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
  const auto words = emulated::HalfWords::of(v);
  emulated::Ints lanes;
  std::copy_n(words.at, 16, lanes.at);
  return lanes.as<__m512i>();
}
inline __m256i _mm512_extracti64x4_epi64(__m512i v, int half) {
  __m256i result;
  std::memcpy(&result, reinterpret_cast<const char*>(&v) + 32 * half, sizeof result);
  return result;
}
inline __m256i _mm512_castsi512_si256(__m512i v) { return _mm512_extracti64x4_epi64(v, 0); }
inline __m512 _mm512_castsi512_ps(__m512i v) { return (__m512)v; }
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 v) {
  auto lanes = emulated::Floats::of(v);
  for (int i = 0; i < 16; ++i) lanes.at[i] = mask >> i & 1 ? lanes.at[i] : 0;
  return lanes.as<__m512>();
}

template <int kFirst>  // of the eight words of each 128 bits
__m512i interleave(__m512i a, __m512i b) {
  const auto even = emulated::Words::of(a), odd = emulated::Words::of(b);
  emulated::Words result;
  for (int i = 0; i < 16; ++i) {
    const int from = i / 4 * 8 + kFirst + i % 4;
    result.at[2 * i] = even.at[from];
    result.at[2 * i + 1] = odd.at[from];
  }
  return result.as<__m512i>();
}
inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return interleave<0>(a, b); }
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return interleave<4>(a, b); }

// ---- AVX512_BF16

inline __m256i _mm512_cvtneps_pbh(__m512 v) {
  const auto lanes = emulated::Floats::of(v);
  emulated::HalfWords result;
  std::transform(lanes.at, lanes.at + 16, result.at, emulated::rounded);
  return result.as<__m256i>();
}
inline __m512i _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  const auto a = emulated::Floats::of(low), b = emulated::Floats::of(high);
  emulated::Words result;
  std::transform(a.at, a.at + 16, result.at, emulated::rounded);
  std::transform(b.at, b.at + 16, result.at + 16, emulated::rounded);
  return result.as<__m512i>();
}
inline __m512 dot_add(__m512 sums, __m512i left, __m512i right) {
  auto lanes = emulated::Floats::of(sums);
  const auto a = emulated::Words::of(left), b = emulated::Words::of(right);
  for (int i = 0; i < 16; ++i) lanes.at[i] = emulated::dot(lanes.at[i], a.at + 2 * i, b.at + 2 * i);
  return lanes.as<__m512>();
}

// ---- AMX

namespace emulated {
struct Tile {
  char bytes[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local int tile_rows[8];  // 0: not configured
inline void require(bool allowed) {
  if (!allowed) std::abort();
}
}  // namespace emulated

constexpr int kShort = 5;
class Tiles {
 public:
  explicit Tiles(int64_t ranks = kTileRows) {
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_short = ranks % kTileRows != 0 && tile >= kShort;
      emulated::tile_rows[tile] = int(is_short ? ranks % kTileRows : kTileRows);
    }
  }
  ~Tiles() { std::fill_n(emulated::tile_rows, 8, 0); }
  Tiles(const Tiles&) = delete;
};

template <int tile>
void load_tile(const void* rows, int64_t stride_bytes) {
  emulated::require(emulated::tile_rows[tile] > 0);
  emulated::tiles[tile] = {};
  for (int i = 0; i < emulated::tile_rows[tile]; ++i) {
    std::memcpy(emulated::tiles[tile].bytes[i], static_cast<const char*>(rows) + i * stride_bytes, 64);
  }
}
template <int tile>
void store_tile(void* rows, int64_t stride_bytes) {
  emulated::require(emulated::tile_rows[tile] > 0);
  for (int i = 0; i < emulated::tile_rows[tile]; ++i) {
    std::memcpy(static_cast<char*>(rows) + i * stride_bytes, emulated::tiles[tile].bytes[i], 64);
  }
}
template <int sum>
void begin_sum(const float* rows, int64_t stride_bytes, bool zero) {
  emulated::require(emulated::tile_rows[sum] > 0);
  if (zero) {
    emulated::tiles[sum] = {};
  } else {
    load_tile<sum>(rows, stride_bytes);
  }
}
template <int sum, int left, int right>
void multiply_add() {
  const int* rows = emulated::tile_rows;
  emulated::require(rows[sum] == rows[left] && rows[right] == kTileRows);
  for (int i = 0; i < emulated::tile_rows[sum]; ++i) {
    const auto line = emulated::Words::of(emulated::tiles[left].bytes[i]);
    __m512 sums = _mm512_loadu_ps(emulated::tiles[sum].bytes[i]);
    for (int p = 0; p < emulated::tile_rows[right]; ++p) {
      sums = dot_add(sums, _mm512_set1_epi32(bit_cast<int>(line.at[2 * p] | uint32_t(line.at[2 * p + 1]) << 16)),
                     _mm512_loadu_si512(emulated::tiles[right].bytes[p]));
    }
    _mm512_storeu_ps(emulated::tiles[sum].bytes[i], sums);
  }
}

}  // namespace align::cpu
