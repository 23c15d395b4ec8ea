// outer_add and dot_outer of skinny.h.
#include <algorithm>

#include "cpu/bf16/units.h"
#include "cpu/skinny.h"
#include "cpu/tiles.h"

namespace align::cpu {
namespace {

// ---- outer_add

// Computes ranks j .. j+kTileRanks-1 of kVecs vectors of columns from c on. Without kWhole only `lanes` columns of the
// last vector exist. load_x(t, column) returns a vector of row t, or its first lanes.
template <int W, int kTileRanks, int kVecs, bool kWhole, typename T, typename LoadX>
ALIGN_INLINE void outer_tile(const OuterAdd<T>& op, const LoadX& load_x, int64_t j, int64_t c, int64_t lanes) {
  using A = Acc<T>;
  constexpr int kLane = kLanes<A, W>;
  Vec<A, W> sum[kTileRanks][kVecs] = {};
#pragma GCC unroll 4
  for (int64_t t = 0; t < op.rows.count; ++t) {
    const A* factor = op.g.row(t) + j;
    Vec<A, W> xd[kVecs];
    for (int v = 0; v < kVecs; ++v) xd[v] = load_x(t, c + v * kLane, std::bool_constant<kWhole>{}, lanes);
    for (int k = 0; k < kTileRanks; ++k) {
      for (int v = 0; v < kVecs; ++v) sum[k][v] += xd[v] * factor[k];
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kTileRanks; ++k) {
    if (j + k >= op.rank) continue;  // padding; a loop with a break would keep the sums in memory
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      A* to = op.outer.row(j + k) + c + v * kLane;
      if (kWhole) {
        store<W>(to, op.first ? sum[k][v] : load<W>(to) + sum[k][v]);
      } else {
        store_first<W>(to, op.first ? sum[k][v] : load_first<W>(to, lanes) + sum[k][v], lanes);
      }
    }
  }
}

template <int W, int kTileRanks, typename T, typename LoadX>
ALIGN_INLINE void outer_tiles(const OuterAdd<T>& op, const LoadX& load_x) {
  constexpr int64_t kVecs = tile_vecs<W>(kTileRanks), kLane = kLanes<Acc<T>, W>, kTileColumns = kVecs * kLane;
  constexpr int64_t kPanel = 512;  // columns of all rows that stay in the second-level cache for all ranks
  for (int64_t first = 0; first < op.x.columns; first += kPanel) {
    const int64_t last = std::min(first + kPanel, op.x.columns);
    for (int64_t j = 0; j < op.rank; j += kTileRanks) {
      int64_t c = first;
      for (; c + kTileColumns <= last; c += kTileColumns) {
        outer_tile<W, kTileRanks, kVecs, true, T>(op, load_x, j, c, kLane);
      }
      for (; c < last; c += kLane) outer_tile<W, kTileRanks, 1, false, T>(op, load_x, j, c, std::min(kLane, last - c));
    }
  }
}

template <int W, bool kMasked, typename T>
ALIGN_INLINE void outer_add_tiles(const OuterAdd<T>& op) {
  const RowPointers<const T> x(op.rows, op.x, kFar);
  const RowMasks<kMasked> masks(op.rows, op.mask);
  outer_tiles<W, kRanks, T>(op, [&](int64_t t, int64_t column, auto whole, int64_t lanes) ALIGN_INLINE_LAMBDA {
    const T* p = x.at[t] + column;
    prefetch(x.ahead[t] + column);
    return masks.template apply<W, Acc<T>>(whole() ? load<W>(p) : load_first<W>(p, lanes), t, column);
  });
}

// ---- dot_outer

// So many columns of a block of x fit into the first-level cache together with as many rows of bt, up to rank 48 of 64
// columns. A multiple of the columns of the tiles of the outer product.
template <int W>
constexpr int64_t kPanelColumns = W == 32 ? 48 : 64;
constexpr int64_t kLineColumns = 16;

// Adds kRows rows of the panel times bt, which has a row for each of its columns, to kVecs vectors of ranks of out;
// asks for as many columns of the rows at ahead, if that is not null.
template <int W, int kRows, int kVecs, typename T>
ALIGN_INLINE void ranks_tile(const Acc<T>* panel, int64_t width, const Acc<T>* bt, int64_t bt_stride, Acc<T>* out,
                             int64_t out_stride, const T* const* ahead, int64_t ahead_first) {
  using A = Acc<T>;
  constexpr int kLane = kLanes<A, W>;
  Vec<A, W> sum[kRows][kVecs] = {};  // for one panel: a single sum over all columns would round more
  for (int64_t line = 0; line < width; line += kLineColumns) {
    for (int i = 0; ahead && i < kRows; ++i) prefetch(ahead[i] + ahead_first + line);
    for (int64_t c = line; c < std::min(line + kLineColumns, width); ++c) {
      Vec<A, W> ranks[kVecs];
      for (int v = 0; v < kVecs; ++v) ranks[v] = load<W>(bt + c * bt_stride + v * kLane);
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVecs; ++v) sum[i][v] += ranks[v] * panel[i * kPanelColumns<W> + c];
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      A* to = out + i * out_stride + v * kLane;
      store<W>(to, load<W>(to) + sum[i][v]);
    }
  }
}

template <int W, typename T>
ALIGN_INLINE void dot_outer_tiles(const DotOuter<T>& op) {
  using A = Acc<T>;
  constexpr int64_t kLane = kLanes<A, W>, kPanel = kPanelColumns<W>;
  constexpr int kTileRanks = W == 32 ? 4 : kRanks;  // of the outer product
  const RowPointers<const T> x(op.rows, op.x, kFar);
  const int64_t vecs = ceil_div(op.rank, kLane);
  for (int64_t t = 0; t < kRowBlock; ++t) std::fill_n(op.out.row(t), round_up(op.rank, kColumnAlign), A(0));
  alignas(64) A panel[kRowBlock * kPanel];
  for (int64_t first = 0; first < op.x.columns; first += kPanel) {
    const int64_t width = std::min(kPanel, op.x.columns - first);
    for (int64_t i = 0; i < kRowBlock; ++i) {
      const T* row = x.at[i] + first;
      A* target = panel + i * kPanel;
      int64_t c = 0;
      for (; c + kLane <= width; c += kLane) store<W>(target + c, load<W>(row + c));
      if (c < width) store<W>(target + c, load_first<W>(row + c, width - c));
    }
    const bool last = first + kPanel >= op.x.columns;
    const T* const* next = last ? x.ahead : x.at;
    const int64_t next_first = last ? 0 : first + kPanel;
    const auto tiles = [&](auto count, int64_t v) ALIGN_INLINE_LAMBDA {
      constexpr int kVecs = count(), kRows = kVecs == 3 ? 4 : kTile<W> / kVecs;
      for (int64_t t = 0; t < op.rows.count; t += kRows) {
        ranks_tile<W, kRows, kVecs, T>(panel + t * kPanel, width, op.bt.row(first) + v * kLane, op.bt.stride,
                                       op.out.row(t) + v * kLane, op.out.stride, v == 0 ? next + t : nullptr,
                                       next_first);
      }
    };
    int64_t v = 0;
    for (; v + 3 <= vecs; v += 3) tiles(std::integral_constant<int, 3>{}, v);
    if (v + 2 == vecs) tiles(std::integral_constant<int, 2>{}, v);
    if (v + 1 == vecs) tiles(std::integral_constant<int, 1>{}, v);
    const OuterAdd<A> outer{.rows = all_rows(op.rows.count),
                            .x = {panel, width, kPanel},
                            .g = op.g,
                            .rank = op.outer_rank,
                            .outer = {op.outer.data + first, op.outer.stride},
                            .first = op.first};
    outer_tiles<W, kTileRanks, A>(outer, [&](int64_t t, int64_t column, auto, int64_t)
                                             ALIGN_INLINE_LAMBDA { return load<W>(panel + t * kPanel + column); });
  }
}

}  // namespace

template <typename T>
void outer_add(const OuterAdd<T>& op) {
  if constexpr (kForUnits<T>) {
    if (op.factors) return unit_outer_add(op);
  }
  dispatch<T>(op.mask.bytes,
              [&](auto width, auto masked) ALIGN_INLINE_LAMBDA { outer_add_tiles<width(), masked(), T>(op); });
}

template <typename T>
void dot_outer(const DotOuter<T>& op) {
  if constexpr (kForUnits<T>) {
    if (op.tiles) return unit_dot_outer(op);
  }
  dispatch<T>([&](auto width) ALIGN_INLINE_LAMBDA { dot_outer_tiles<width(), T>(op); });
}

#define ALIGN_INSTANTIATE(T)                   \
  template void outer_add(const OuterAdd<T>&); \
  template void dot_outer(const DotOuter<T>&);
ALIGN_FOR_CPU_TYPES(ALIGN_INSTANTIATE)

}  // namespace align::cpu
