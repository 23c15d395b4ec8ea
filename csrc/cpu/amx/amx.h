// The products of skinny.h for bfloat16 on AMX, if the processor has it. A tile has 16 rows of 64 bytes. A product of
// 16 x 32 by 32 x 16 elements takes 16 cycles, an eighth of the time of the widest vectors.
//
// Both factors are bfloat16, so the latent rows (g, u and their gradients) are rounded to it, as on CUDA; sums are
// float32. Adapters are packed once for a projection. A right tile holds pairs of its rows side by side: row p of the
// tile is rows 2p and 2p + 1 of column 0, then of column 1, and so on.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/skinny.h"
#include "ops/dtype.h"

namespace align::cpu {

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define ALIGN_AMX 1
constexpr bool kAmxExists = true;
#else
constexpr bool kAmxExists = false;
#endif

inline bool amx_allowed = true;  // tests forbid it, to reach the vectors on a machine that has both

// Whether this processor has AMX, the system lets this process use it, and ONEDNN_MAX_CPU_ISA, which limits what
// torch's own products use, does not exclude it. False on other architectures.
bool amx_usable();

// Whether AMX has products of T, and whether to use them.
template <typename T>
constexpr bool kForAmx = kAmxExists && std::is_same_v<T, bfloat16>;
template <typename T>
bool use_amx() {
  return kForAmx<T> && amx_allowed && amx_usable();
}

constexpr int64_t kAmxRows = 16;     // rows of a tile
constexpr int64_t kAmxColumns = 32;  // bfloat16 elements of a row of a tile
constexpr int64_t kAmxTile = kAmxRows * kAmxColumns;

// The elements of a matrix [rank, columns] as right tiles. Dot tiles, for rows_dot and dot_outer, are [columns / 32]
// [rank / 16] tiles of its transpose; add tiles, for rank_add, are [columns / 16][rank / 32] tiles of the matrix
// itself.
constexpr int64_t dot_tiles(int64_t rank, int64_t columns) {
  return ceil_div(columns, kAmxColumns) * ceil_div(rank, kAmxRows) * kAmxTile;
}
constexpr int64_t add_tiles(int64_t rank, int64_t columns) {
  return ceil_div(columns, kAmxRows) * ceil_div(rank, kAmxColumns) * kAmxTile;
}
// The elements of the left tiles of the latent rows of a block.
constexpr int64_t factor_tiles(int64_t rank) { return kRowBlock * round_up(rank, kAmxColumns); }

// Packs columns [first, last) of a matrix. Both are multiples of 32, or last is the end of the matrix.
void pack_dot_tiles(RowMajor<const float> matrix, int64_t rank, int64_t first, int64_t last, bfloat16* tiles);
void pack_add_tiles(RowMajor<const float> matrix, int64_t rank, int64_t first, int64_t last, bfloat16* tiles);

void amx_rows_dot(const RowsDot<bfloat16>& op);
void amx_rank_add(const RankAdd<bfloat16>& op);
void amx_outer_add(const OuterAdd<bfloat16>& op);
void amx_dot_outer(const DotOuter<bfloat16>& op);

}  // namespace align::cpu
