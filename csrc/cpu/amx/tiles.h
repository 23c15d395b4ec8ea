// The instructions of AMX, and vector functions that load, round and transpose. Only for functions with AMX_TARGET.
#pragma once

#include "cpu/amx/amx.h"

#ifdef ALIGN_AMX

#include <immintrin.h>
#include <utility>

#include "cpu/tiles.h"

// An inlined function must be compiled for the same instructions as its caller. The compiler need not know AMX: only
// the assembler below uses it.
#define AMX_LEVEL "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,bmi2,fma"
#define AMX_TARGET __attribute__((target(AMX_LEVEL)))
#define AMX_INLINE inline __attribute__((always_inline, target(AMX_LEVEL)))

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own intrinsics

namespace align::cpu {

// ---- Instructions: the tiles are named by numbers

template <int tile>
AMX_INLINE void load_tile(const void* rows, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride_bytes), "i"(tile) : "memory");
}
template <int tile>
AMX_INLINE void store_tile(void* rows, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride_bytes), "i"(tile) : "memory");
}
// sum = 0, or the sums in memory
template <int sum>
AMX_INLINE void begin_sum(const float* rows, int64_t stride_bytes, bool zero) {
  if (zero) {
    asm volatile("tilezero %%tmm%c0" : : "i"(sum));
  } else {
    load_tile<sum>(rows, stride_bytes);
  }
}
// sum += left right
template <int sum, int left, int right>
AMX_INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
}

// Configures the tiles of this thread until the end of the scope. Tiles have 16 rows; those from kShort on have the
// rows of the last ranks % 16 ranks.
constexpr int kShort = 5;
class Tiles {
 public:
  AMX_INLINE explicit Tiles(int64_t ranks = kAmxRows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      const bool is_short = ranks % kAmxRows != 0 && tile >= kShort;
      config.rows[tile] = uint8_t(is_short ? ranks % kAmxRows : kAmxRows);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  AMX_INLINE ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
};

// ---- Vectors

// A mask of the first count of 32 lanes, empty if count is negative.
AMX_INLINE __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0; }

// a becomes the lanes of a and b whose index has bit d clear, b those whose index has it set; in pairs, a before b.
template <int d, int... lane>
AMX_INLINE void exchange(__m512i& a, __m512i& b, std::integer_sequence<int, lane...>) {
  const auto x = (__v16si)a, y = (__v16si)b;
  a = (__m512i)__builtin_shufflevector(x, y, (lane & d ? 16 + lane - d : lane)...);
  b = (__m512i)__builtin_shufflevector(x, y, (lane & d ? 16 + lane : lane + d)...);
}
template <int d>
AMX_INLINE void exchange_all(__m512i (&rows)[kAmxRows]) {
#pragma GCC unroll 16
  for (int i = 0; i < kAmxRows; ++i) {
    if (!(i & d)) exchange<d>(rows[i], rows[i + d], std::make_integer_sequence<int, kAmxRows>{});
  }
}

// Transposes 16 x 16 lanes of 32 bits.
AMX_INLINE void transpose(__m512i (&rows)[kAmxRows]) {
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  exchange_all<4>(rows);
  exchange_all<8>(rows);
}

// Rounds both to bfloat16, side by side in each lane.
AMX_INLINE __m512i rounded_pairs(__m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Loads 32 floats, only those of `lanes`, and rounds them, times scale, to bfloat16.
AMX_INLINE __m512i rounded_line(const float* source, __mmask32 lanes, float scale) {
  const __m512 low = _mm512_maskz_loadu_ps(__mmask16(lanes), source);
  const __m512 high = _mm512_maskz_loadu_ps(__mmask16(lanes >> 16), source + kAmxRows);
  return (__m512i)_mm512_cvtne2ps_pbh(scale * high, scale * low);
}

// A mask of the 32 columns from c on: a bit is set if its column is kept.
AMX_INLINE __mmask32 kept_lanes(const MaskRow& row, int64_t c) {
  uint64_t window;
  __builtin_memcpy(&window, row.bytes + c / 8, sizeof window);
  return __mmask32(window >> row.shift);
}

}  // namespace align::cpu

#endif
