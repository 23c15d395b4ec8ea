// rank_add on AMX, which computes pieces of 16 rows and 64 columns.
#include "cpu/bf16/rank_add.h"

#ifdef ALIGN_BF16_UNITS

namespace align::cpu {
namespace {

constexpr int64_t kPanel = 128;  // columns whose right tiles stay in the first-level cache for all rows of a block

// Term k of a piece of 16 rows from t on and 64 columns from c on, and the left tiles of the term.
struct Piece {
  int64_t t, c, k;
  const bfloat16* factors;

  // Goes to the next term; after the last term to the next columns of the panel; after these to the next rows; after
  // the last rows to the next panel, whose right tiles stay in the first-level cache for all rows.
  BF16_INLINE void advance(const RankAdd<bfloat16>& op) {
    factors += factor_tiles(op.terms[k].rank);
    if (++k < op.count) return;
    k = 0;
    factors = op.factors;
    c += kAddColumns;
    if (c % kPanel != 0 && c < op.out.columns) return;
    const int64_t panel = (c - 1) / kPanel * kPanel;
    t += kTileRows;
    if (t < op.rows.count) {
      c = panel;
    } else if (panel + kPanel < op.out.columns) {
      t = 0;
    }
  }
};

template <int sum>
BF16_INLINE void multiply_column(const bfloat16* right) {
  load_tile<5>(right, 64);
  multiply_add<sum, 4, 5>();
}

// Computes the products of a piece, without tiles that have no columns.
BF16_INLINE void multiply(const RankAdd<bfloat16>& op, const Piece& piece) {
  const RankTerm<float>& term = op.terms[piece.k];
  const int64_t columns = op.out.columns - piece.c;
  const int64_t steps = ceil_div(term.rank, kTileLine), stride = steps * kTileLine * sizeof(bfloat16);
  const bfloat16* right = term.tiles + piece.c / kTileRows * steps * kTileSize;
  begin_sum<0>(nullptr, 0, true);
  begin_sum<1>(nullptr, 0, true);
  begin_sum<2>(nullptr, 0, true);
  begin_sum<3>(nullptr, 0, true);
  for (int64_t step = 0; step < steps; ++step, right += kTileSize) {
    load_tile<4>(piece.factors + (piece.t * steps + step) * kTileLine, stride);
    multiply_column<0>(right);
    if (columns > kTileRows) multiply_column<1>(right + steps * kTileSize);
    if (columns > 2 * kTileRows) multiply_column<2>(right + 2 * steps * kTileSize);
    if (columns > 3 * kTileRows) multiply_column<3>(right + 3 * steps * kTileSize);
  }
}

// Stores the products of a piece, [16][64].
BF16_INLINE void store_products(float* sums) {
  constexpr int64_t kStride = kAddColumns * sizeof(float);
  store_tile<0>(sums, kStride);
  store_tile<1>(sums + kTileRows, kStride);
  store_tile<2>(sums + 2 * kTileRows, kStride);
  store_tile<3>(sums + 3 * kTileRows, kStride);
}

// Adds the products of a piece to those of the terms before.
template <bool kMasked, bool kWhole>
BF16_INLINE void add_piece(const Addition<kMasked>& add, const Piece& piece, const float* sums, float* further) {
  const auto& [t, first, k, factors] = piece;
  const int64_t rows = std::min(kTileRows, add.op.rows.count - t);
  const int64_t columns = kWhole ? kAddColumns : std::min(kAddColumns, add.op.out.columns - first);
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int64_t line = 0; line < columns; line += kTileLine) {
      const int64_t offset = i * kAddColumns + line;
      const __mmask32 lanes = kWhole ? ~0u : first_lanes(columns - line);
      Pair v = kept_products(add, k, t + i, first + line, load_sums(sums + offset));
      if (k > 0) v = plus(v, load_sums(further + offset));
      if (k + 1 < add.op.count) {
        store_sums(v, further + offset);
        continue;
      }
      if (add.op.in) prefetch(add.in.ahead[t + i] + first + line);
      write_line<kMasked, kWhole>(add, t + i, first + line, lanes, v);
    }
  }
}

template <bool kMasked>
BF16_TARGET void rank_add_pieces(const RankAdd<bfloat16>& op, const RowMasks<kMasked>* masks) {
  const Addition<kMasked> add(op, masks, kTileRows);
  round_all_factors(op);
  const Tiles tiles;
  alignas(64) float sums[kTileRows * kAddColumns], further[kTileRows * kAddColumns];
  if (op.rows.count == 0 || op.out.columns == 0) return;
  // The tiles multiply one piece while the vectors add up the piece before, whose products have been stored.
  Piece next{0, 0, 0, op.factors};
  multiply(op, next);
  while (next.t < op.rows.count) {
    const Piece now = next;
    store_products(sums);
    next.advance(op);
    if (next.t < op.rows.count) multiply(op, next);
    if (now.c + kAddColumns <= op.out.columns) {
      add_piece<kMasked, true>(add, now, sums, further);
    } else {
      add_piece<kMasked, false>(add, now, sums, further);
    }
  }
}

}  // namespace

void amx_rank_add(const RankAdd<bfloat16>& op) {
  with_masks(op, [&](const auto* masks) { rank_add_pieces(op, masks); });
}

}  // namespace align::cpu

#endif
