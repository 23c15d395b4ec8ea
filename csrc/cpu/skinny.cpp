// rows_dot, rank_add and add_up of skinny.h.
#include "cpu/skinny.h"

#include <algorithm>
#include <vector>

#include "cpu/bf16/units.h"
#include "cpu/tiles.h"

namespace align::cpu {
namespace {

// ---- rows_dot

// Adds the products of columns [first, last) for rows t .. t+kRows-1 and ranks j .. j+7.
template <int W, bool kMasked, typename T>
ALIGN_INLINE void dot_tile(const RowsDot<T>& op, const RowPointers<const T>& x, const RowMasks<kMasked>& masks,
                           int64_t t, int64_t j, int64_t first, int64_t last) {
  using A = Acc<T>;
  constexpr int kRows = kTile<W> / kRanks, kLane = kLanes<A, W>;
  Vec<A, W> sum[kTile<W>] = {};
  const auto add_columns = [&](int64_t c, auto load_x) ALIGN_INLINE_LAMBDA {
    Vec<A, W> xd[kRows];
    for (int i = 0; i < kRows; ++i) {
      prefetch(x.ahead[t + i] + c);
      xd[i] = masks.template apply<W, A>(load_x(x.at[t + i] + c), t + i, c);
    }
    for (int k = 0; k < kRanks; ++k) {
      const auto a = load<W>(op.a.row(j + k) + c);
      for (int i = 0; i < kRows; ++i) sum[i * kRanks + k] += xd[i] * a;
    }
  };
  int64_t c = first;
  for (; c + kLane <= last; c += kLane) {
    add_columns(c, [](const T* p) ALIGN_INLINE_LAMBDA { return load<W>(p); });
  }
  if (c < last) {
    add_columns(c, [&](const T* p) ALIGN_INLINE_LAMBDA { return load_first<W>(p, last - c); });
  }
  A total[kTile<W>];
  for (int k = 0; k < kTile<W>; k += kLane) store<W>(total + k, lane_sums<A, W>(sum + k));
  for (int i = 0; i < kRows && t + i < op.rows.count; ++i) {
    constexpr int kBytes = kRanks * sizeof(A);
    A* out = op.out.row(t + i) + j;
    store<kBytes>(out, load<kBytes>(out) + load<kBytes>(total + i * kRanks));
  }
}

template <int W, bool kMasked, typename T>
ALIGN_INLINE void rows_dot_tiles(const RowsDot<T>& op) {
  constexpr int64_t kPanelBytes = 32 * 1024;  // eight ranks of a panel of a stay in the first-level cache
  constexpr int64_t kPanel = kPanelBytes / kRanks / sizeof(Acc<T>);
  const RowPointers<const T> x(op.rows, op.x, kNear);
  const RowMasks<kMasked> masks(op.rows, op.mask);
  const int64_t ranks = round_up(op.rank, kRanks);
  for (int64_t t = 0; t < op.rows.count; ++t) std::fill_n(op.out.row(t), ranks, Acc<T>(0));
  for (int64_t first = 0; first < op.x.columns; first += kPanel) {
    const int64_t last = std::min(first + kPanel, op.x.columns);
    for (int64_t j = 0; j < ranks; j += kRanks) {
      for (int64_t t = 0; t < op.rows.count; t += kTile<W> / kRanks) {
        dot_tile<W, kMasked, T>(op, x, masks, t, j, first, last);
      }
    }
  }
}

// ---- rank_add

constexpr int64_t kChain = 64;  // ranks that are added one after the other; longer sums would round more

// sum[i][v] = the products of ranks first .. first + kChain - 1 of a term, before scale and mask, for kRows rows and
// kVecs vectors of columns from c on.
template <int W, int kRows, int kVecs, typename A>
ALIGN_INLINE void chain_products(const RankTerm<A>& term, int64_t first, int64_t t, int64_t c,
                                 Vec<A, W> (&sum)[kRows][kVecs]) {
  const A* g = term.g.row(t) + first;
  const A* b = term.b.row(first) + c;
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVecs; ++v) sum[i][v] = Vec<A, W>{};
  }
  const int64_t last = std::min(first + kChain, term.rank);
  for (int64_t j = first; j < last; ++j, ++g, b += term.b.stride) {
    Vec<A, W> columns[kVecs];
    for (int v = 0; v < kVecs; ++v) columns[v] = load<W>(b + v * kLanes<A, W>);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVecs; ++v) sum[i][v] += columns[v] * g[i * term.g.stride];
    }
  }
}

// Computes kRows rows from t on and kVecs vectors of columns from c on. Without kWhole only `lanes` columns of the last
// vector exist.
// The sums of the first chain stay in registers; those of further chains and terms (kMany) go through the stack.
template <int W, int kRows, int kVecs, bool kWhole, bool kMasked, bool kMany, typename T>
ALIGN_INLINE void add_tile(const RankAdd<T>& op, const RowPointers<T>& out, const RowPointers<const T>& in,
                           const RowMasks<kMasked>* masks, int64_t t, int64_t c, int64_t lanes) {
  using A = Acc<T>;
  constexpr int kLane = kLanes<A, W>;
  // Calls body(i, v, row, column) for all vectors of the tile, unrolled: in a loop the sums would be kept in memory.
  const auto each = [&](const auto& body) ALIGN_INLINE_LAMBDA {
    const int64_t first_row = opaque(t), first_column = opaque(c);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) body(i, v, first_row + i, first_column + v * kLane);
    }
  };
  const auto load_y = [&](const T* p) ALIGN_INLINE_LAMBDA { return kWhole ? load<W>(p) : load_first<W>(p, lanes); };
  const auto term_value = [&](int64_t k, const Vec<A, W>& sum, int64_t row, int64_t column) ALIGN_INLINE_LAMBDA {
    const RankTerm<A>& term = op.terms[k];
    if (kMasked && !term.mask.bytes) return term.scale * sum;
    return term.scale * masks[k].template apply<W, A>(sum, row, column);
  };
  Vec<A, W> sum[kRows][kVecs];
  Vec<A, W> further[kRows][kVecs] = {};
  for (int64_t k = 0; kMany && k < op.count; ++k) {
    for (int64_t first = k == 0 ? kChain : 0; first < op.terms[k].rank; first += kChain) {
      chain_products<W>(op.terms[k], first, t, c, sum);
      each([&](int i, int v, int64_t row, int64_t column)
               ALIGN_INLINE_LAMBDA { further[i][v] += term_value(k, sum[i][v], row, column); });
    }
  }
  if (op.in) {
    each([&](int, int, int64_t row, int64_t column) ALIGN_INLINE_LAMBDA { prefetch(in.ahead[row] + column); });
  }
  chain_products<W>(op.terms[0], 0, t, c, sum);
  each([&](int i, int v, int64_t row, int64_t column) ALIGN_INLINE_LAMBDA {
    sum[i][v] = term_value(0, sum[i][v], row, column);
    if (kMany) sum[i][v] += further[i][v];
  });
  if (op.in) {
    each([&](int i, int v, int64_t row, int64_t column)
             ALIGN_INLINE_LAMBDA { sum[i][v] += load_y(in.at[row] + column); });
  }
  if (op.bias) {
    each([&](int i, int v, int64_t, int64_t column) ALIGN_INLINE_LAMBDA { sum[i][v] += load_y(op.bias + column); });
  }
  each([&](int i, int v, int64_t row, int64_t column) ALIGN_INLINE_LAMBDA {
    if (kWhole) {
      store<W>(out.at[row] + column, sum[i][v]);
    } else {
      store_first<W>(out.at[row] + column, sum[i][v], lanes);
    }
  });
}

template <int W, bool kMasked, bool kMany, typename T>
ALIGN_INLINE void rank_add_tiles(const RankAdd<T>& op, const RowMasks<kMasked>* masks) {
  constexpr int kRows = 4;
  constexpr int kVecs = sizeof(T) == 2 ? kTile<W> / kRows : tile_vecs<W>(kRows);  // converting takes registers
  constexpr int64_t kLane = kLanes<Acc<T>, W>, kTileColumns = kVecs * kLane;
  // Rank rows of a panel of b stay in the first-level cache, up to rank 48.
  constexpr int64_t kPanel = 128 / kTileColumns * kTileColumns;
  const RowPointers<T> out(op.rows, op.out, kNear);
  const RowPointers<const T> in(
      op.rows, TokenMatrix<const T>{op.in ? op.in : op.out.data, op.out.columns, op.out.stride}, kNear);
  for (int64_t first = 0; first < op.out.columns; first += kPanel) {
    const int64_t last = std::min(first + kPanel, op.out.columns);
    const auto add_rows = [&](auto rows, int64_t t) ALIGN_INLINE_LAMBDA {
      int64_t c = first;
      for (; c + kTileColumns <= last; c += kTileColumns) {
        add_tile<W, rows(), kVecs, true, kMasked, kMany, T>(op, out, in, masks, t, c, kLane);
      }
      for (; c < last; c += kLane) {
        add_tile<W, rows(), 1, false, kMasked, kMany, T>(op, out, in, masks, t, c, std::min(kLane, last - c));
      }
    };
    int64_t t = 0;
    for (; t + kRows <= op.rows.count; t += kRows) add_rows(std::integral_constant<int, kRows>{}, t);
    for (; t < op.rows.count; ++t) add_rows(std::integral_constant<int, 1>{}, t);
  }
}

// ---- add_up

template <int W, typename A>
ALIGN_INLINE void add_up_rows(const RowMajor<const A>* partials, int64_t count, A scale, int64_t rows, int64_t columns,
                              RowMajor<A> sums) {
  constexpr int64_t kLane = kLanes<A, W>;
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t c = 0; c < columns; c += kLane) {
      Vec<A, W> sum = {};
      for (int64_t k = 0; k < count; ++k) {
        const A* row = partials[k].row(j) + c;
        if (j + 1 < rows) prefetch_near(row + partials[k].stride);
        sum = k == 0 ? load<W>(row) : sum + load<W>(row);
      }
      store_first<W>(sums.row(j) + c, scale * sum, std::min(kLane, columns - c));
    }
  }
}

}  // namespace

template <typename T>
void rows_dot(const RowsDot<T>& op) {
  if constexpr (kForUnits<T>) {
    if (op.tiles) return unit_rows_dot(op);
  }
  dispatch<T>(op.mask.bytes,
              [&](auto width, auto masked) ALIGN_INLINE_LAMBDA { rows_dot_tiles<width(), masked(), T>(op); });
}

template <typename T>
void rank_add(const RankAdd<T>& op) {
  if constexpr (kForUnits<T>) {
    if (op.terms[0].tiles) return unit_rank_add(op);
  }
  const bool masked_terms =
      std::any_of(op.terms, op.terms + op.count, [](const auto& term) { return term.mask.bytes != nullptr; });
  dispatch<T>(masked_terms, [&](auto width, auto masked) ALIGN_INLINE_LAMBDA {
    if (op.count > 1 || op.terms[0].rank > kChain) {
      std::vector<RowMasks<masked()>> masks;
      for (int64_t k = 0; k < op.count; ++k) masks.emplace_back(op.rows, op.terms[k].mask);
      rank_add_tiles<width(), masked(), true, T>(op, masks.data());
    } else {
      const RowMasks<masked()> masks(op.rows, op.terms[0].mask);
      rank_add_tiles<width(), masked(), false, T>(op, &masks);
    }
  });
}

template <typename A>
void add_up(const RowMajor<const A>* partials, int64_t count, A scale, int64_t rows, int64_t columns,
            RowMajor<A> sums) {
  run_widest([&](auto width)
                 ALIGN_INLINE_LAMBDA { add_up_rows<width()>(partials, count, scale, rows, columns, sums); });
}
template void add_up(const RowMajor<const float>*, int64_t, float, int64_t, int64_t, RowMajor<float>);
template void add_up(const RowMajor<const double>*, int64_t, double, int64_t, int64_t, RowMajor<double>);

#define ALIGN_INSTANTIATE(T)                 \
  template void rows_dot(const RowsDot<T>&); \
  template void rank_add(const RankAdd<T>&);
ALIGN_FOR_CPU_TYPES(ALIGN_INSTANTIATE)

}  // namespace align::cpu
