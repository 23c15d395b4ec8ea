// rows_dot, outer_add and dot_outer on AMX. Panels of 64 rows and 64 columns of a block of rows are copied to the
// first-level cache, as left tiles for rows_dot and as right tiles for outer_add. The copy sets dropped elements to
// zero.
#include <algorithm>

#include "cpu/bf16/vectors.h"

#ifdef ALIGN_BF16_UNITS

namespace align::cpu {
namespace {

constexpr int64_t kPanel = 64;                       // columns of a panel
constexpr int64_t kSteps = kRowBlock / kTileLine;    // right tiles for the rows of a block
constexpr int64_t kPanelTiles = kPanel / kTileLine;  // left tiles for the columns of a panel

// A panel as left tiles [kRowBlock][kPanel] and as right tiles [kPanel / 16][kSteps].
struct Panel {
  alignas(64) bfloat16 left[kRowBlock * kPanel];
  alignas(64) bfloat16 right[kRowBlock * kPanel];

  BF16_INLINE const bfloat16* right_tile(int64_t column_tile, int64_t step) const {
    return right + (column_tile * kSteps + step) * kTileSize;
  }
};

// Stores 32 columns of two rows as one row of each of two right tiles.
BF16_INLINE void store_pair(__m512i even, __m512i odd, bfloat16* right) {
  // Groups of four columns alternate between the first and the last 16 columns, so that unpacking separates these.
  const __m512i a = (__m512i)__builtin_shufflevector((__v8di)even, (__v8di)even, 0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i b = (__m512i)__builtin_shufflevector((__v8di)odd, (__v8di)odd, 0, 4, 1, 5, 2, 6, 3, 7);
  _mm512_store_si512(right, _mm512_unpacklo_epi16(a, b));
  _mm512_store_si512(right + kSteps * kTileSize, _mm512_unpackhi_epi16(a, b));
}

// Copies kLines lines of columns from c on of rows i and i + 1 to the left and right tiles. Without kWhole only count
// rows and width columns exist.
template <bool kMasked, bool kLeft, bool kRight, bool kWhole, int kLines>
BF16_INLINE void fill_lines(const RowPointers<const bfloat16>& x, const RowMasks<kMasked>& masks, int64_t i,
                            int64_t count, int64_t c, int64_t width, bfloat16* left, bfloat16* right) {
#pragma GCC unroll 4
  for (int64_t line = 0; line < kLines; ++line, c += kTileLine) {
    __m512i pair[2];
#pragma GCC unroll 2
    for (int64_t k = 0; k < 2; ++k) {
      if (kWhole && !kMasked) {
        pair[k] = _mm512_loadu_si512(x.at[i + k] + c);
      } else {
        __mmask32 lanes = kWhole ? ~0u : i + k < count ? first_lanes(width) : 0;
        if constexpr (kMasked) lanes &= kept_lanes(masks.at[i + k], c);
        pair[k] = _mm512_maskz_loadu_epi16(lanes, x.at[i + k] + c);
      }
      if (kLeft) _mm512_store_si512(left + k * kPanel + line * kTileLine, pair[k]);
    }
    if (kRight) store_pair(pair[0], pair[1], right + line * (kTileLine / kTileRows) * kSteps * kTileSize);
  }
}

// Fills a panel with columns first .. first + width - 1 of count rows. The rest of the tiles is zero.
template <bool kMasked, bool kLeft, bool kRight>
BF16_INLINE void fill(Panel& panel, const RowPointers<const bfloat16>& x, const RowMasks<kMasked>& masks, int64_t count,
                      int64_t first, int64_t width) {
  const bool whole = count == kRowBlock && width == kPanel;
  for (int64_t i = 0; i < round_up(count, kTileLine); i += 2) {
    bfloat16* left = panel.left + i * kPanel;
    bfloat16* right = panel.right + i / kTileLine * kTileSize + i % kTileLine / 2 * kTileLine;
    if (whole) {
      fill_lines<kMasked, kLeft, kRight, true, kPanelTiles>(x, masks, i, count, first, width, left, right);
      continue;
    }
    for (int64_t c = 0; c < width; c += kTileLine) {
      fill_lines<kMasked, kLeft, kRight, false, 1>(x, masks, i, count, first + c, width - c, left + c,
                                                   right + c / kTileRows * kSteps * kTileSize);
    }
  }
}

// The panel to prefetch while one is in use: the next panel of the same rows, or the first panel of the next rows.
struct NextPanel {
  const bfloat16* const* rows;
  int64_t first;

  NextPanel(const RowPointers<const bfloat16>& x, int64_t first_of_this, int64_t columns)
      : rows(first_of_this + kPanel < columns ? x.at : x.ahead),
        first(first_of_this + kPanel < columns ? first_of_this + kPanel : 0) {}

  // Prefetches a line of columns of 32 rows.
  BF16_INLINE void prefetch_line(int64_t row, int64_t line) const {
    for (int64_t i = row; i < row + kTileLine; ++i) prefetch(rows[i] + first + line * kTileLine);
  }
};

// ---- rows_dot

// Adds the products of a panel with the right tiles at `tiles` to out.
BF16_INLINE void add_dots(const Panel& panel, const NextPanel& next, int64_t count, int64_t width,
                          const bfloat16* tiles, int64_t rank_tiles, const RowMajor<float>& out, bool first) {
  constexpr int64_t kLeftStride = kPanel * sizeof(bfloat16);
  const int64_t lines = ceil_div(width, kTileLine), stride = out.stride * sizeof(float);
  for (int64_t t = 0; t < count; t += 2 * kTileRows) {
    for (int64_t j = 0; j < rank_tiles; ++j) {
      float *upper = out.row(t) + j * kTileRows, *lower = out.row(t + kTileRows) + j * kTileRows;
      begin_sum<0>(upper, stride, first);
      begin_sum<1>(lower, stride, first);
      for (int64_t k = 0; k < lines; ++k) {
        const bfloat16* left = panel.left + t * kPanel + k * kTileLine;
        load_tile<2>(tiles + (k * rank_tiles + j) * kTileSize, 64);
        load_tile<3>(left, kLeftStride);
        multiply_add<0, 3, 2>();
        load_tile<4>(left + kTileRows * kPanel, kLeftStride);
        multiply_add<1, 4, 2>();
        if (j == 0) next.prefetch_line(t, k);
      }
      store_tile<0>(upper, stride);
      store_tile<1>(lower, stride);
    }
  }
}

template <bool kMasked>
BF16_TARGET void rows_dot_panels(const RowsDot<bfloat16>& op) {
  const RowPointers<const bfloat16> x(op.rows, op.x, kFar);
  const RowMasks<kMasked> masks(op.rows, op.mask);
  const int64_t rank_tiles = ceil_div(op.rank, kTileRows);
  const Tiles tiles;
  Panel panel;
  int64_t first = 0;
  do {  // once even without columns: sums of nothing are zero
    const int64_t width = std::min(kPanel, op.x.columns - first);
    fill<kMasked, true, false>(panel, x, masks, op.rows.count, first, width);
    add_dots(panel, NextPanel(x, first, op.x.columns), op.rows.count, width,
             op.tiles + first / kTileLine * rank_tiles * kTileSize, rank_tiles, op.out, first == 0);
  } while ((first += kPanel) < op.x.columns);
}

// ---- outer_add

// Adds the products of 16 ranks, or of the last ranks, with one or two tiles of columns to outer.
template <int left, int sum, int other_sum>
BF16_INLINE void add_outer_tiles(const bfloat16* factors, int64_t steps, const bfloat16* right, bool both, float* outer,
                                 int64_t stride, bool assign) {
  begin_sum<sum>(outer, stride, assign);
  if (both) begin_sum<other_sum>(outer + kTileRows, stride, assign);
  for (int64_t step = 0; step < steps; ++step) {
    load_tile<left>(factors + step * kTileLine, kRowBlock * sizeof(bfloat16));
    load_tile<2>(right + step * kTileSize, 64);
    multiply_add<sum, left, 2>();
    if (!both) continue;
    load_tile<3>(right + (kSteps + step) * kTileSize, 64);
    multiply_add<other_sum, left, 3>();
  }
  store_tile<sum>(outer, stride);
  if (both) store_tile<other_sum>(outer + kTileRows, stride);
}

// Adds factors times the panel to the columns of outer from first on.
BF16_INLINE void add_outer(const Panel& panel, int64_t count, int64_t first, int64_t width, const bfloat16* factors,
                           int64_t rank, const RowMajor<float>& outer, bool assign) {
  const int64_t steps = ceil_div(count, kTileLine), stride = outer.stride * sizeof(float);
  for (int64_t c = 0; c < width; c += 2 * kTileRows) {
    const bfloat16* right = panel.right_tile(c / kTileRows, 0);
    const bool both = width - c > kTileRows;
    int64_t j = 0;
    for (; j + kTileRows <= rank; j += kTileRows) {
      add_outer_tiles<4, 0, 1>(factors + j * kRowBlock, steps, right, both, outer.row(j) + first + c, stride, assign);
    }
    if (j == rank) continue;
    add_outer_tiles<kShort, kShort + 1, kShort + 2>(factors + j * kRowBlock, steps, right, both,
                                                    outer.row(j) + first + c, stride, assign);
  }
}

template <bool kMasked>
BF16_TARGET void outer_add_panels(const OuterAdd<bfloat16>& op) {
  const RowPointers<const bfloat16> x(op.rows, op.x, kFar);
  const RowMasks<kMasked> masks(op.rows, op.mask);
  round_transpose(op.g, op.rank, op.rows.count, op.factors);
  const Tiles tiles(op.rank);
  Panel panel;
  for (int64_t first = 0; first < op.x.columns; first += kPanel) {
    const int64_t width = std::min(kPanel, op.x.columns - first);
    fill<kMasked, false, true>(panel, x, masks, op.rows.count, first, width);
    const NextPanel next(x, first, op.x.columns);
    for (int64_t line = 0; line < kPanelTiles; ++line) {
      for (int64_t row = 0; row < kRowBlock; row += kTileLine) next.prefetch_line(row, line);
    }
    add_outer(panel, op.rows.count, first, width, op.factors, op.rank, op.outer, op.first);
  }
}

// ---- dot_outer

BF16_TARGET void dot_outer_panels(const DotOuter<bfloat16>& op) {
  const RowPointers<const bfloat16> x(op.rows, op.x, kFar);
  const RowMasks<false> masks(op.rows, {});
  const int64_t rank_tiles = ceil_div(op.rank, kTileRows);
  round_transpose(op.g, op.outer_rank, op.rows.count, op.factors);
  const Tiles tiles(op.outer_rank);
  Panel panel;
  int64_t first = 0;
  do {  // once even without columns: sums of nothing are zero
    const int64_t width = std::min(kPanel, op.x.columns - first);
    fill<false, true, true>(panel, x, masks, op.rows.count, first, width);
    add_dots(panel, NextPanel(x, first, op.x.columns), op.rows.count, width,
             op.tiles + first / kTileLine * rank_tiles * kTileSize, rank_tiles, op.out, first == 0);
    add_outer(panel, op.rows.count, first, width, op.factors, op.outer_rank, op.outer, op.first);
  } while ((first += kPanel) < op.x.columns);
}

}  // namespace

void amx_rows_dot(const RowsDot<bfloat16>& op) {
  op.mask.bytes ? rows_dot_panels<true>(op) : rows_dot_panels<false>(op);
}

void amx_outer_add(const OuterAdd<bfloat16>& op) {
  op.mask.bytes ? outer_add_panels<true>(op) : outer_add_panels<false>(op);
}

void amx_dot_outer(const DotOuter<bfloat16>& op) { dot_outer_panels(op); }

}  // namespace align::cpu

#endif
