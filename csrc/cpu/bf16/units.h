// The products of skinny.h for bfloat16 on the units of a processor that multiply it, if it has one: the tiles of AMX,
// or the dot products of AVX512_BF16. A tile has 16 rows of 64 bytes; a product of 16 x 32 by 32 x 16 elements takes
// AMX 16 cycles, an eighth of the time of the widest vectors. A dot product adds two products to each of 16 sums, where
// a vector instruction of float32 adds one, and takes its operands as they lie in memory.
//
// Both factors are bfloat16, so the latent rows (g, u and their gradients) are rounded to it, as on CUDA; sums are
// float32, and subnormal numbers count as zero. Adapters are packed once for a projection. A right tile holds pairs of
// its rows side by side: row p of the tile is rows 2p and 2p + 1 of column 0, then of column 1, and so on.
//
// A processor with AVX10 reports the same dot products. AVX-NE-CONVERT, where there is no AVX-512, converts and
// multiplies nothing: its processors take the vectors of skinny.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/skinny.h"
#include "ops/dtype.h"

namespace align::cpu {

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define ALIGN_BF16_UNITS 1
constexpr bool kBf16Units = true;
#else
constexpr bool kBf16Units = false;
#endif

enum class Bf16Unit { kNone, kDots, kAmx };  // a processor that has one has those before it

inline Bf16Unit bf16_unit_limit = Bf16Unit::kAmx;  // tests lower it, to reach the others on a machine that has several

// The last unit that this processor has, that the system lets this process use, and that ONEDNN_MAX_CPU_ISA, which
// limits what torch's own products use, does not exclude. kNone on other architectures.
Bf16Unit native_bf16_unit();

// Whether there are units for T, and which one to use.
template <typename T>
constexpr bool kForUnits = kBf16Units && std::is_same_v<T, bfloat16>;
template <typename T>
Bf16Unit unit_for() {
  return kForUnits<T> ? std::min(bf16_unit_limit, native_bf16_unit()) : Bf16Unit::kNone;
}

constexpr int64_t kTileRows = 16;  // rows of a tile
constexpr int64_t kTileLine = 32;  // bfloat16 elements of a row of a tile, and of a vector
constexpr int64_t kTileSize = kTileRows * kTileLine;

// The elements of a packed matrix [rank, columns]. For rows_dot and dot_outer AMX takes [columns / 32][rank / 16] tiles
// of its transpose, and dot products take its rows, padded with zeros. For rank_add both take [columns / 16][rank / 32]
// tiles of the matrix itself.
constexpr int64_t dot_tiles(int64_t rank, int64_t columns) {
  return ceil_div(columns, kTileLine) * ceil_div(rank, kTileRows) * kTileSize;
}
constexpr int64_t add_tiles(int64_t rank, int64_t columns) {
  return ceil_div(columns, kTileRows) * ceil_div(rank, kTileLine) * kTileSize;
}
// The elements of the left tiles of the latent rows of a block.
constexpr int64_t factor_tiles(int64_t rank) { return kRowBlock * round_up(rank, kTileLine); }

// Packs columns [first, last) of a matrix [rank, columns]. Both are multiples of 32, or last is the end of the matrix.
void pack_dot_tiles(RowMajor<const float> matrix, int64_t rank, int64_t columns, int64_t first, int64_t last,
                    bfloat16* tiles);
void pack_add_tiles(RowMajor<const float> matrix, int64_t rank, int64_t first, int64_t last, bfloat16* tiles);

void amx_rows_dot(const RowsDot<bfloat16>& op);
void amx_rank_add(const RankAdd<bfloat16>& op);
void amx_outer_add(const OuterAdd<bfloat16>& op);
void amx_dot_outer(const DotOuter<bfloat16>& op);

void dots_rows_dot(const RowsDot<bfloat16>& op);
void dots_rank_add(const RankAdd<bfloat16>& op);
void dots_outer_add(const OuterAdd<bfloat16>& op);
void dots_dot_outer(const DotOuter<bfloat16>& op);

// On the unit in use.
inline void unit_rows_dot(const RowsDot<bfloat16>& op) {
  unit_for<bfloat16>() == Bf16Unit::kAmx ? amx_rows_dot(op) : dots_rows_dot(op);
}
inline void unit_rank_add(const RankAdd<bfloat16>& op) {
  unit_for<bfloat16>() == Bf16Unit::kAmx ? amx_rank_add(op) : dots_rank_add(op);
}
inline void unit_outer_add(const OuterAdd<bfloat16>& op) {
  unit_for<bfloat16>() == Bf16Unit::kAmx ? amx_outer_add(op) : dots_outer_add(op);
}
inline void unit_dot_outer(const DotOuter<bfloat16>& op) {
  unit_for<bfloat16>() == Bf16Unit::kAmx ? amx_dot_outer(op) : dots_dot_outer(op);
}

}  // namespace align::cpu
