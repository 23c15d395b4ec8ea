// Vectors of bfloat16: loading, rounding, transposing and masking. Only for functions with BF16_TARGET.
#pragma once

#include "cpu/bf16/instructions.h"

#ifdef ALIGN_BF16_UNITS

#include <utility>

#include "cpu/tiles.h"

namespace align::cpu {

// A mask of the first count of 32 lanes, empty if count is negative.
BF16_INLINE __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0; }

// a becomes the lanes of a and b whose index has bit d clear, b those whose index has it set; in pairs, a before b.
template <int d, int... lane>
BF16_INLINE void exchange(__m512i& a, __m512i& b, std::integer_sequence<int, lane...>) {
  const auto x = (__v16si)a, y = (__v16si)b;
  a = (__m512i)__builtin_shufflevector(x, y, (lane & d ? 16 + lane - d : lane)...);
  b = (__m512i)__builtin_shufflevector(x, y, (lane & d ? 16 + lane : lane + d)...);
}
template <int d>
BF16_INLINE void exchange_all(__m512i (&rows)[kTileRows]) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    if (!(i & d)) exchange<d>(rows[i], rows[i + d], std::make_integer_sequence<int, kTileRows>{});
  }
}

// Transposes 16 x 16 lanes of 32 bits.
BF16_INLINE void transpose(__m512i (&rows)[kTileRows]) {
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  exchange_all<4>(rows);
  exchange_all<8>(rows);
}

// Two neighbours in each lane.
BF16_INLINE __m512i both_of(const bfloat16* neighbours) {
  int32_t bits;
  __builtin_memcpy(&bits, neighbours, sizeof bits);
  return _mm512_set1_epi32(bits);
}

// Rounds both to bfloat16, side by side in each lane.
BF16_INLINE __m512i rounded_pairs(__m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Loads 32 floats, only those of `lanes`, and rounds them, times scale, to bfloat16.
BF16_INLINE __m512i rounded_line(const float* source, __mmask32 lanes, float scale) {
  const __m512 low = _mm512_maskz_loadu_ps(__mmask16(lanes), source);
  const __m512 high = _mm512_maskz_loadu_ps(__mmask16(lanes >> 16), source + kTileRows);
  return (__m512i)_mm512_cvtne2ps_pbh(scale * high, scale * low);
}

// Rounds the transpose of g, as left tiles [rank padded to 16][kRowBlock].
BF16_INLINE void round_transpose(const RowMajor<const float>& g, int64_t rank, int64_t count, bfloat16* factors) {
  for (int64_t j = 0; j < rank; j += kTileRows) {
    const __mmask16 lanes = __mmask16(first_lanes(rank - j));
    for (int64_t t = 0; t < kRowBlock; t += 2 * kTileRows) {
      __m512i pairs[kTileRows];
      for (int64_t k = 0; k < kTileRows; ++k) {
        const int64_t even = t + 2 * k, odd = even + 1;
        pairs[k] = rounded_pairs(_mm512_maskz_loadu_ps(even < count ? lanes : 0, g.row(even) + j),
                                 _mm512_maskz_loadu_ps(odd < count ? lanes : 0, g.row(odd) + j));
      }
      transpose(pairs);
      for (int64_t k = 0; k < kTileRows; ++k) _mm512_storeu_si512(factors + (j + k) * kRowBlock + t, pairs[k]);
    }
  }
}

// A mask of the 32 columns from c on: a bit is set if its column is kept.
BF16_INLINE __mmask32 kept_lanes(const MaskRow& row, int64_t c) {
  uint64_t window;
  __builtin_memcpy(&window, row.bytes + c / 8, sizeof window);
  return __mmask32(window >> row.shift);
}

}  // namespace align::cpu

#endif
