// Which unit the processor has, and the packing of adapters for it.
#include "cpu/bf16/units.h"
#include "cpu/bf16/vectors.h"

namespace align::cpu {

Bf16Unit native_bf16_unit() {
#ifdef ALIGN_BF16_UNITS
  static const Bf16Unit unit = find_bf16_unit();
  return unit;
#else
  return Bf16Unit::kNone;
#endif
}

#ifdef ALIGN_BF16_UNITS

namespace {

// The rows themselves, for dot products.
BF16_TARGET void pack_lines(RowMajor<const float> matrix, int64_t rank, int64_t columns, int64_t first, int64_t last,
                            bfloat16* lines) {
  for (int64_t j = 0; j < round_up(rank, kRankAlign); ++j, lines += round_up(columns, kTileLine)) {
    for (int64_t c = first; c < last; c += kTileLine) {
      const __mmask32 lanes = j < rank ? first_lanes(last - c) : 0;
      _mm512_storeu_si512(lines + c, rounded_line(matrix.row(j) + c, lanes, 1));
    }
  }
}

BF16_TARGET void pack_transposed_tiles(RowMajor<const float> matrix, int64_t rank, int64_t first, int64_t last,
                                       bfloat16* tiles) {
  const int64_t ranks = round_up(rank, kTileRows);
  bfloat16* tile = tiles + first / kTileLine * ranks * kTileLine;
  for (int64_t c = first; c < last; c += kTileLine) {
    for (int64_t j = 0; j < ranks; j += kTileRows, tile += kTileSize) {
      __m512i rows[kTileRows];
      for (int64_t k = 0; k < kTileRows; ++k) {
        rows[k] = rounded_line(matrix.row(j + k) + c, j + k < rank ? first_lanes(last - c) : 0, 1);
      }
      transpose(rows);
      for (int64_t k = 0; k < kTileRows; ++k) _mm512_storeu_si512(tile + k * kTileLine, rows[k]);
    }
  }
}

}  // namespace

void pack_dot_tiles(RowMajor<const float> matrix, int64_t rank, int64_t columns, int64_t first, int64_t last,
                    bfloat16* tiles) {
  if (unit_for<bfloat16>() == Bf16Unit::kDots) return pack_lines(matrix, rank, columns, first, last, tiles);
  pack_transposed_tiles(matrix, rank, first, last, tiles);
}

BF16_TARGET void pack_add_tiles(RowMajor<const float> matrix, int64_t rank, int64_t first, int64_t last,
                                bfloat16* tiles) {
  const int64_t ranks = round_up(rank, kTileLine);
  bfloat16* row = tiles + first / kTileRows * ranks * kTileRows;
  for (int64_t c = first; c < last; c += kTileRows) {
    const __mmask16 lanes = __mmask16(first_lanes(last - c));
    for (int64_t j = 0; j < ranks; j += 2, row += kTileLine) {
      const __m512 even = _mm512_maskz_loadu_ps(j < rank ? lanes : 0, matrix.row(j) + c);
      const __m512 odd = _mm512_maskz_loadu_ps(j + 1 < rank ? lanes : 0, matrix.row(j + 1) + c);
      _mm512_storeu_si512(row, rounded_pairs(even, odd));
    }
  }
}

#endif

}  // namespace align::cpu
