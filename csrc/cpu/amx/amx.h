// The products of skinny.h for bfloat16 on AMX, where the processor has it: tiles of 16 rows of 64 bytes, whose product
// of 16 x 32 by 32 x 16 elements takes 16 cycles, eight times as fast as the widest vectors.
//
// Both factors are bfloat16, so the latent rows (g, u, their gradients) are rounded to it, as on CUDA; sums are
// float32. Small operands are packed once, when a projection is prepared. A tile that stands on the right holds pairs
// of its rows side by side: row p of the tile is (row 2p, row 2p + 1) of column 0, of column 1, and so on.
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

// Whether there are products of T for AMX, and whether they are to be used.
template <typename T>
constexpr bool kForAmx = kAmxExists && std::is_same_v<T, bfloat16>;
template <typename T>
bool use_amx() {
  return kForAmx<T> && amx_allowed && amx_usable();
}

constexpr int64_t kAmxRows = 16;     // of a tile
constexpr int64_t kAmxColumns = 32;  // bfloat16 of a row of a tile
constexpr int64_t kAmxTile = kAmxRows * kAmxColumns;

// Elements of a small matrix [rank, columns] as right tiles: of its transpose, [columns / 32][rank / 16] tiles, for
// rows_dot and dot_outer; of itself, [columns / 16][rank / 32], for rank_add.
constexpr int64_t dot_tiles(int64_t rank, int64_t columns) {
  return ceil_div(columns, kAmxColumns) * ceil_div(rank, kAmxRows) * kAmxTile;
}
constexpr int64_t add_tiles(int64_t rank, int64_t columns) {
  return ceil_div(columns, kAmxRows) * ceil_div(rank, kAmxColumns) * kAmxTile;
}
// Elements of the left tiles of a block's latent rows.
constexpr int64_t factor_tiles(int64_t rank) { return kRowBlock * round_up(rank, kAmxColumns); }

// Columns [first, last) of it, both multiples of 32 or last its end.
void pack_dot_tiles(Small<const float> small, int64_t rank, int64_t first, int64_t last, bfloat16* tiles);
void pack_add_tiles(Small<const float> small, int64_t rank, int64_t first, int64_t last, bfloat16* tiles);

void amx_rows_dot(const RowsDot<bfloat16>& op);
void amx_rank_add(const RankAdd<bfloat16>& op);
void amx_outer_add(const OuterAdd<bfloat16>& op);
void amx_dot_outer(const DotOuter<bfloat16>& op);

}  // namespace align::cpu
