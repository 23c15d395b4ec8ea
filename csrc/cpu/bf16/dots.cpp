// The products of skinny.h by the dot products of AVX512_BF16. The pairs that a dot product adds up are neighbouring
// columns in rows_dot, ranks in rank_add and rows in outer_add.
#include "cpu/bf16/rank_add.h"

#ifdef ALIGN_BF16_UNITS

#include <unistd.h>

namespace align::cpu {
namespace {

// The bfloat16 elements that fill the first-level cache.
int64_t first_level_elements() {
  static const int64_t elements = [] {
    int64_t bytes = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);  // 0 where the system does not tell
#endif
    return std::max(bytes, int64_t(32) << 10) / int64_t(sizeof(bfloat16));
  }();
  return elements;
}

// Loads 32 columns of row i from c on, without those that are dropped or not of `lanes`.
template <bool kMasked, bool kWhole>
BF16_INLINE __m512i load_line(const RowPointers<const bfloat16>& x, const RowMasks<kMasked>& masks, int64_t i,
                              int64_t c, __mmask32 lanes) {
  if (kWhole && !kMasked) return _mm512_loadu_si512(x.at[i] + c);
  if constexpr (kMasked) lanes &= kept_lanes(masks.at[i], c);
  return _mm512_maskz_loadu_epi16(lanes, x.at[i] + c);
}

// ---- rows_dot

constexpr int kDotRows = 2;  // rows of a tile, which has kDotRows * kRanks vectors of sums

template <bool kMasked, bool kWhole>
BF16_INLINE void dot_line(const RowPointers<const bfloat16>& x, const RowMasks<kMasked>& masks, int64_t t, int64_t c,
                          __mmask32 lanes, const bfloat16* a, int64_t stride, bool first,
                          Vec<float, 64> (&sum)[kDotRows * kRanks]) {
  __m512i xd[kDotRows];
  for (int i = 0; i < kDotRows; ++i) {
    if (first) prefetch_near(x.ahead[t + i] + c);
    xd[i] = load_line<kMasked, kWhole>(x, masks, t + i, c, lanes);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRanks; ++k) {
    const __m512i line = _mm512_loadu_si512(a + k * stride + c);
#pragma GCC unroll 2
    for (int i = 0; i < kDotRows; ++i) sum[i * kRanks + k] = dot_add(sum[i * kRanks + k], xd[i], line);
  }
}

// Assigns the sums of eight ranks, or adds them to those of the columns before.
BF16_INLINE void put_ranks(const Vec<float, 32>& dots, bool first, float* out) {
  store<32>(out, first ? dots : load<32>(out) + dots);
}

// Adds the products of columns [first, last) to out; assigns those of the first columns.
template <bool kMasked>
BF16_INLINE void dot_panel(const RowsDot<bfloat16>& op, const RowPointers<const bfloat16>& x,
                           const RowMasks<kMasked>& masks, int64_t first, int64_t last) {
  const int64_t ranks = round_up(op.rank, kRanks), stride = round_up(op.x.columns, kTileLine);
  for (int64_t j = 0; j < ranks; j += kRanks) {
    for (int64_t t = 0; t < op.rows.count; t += kDotRows) {
      Vec<float, 64> sum[kDotRows * kRanks] = {};
      const bfloat16* a = op.tiles + j * stride;
      int64_t c = first;
      for (; c + kTileLine <= last; c += kTileLine)
        dot_line<kMasked, true>(x, masks, t, c, ~0u, a, stride, j == 0, sum);
      if (c < last) dot_line<kMasked, false>(x, masks, t, c, first_lanes(last - c), a, stride, j == 0, sum);
      const Vec<float, 64> totals = lane_sums<float, 64>(sum);
      put_ranks(__builtin_shufflevector(totals, totals, 0, 1, 2, 3, 4, 5, 6, 7), first == 0, op.out.row(t) + j);
      if (t + 1 == op.rows.count) continue;
      put_ranks(__builtin_shufflevector(totals, totals, 8, 9, 10, 11, 12, 13, 14, 15), first == 0,
                op.out.row(t + 1) + j);
    }
  }
}

// Calls body(first, last) for equal panels of columns, eight ranks of which stay in the first-level cache for all rows.
// There is one without columns too.
template <typename Body>
BF16_INLINE void for_panels(int64_t columns, const Body& body) {
  const int64_t panels = std::max(ceil_div(columns, first_level_elements() / 2 / kRanks), int64_t(1));
  const int64_t panel = round_up(ceil_div(columns, panels), kTileLine);
  int64_t first = 0;
  do {
    body(first, std::min(first + panel, columns));
    first += panel;
  } while (first < columns);
}

template <bool kMasked>
BF16_TARGET void rows_dot_panels(const RowsDot<bfloat16>& op) {
  const RowPointers<const bfloat16> x(op.rows, op.x, kNear / 2);
  const RowMasks<kMasked> masks(op.rows, op.mask);
  for_panels(op.x.columns, [&](int64_t first, int64_t last) BF16_LAMBDA { dot_panel(op, x, masks, first, last); });
}

// ---- rank_add

constexpr int kAddRows = 4, kAddVectors = kAddColumns / kTileRows;

// Calls body(row, line), with constants, for the lines of a piece.
template <typename Body>
BF16_INLINE void for_lines(const Body& body) {
#pragma GCC unroll 4
  for (int i = 0; i < kAddRows; ++i) {
#pragma GCC unroll 2
    for (int line = 0; line < kAddVectors / 2; ++line) body(i, line);
  }
}

// Computes a piece of kAddRows rows from t on and 64 columns from c on; without kWhole only those that out has.
// Products of a term without a mask are added to the sums of the terms before it, in registers. Without kMany there is
// one term.
template <bool kMasked, bool kWhole, bool kMany>
BF16_INLINE void add_piece(const Addition<kMasked>& add, int64_t t, int64_t c) {
  const RankAdd<bfloat16>& op = add.op;
  const int64_t columns = op.out.columns - c, count = kMany ? op.count : 1;
  alignas(64) float before[kAddRows][kAddColumns];  // the sums of the terms before a mask
  bool has_before = false;
  __m512 sum[kAddRows][kAddVectors] = {};
  const auto at = [&](int i, int line) BF16_LAMBDA { return Pair{sum[i][2 * line], sum[i][2 * line + 1]}; };
  const bfloat16* factors = op.factors;
  for (int64_t k = 0; k < count; ++k) {
    const RankTerm<float>& term = op.terms[k];
    if (kMasked && kMany && k > 0 && term.mask.bytes) {
      for_lines([&](int i, int line) BF16_LAMBDA {
        float* to = before[i] + line * kTileLine;
        store_sums(has_before ? plus(at(i, line), load_sums(to)) : at(i, line), to);
        sum[i][2 * line] = sum[i][2 * line + 1] = __m512{};
      });
      has_before = true;
    }
    const int64_t steps = ceil_div(term.rank, kTileLine), row = steps * kTileLine, tile = steps * kTileSize;
    const bfloat16 *left = factors + t * row, *right = term.tiles + c / kTileRows * tile;
    for (int64_t j = 0; j < term.rank; j += 2, left += 2, right += kTileLine) {
      __m512i ranks[kAddVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kAddVectors; ++v) {
        ranks[v] = kWhole || v * kTileRows < columns ? _mm512_loadu_si512(right + v * tile) : __m512i{};
      }
#pragma GCC unroll 4
      for (int i = 0; i < kAddRows; ++i) {
        const __m512i pair = both_of(left + i * row);
#pragma GCC unroll 4
        for (int v = 0; v < kAddVectors; ++v) sum[i][v] = dot_add(sum[i][v], pair, ranks[v]);
      }
    }
    if (kMasked && term.mask.bytes) {
      for_lines([&](int i, int line) BF16_LAMBDA {
        if (!kWhole && line * kTileLine >= columns) return;  // the masks may end before
        const Pair kept = kept_products(add, k, t + i, c + line * kTileLine, at(i, line));
        sum[i][2 * line] = kept.low;
        sum[i][2 * line + 1] = kept.high;
      });
    }
    factors += factor_tiles(term.rank);
  }
  for_lines([&](int i, int line) BF16_LAMBDA {
    const int64_t first = line * kTileLine;
    if (!kWhole && (t + i >= op.rows.count || first >= columns)) return;
    if (op.in) prefetch_near(add.in.ahead[t + i] + c + first);
    const Pair v = kMasked && kMany && has_before ? plus(at(i, line), load_sums(before[i] + first)) : at(i, line);
    write_line<kMasked, kWhole>(add, t + i, c + first, first_lanes(columns - first), v);
  });
}

template <bool kMasked, bool kMany>
BF16_INLINE void add_pieces(const Addition<kMasked>& add) {
  const RankAdd<bfloat16>& op = add.op;
  const int64_t rows = op.rows.count, columns = op.out.columns;
  int64_t ranks = 0;
  for (int64_t k = 0; k < op.count; ++k) ranks += op.terms[k].rank;
  const int64_t most = first_level_elements() * 5 / 8;  // of right tiles, that stay there for all rows
  const int64_t panel = std::max(kAddColumns, most / std::max(ranks, int64_t(1)) / kAddColumns * kAddColumns);
  for (int64_t first = 0; first < columns; first += panel) {
    const int64_t last = std::min(first + panel, columns);
    for (int64_t t = 0; t < rows; t += kAddRows) {
      const int64_t whole = t + kAddRows <= rows ? last - kAddColumns : -1;  // the last begin of a whole piece
      int64_t c = first;
      for (; c <= whole; c += kAddColumns) add_piece<kMasked, true, kMany>(add, t, c);
      for (; c < last; c += kAddColumns) add_piece<kMasked, false, kMany>(add, t, c);
    }
  }
}

template <bool kMasked>
BF16_TARGET void rank_add_pieces(const RankAdd<bfloat16>& op, const RowMasks<kMasked>* masks) {
  const Addition<kMasked> add(op, masks, kNear);
  round_all_factors(op);
  op.count > 1 ? add_pieces<kMasked, true>(add) : add_pieces<kMasked, false>(add);
}

// ---- outer_add

// Adds the products of eight ranks from j on and 32 columns from c on to outer.
template <bool kMasked, bool kWhole>
BF16_INLINE void outer_line(const OuterAdd<bfloat16>& op, const RowPointers<const bfloat16>& x,
                            const RowMasks<kMasked>& masks, int64_t j, int64_t c) {
  const int64_t count = op.rows.count, columns = op.x.columns - c;
  const __mmask32 lanes = first_lanes(columns);
  // What is prefetched lies two lines ahead in the same rows, or after their end in those of the next block.
  const bool in_rows = columns > 2 * kTileLine;
  const bfloat16* const* soon = in_rows ? x.at : x.ahead;
  const int64_t later = in_rows ? c + 2 * kTileLine : 2 * kTileLine - columns;
  for (int64_t k = j; k < std::min(j + kRanks, op.rank); ++k) {
    prefetch_near(op.outer.row(k) + c);
    prefetch_near(op.outer.row(k) + c + kTileRows);
  }
  __m512 sum[kRanks][2] = {};
  for (int64_t t = 0; t < count; t += 2) {
    for (int64_t i = t; j == 0 && i < t + 2; ++i) prefetch_near(soon[i] + later);
    const __m512i even = load_line<kMasked, kWhole>(x, masks, t, c, lanes);
    const __m512i odd = t + 1 < count ? load_line<kMasked, kWhole>(x, masks, t + 1, c, lanes) : __m512i{};
    // Columns 0 to 3 of every eight, and columns 4 to 7.
    const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 8
    for (int k = 0; k < kRanks; ++k) {
      const __m512i pair = both_of(op.factors + (j + k) * kRowBlock + t);
      sum[k][0] = dot_add(sum[k][0], pair, low);
      sum[k][1] = dot_add(sum[k][1], pair, high);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRanks; ++k) {
    if (j + k >= op.rank) continue;
    const auto low = (__v8df)sum[k][0], high = (__v8df)sum[k][1];
    Pair v = {(__m512)__builtin_shufflevector(low, high, 0, 1, 8, 9, 2, 3, 10, 11),
              (__m512)__builtin_shufflevector(low, high, 4, 5, 12, 13, 6, 7, 14, 15)};
    float* to = op.outer.row(j + k) + c;  // whose rows are padded to 16 columns
    const bool both = kWhole || columns > kTileRows;
    if (!op.first) v = plus(v, {_mm512_loadu_ps(to), both ? _mm512_loadu_ps(to + kTileRows) : __m512{}});
    _mm512_storeu_ps(to, v.low);
    if (both) _mm512_storeu_ps(to + kTileRows, v.high);
  }
}

template <bool kMasked>
BF16_INLINE void outer_lines(const OuterAdd<bfloat16>& op, const RowPointers<const bfloat16>& x,
                             const RowMasks<kMasked>& masks, int64_t first, int64_t last) {
  for (int64_t c = first; c < last; c += kTileLine) {
    for (int64_t j = 0; j < op.rank; j += kRanks) {
      if (c + kTileLine <= op.x.columns) {
        outer_line<kMasked, true>(op, x, masks, j, c);
      } else {
        outer_line<kMasked, false>(op, x, masks, j, c);
      }
    }
  }
}

template <bool kMasked>
BF16_TARGET void outer_add_lines(const OuterAdd<bfloat16>& op) {
  const RowPointers<const bfloat16> x(op.rows, op.x, kFar);
  round_transpose(op.g, op.rank, op.rows.count, op.factors);
  outer_lines(op, x, RowMasks<kMasked>(op.rows, op.mask), 0, op.x.columns);
}

// ---- dot_outer

// A panel of x, and the sums of its columns, stay in the second-level cache, which a block of long rows would leave.
BF16_TARGET void dot_outer_panels(const DotOuter<bfloat16>& op) {
  const RowsDot<bfloat16> dot{.rows = op.rows, .x = op.x, .a = {}, .out = op.out, .rank = op.rank, .tiles = op.tiles};
  const OuterAdd<bfloat16> outer{.rows = op.rows,
                                 .x = op.x,
                                 .g = op.g,
                                 .rank = op.outer_rank,
                                 .outer = op.outer,
                                 .first = op.first,
                                 .factors = op.factors};
  const RowPointers<const bfloat16> x_of_dot(op.rows, op.x, kNear / 2), x(op.rows, op.x, kFar);
  const RowMasks<false> masks(op.rows, {});
  round_transpose(op.g, op.outer_rank, op.rows.count, op.factors);
  for_panels(op.x.columns, [&](int64_t first, int64_t last) BF16_LAMBDA {
    dot_panel(dot, x_of_dot, masks, first, last);
    outer_lines(outer, x, masks, first, last);
  });
}

}  // namespace

void dots_rows_dot(const RowsDot<bfloat16>& op) {
  op.mask.bytes ? rows_dot_panels<true>(op) : rows_dot_panels<false>(op);
}

void dots_rank_add(const RankAdd<bfloat16>& op) {
  with_masks(op, [&](const auto* masks) { rank_add_pieces(op, masks); });
}

void dots_outer_add(const OuterAdd<bfloat16>& op) {
  op.mask.bytes ? outer_add_lines<true>(op) : outer_add_lines<false>(op);
}

void dots_dot_outer(const DotOuter<bfloat16>& op) { dot_outer_panels(op); }

}  // namespace align::cpu

#endif
