// Each product is made of tiles of vector accumulators that stay in registers: a tile reads every operand once and
// does eight or more multiply-adds for a vector of x.
#include "cpu/skinny.h"

#include <algorithm>
#include <vector>

#include "cpu/dropout.h"
#include "cpu/simd.h"

namespace align::cpu {
namespace {

// Accumulators of a tile: half of the 32 registers of AVX-512 and NEON, or of the 16 of AVX2 and SSE.
#if defined(__x86_64__)
template <int W>
constexpr int kTile = W == 64 ? 16 : 8;
#else
template <int W>
constexpr int kTile = 16;
#endif
constexpr int kRanks = kRankAlign;  // ranks of a tile of rows_dot and outer_add

// Rows between what is computed and what is prefetched: a few where rows come one after the other, and the next block
// where this one is in cache already.
constexpr int64_t kNear = 8, kFar = kRowBlock;

ALIGN_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// Runs body(width, masked) with both as compile-time constants. Double, which only gradient checks use, has no wide
// version.
template <typename T, typename Body>
void dispatch(bool masked, const Body& body) {
  if constexpr (std::is_same_v<T, double>) {
    constexpr std::integral_constant<int, 16> kNarrow;
    masked ? body(kNarrow, std::true_type{}) : body(kNarrow, std::false_type{});
  } else if (masked) {
    run_widest([&](auto width) ALIGN_INLINE_LAMBDA { body(width, std::true_type{}); });
  } else {
    run_widest([&](auto width) ALIGN_INLINE_LAMBDA { body(width, std::false_type{}); });
  }
}

// Where the rows of a block, and those to prefetch meanwhile, begin. Rows beyond the block's are its last.
template <typename T>
struct RowPointers {
  T* at[kRowBlock];
  T* ahead[kRowBlock];

  RowPointers(const RowBlock& rows, const Tall<T>& x, int64_t distance) {
    for (int64_t i = 0; i < kRowBlock; ++i) {
      const int64_t row = std::min(i, rows.count - 1);
      at[i] = x.row(rows.row(row));
      ahead[i] = x.row(rows.row_ahead(row, distance));
    }
  }
};

// The masks of a block's rows.
template <bool kMasked>
struct RowMasks {
  KeptRow at[kMasked ? kRowBlock : 1];

  RowMasks(const RowBlock& rows, const KeepBits& keep) {
    for (int64_t i = 0; kMasked && keep.bytes && i < kRowBlock; ++i) {
      const int64_t row = std::min(i, rows.count - 1);
      at[i] = kept_row(keep.bytes + row * keep.row_bytes, rows.row(row) * keep.row_elements, keep.first);
    }
  }

  // v, columns c .. of row i, with the dropped ones zeroed.
  template <int W, typename A>
  ALIGN_INLINE Vec<A, W> apply(const Vec<A, W>& v, int64_t i, int64_t c) const {
    if constexpr (kMasked) {
      return zero_dropped<W, A>(v, at[i], c);
    } else {
      return v;
    }
  }
};

// ---- rows_dot

// Adds columns [first, last) of rows t .. t+kRows-1 to ranks j .. j+7.
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
  const RowMasks<kMasked> masks(op.rows, op.keep);
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

// sum[i][v] = the products of one term, before scale and mask, for kRows rows and kVecs vectors of columns from c on.
template <int W, int kRows, int kVecs, typename A>
ALIGN_INLINE void term_products(const RankTerm<A>& term, int64_t t, int64_t c, Vec<A, W> (&sum)[kRows][kVecs]) {
  const A* g = term.g.row(t);
  const A* b = term.b.data + c;
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVecs; ++v) sum[i][v] = Vec<A, W>{};
  }
  for (int64_t j = 0; j < term.rank; ++j, ++g, b += term.b.stride) {
    Vec<A, W> columns[kVecs];
    for (int v = 0; v < kVecs; ++v) columns[v] = load<W>(b + v * kLanes<A, W>);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVecs; ++v) sum[i][v] += columns[v] * g[i * term.g.stride];
    }
  }
}

// Rows t .. t+3, kVecs vectors of columns from c on; unless kWhole only lanes columns of the last vector exist. The
// sums of the first term stay in registers; those of further terms (kMany) go through the stack.
template <int W, int kRows, int kVecs, bool kWhole, bool kMasked, bool kMany, typename T>
ALIGN_INLINE void add_tile(const RankAdd<T>& op, const RowPointers<T>& out, const RowPointers<const T>& in,
                           const RowMasks<kMasked>* masks, int64_t t, int64_t c, int64_t lanes) {
  using A = Acc<T>;
  constexpr int kLane = kLanes<A, W>;
  const auto term_value = [&](int64_t k, const Vec<A, W>& sum, int i, int v) ALIGN_INLINE_LAMBDA {
    const RankTerm<A>& term = op.terms[k];
    if (kMasked && !term.keep.bytes) return term.scale * sum;
    return term.scale * masks[k].template apply<W, A>(sum, t + i, c + v * kLane);
  };
  Vec<A, W> sum[kRows][kVecs];
  Vec<A, W> further[kRows][kVecs] = {};
  for (int64_t k = 1; kMany && k < op.count; ++k) {
    term_products<W>(op.terms[k], t, c, sum);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVecs; ++v) further[i][v] += term_value(k, sum[i][v], i, v);
    }
  }
  if (op.in) {
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVecs; ++v) prefetch(in.ahead[t + i] + c + v * kLane);
    }
  }
  term_products<W>(op.terms[0], t, c, sum);
  for (int i = 0; i < kRows; ++i) {
    if (t + i >= op.rows.count) break;
    for (int v = 0; v < kVecs; ++v) {
      const int64_t e = c + v * kLane;
      Vec<A, W> y = {};
      if (op.in) y = kWhole ? load<W>(in.at[t + i] + e) : load_first<W>(in.at[t + i] + e, lanes);
      if (op.bias) y += kWhole ? load<W>(op.bias + e) : load_first<W>(op.bias + e, lanes);
      y += term_value(0, sum[i][v], i, v);
      if (kMany) y += further[i][v];
      if (kWhole) {
        store<W>(out.at[t + i] + e, y);
      } else {
        store_first<W>(out.at[t + i] + e, y, lanes);
      }
    }
  }
}

template <int W, bool kMasked, bool kMany, typename T>
ALIGN_INLINE void rank_add_tiles(const RankAdd<T>& op, const RowMasks<kMasked>* masks) {
  constexpr int kRows = 4, kVecs = kTile<W> / kRows;
  constexpr int64_t kLane = kLanes<Acc<T>, W>, kWide = kVecs * kLane;
  constexpr int64_t kPanel = 256;  // rank rows of a panel of b stay in the first-level cache, up to rank 32
  const RowPointers<T> out(op.rows, op.out, kNear);
  const RowPointers<const T> in(op.rows, Tall<const T>{op.in ? op.in : op.out.data, op.out.columns, op.out.stride},
                                kNear);
  for (int64_t first = 0; first < op.out.columns; first += kPanel) {
    const int64_t last = std::min(first + kPanel, op.out.columns);
    for (int64_t t = 0; t < op.rows.count; t += kRows) {
      int64_t c = first;
      for (; c + kWide <= last; c += kWide) {
        add_tile<W, kRows, kVecs, true, kMasked, kMany, T>(op, out, in, masks, t, c, kLane);
      }
      for (; c < last; c += kLane) {
        add_tile<W, kRows, 1, false, kMasked, kMany, T>(op, out, in, masks, t, c, std::min(kLane, last - c));
      }
    }
  }
}

// ---- outer_add

// Ranks j .. j+7, kVecs vectors of columns from c on; unless kWhole only lanes columns of the last vector exist.
template <int W, int kVecs, bool kWhole, bool kMasked, typename T>
ALIGN_INLINE void outer_tile(const OuterAdd<T>& op, const RowPointers<const T>& x, const RowMasks<kMasked>& masks,
                             int64_t j, int64_t c, int64_t lanes) {
  using A = Acc<T>;
  constexpr int kLane = kLanes<A, W>;
  Vec<A, W> sum[kRanks][kVecs] = {};
  for (int64_t t = 0; t < op.rows.count; ++t) {
    const A* factor = op.g.row(t) + j;
    Vec<A, W> xd[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const int64_t column = c + v * kLane;
      const T* p = x.at[t] + column;
      prefetch(x.ahead[t] + column);
      xd[v] = masks.template apply<W, A>(kWhole ? load<W>(p) : load_first<W>(p, lanes), t, column);
    }
    for (int k = 0; k < kRanks; ++k) {
      for (int v = 0; v < kVecs; ++v) sum[k][v] += xd[v] * factor[k];
    }
  }
  for (int k = 0; k < kRanks; ++k) {
    if (j + k >= op.rank) break;  // padding
    for (int v = 0; v < kVecs; ++v) {
      A* w = op.w.row(j + k) + c + v * kLane;
      if (kWhole) {
        store<W>(w, op.first ? sum[k][v] : load<W>(w) + sum[k][v]);
      } else {
        store_first<W>(w, op.first ? sum[k][v] : load_first<W>(w, lanes) + sum[k][v], lanes);
      }
    }
  }
}

template <int W, bool kMasked, typename T>
ALIGN_INLINE void outer_add_tiles(const OuterAdd<T>& op) {
  constexpr int64_t kVecs = kTile<W> / kRanks, kLane = kLanes<Acc<T>, W>, kWide = kVecs * kLane;
  const RowPointers<const T> x(op.rows, op.x, kFar);
  const RowMasks<kMasked> masks(op.rows, op.keep);
  for (int64_t j = 0; j < op.rank; j += kRanks) {
    int64_t c = 0;
    for (; c + kWide <= op.x.columns; c += kWide) {
      outer_tile<W, kVecs, true, kMasked, T>(op, x, masks, j, c, kLane);
    }
    for (; c < op.x.columns; c += kLane) {
      outer_tile<W, 1, false, kMasked, T>(op, x, masks, j, c, std::min(kLane, op.x.columns - c));
    }
  }
}

// ---- add_up

template <int W, typename A>
ALIGN_INLINE void add_up_columns(const A* const* parts, int64_t count, A scale, int64_t columns, A* w) {
  constexpr int64_t kLane = kLanes<A, W>;
  for (int64_t c = 0; c < columns; c += kLane) {
    auto sum = load<W>(parts[0] + c);
    for (int64_t k = 1; k < count; ++k) sum += load<W>(parts[k] + c);
    if (c + kLane <= columns) {
      store<W>(w + c, scale * sum);
    } else {
      store_first<W>(w + c, scale * sum, columns - c);
    }
  }
}

}  // namespace

template <typename T>
void rows_dot(const RowsDot<T>& op) {
  dispatch<T>(op.keep.bytes,
              [&](auto width, auto masked) ALIGN_INLINE_LAMBDA { rows_dot_tiles<width(), masked(), T>(op); });
}

template <typename T>
void rank_add(const RankAdd<T>& op) {
  const bool masked_terms =
      std::any_of(op.terms, op.terms + op.count, [](const auto& term) { return term.keep.bytes != nullptr; });
  dispatch<T>(masked_terms, [&](auto width, auto masked) ALIGN_INLINE_LAMBDA {
    if (op.count > 1) {
      std::vector<RowMasks<masked()>> masks;
      for (int64_t k = 0; k < op.count; ++k) masks.emplace_back(op.rows, op.terms[k].keep);
      rank_add_tiles<width(), masked(), true, T>(op, masks.data());
    } else {
      const RowMasks<masked()> masks(op.rows, op.terms[0].keep);
      rank_add_tiles<width(), masked(), false, T>(op, &masks);
    }
  });
}

template <typename T>
void outer_add(const OuterAdd<T>& op) {
  dispatch<T>(op.keep.bytes,
              [&](auto width, auto masked) ALIGN_INLINE_LAMBDA { outer_add_tiles<width(), masked(), T>(op); });
}

template <typename A>
void add_up(const A* const* parts, int64_t count, A scale, int64_t columns, A* w) {
  run_widest([&](auto width) ALIGN_INLINE_LAMBDA { add_up_columns<width()>(parts, count, scale, columns, w); });
}
template void add_up(const float* const*, int64_t, float, int64_t, float*);
template void add_up(const double* const*, int64_t, double, int64_t, double*);

#define ALIGN_INSTANTIATE(T)                 \
  template void rows_dot(const RowsDot<T>&); \
  template void rank_add(const RankAdd<T>&); \
  template void outer_add(const OuterAdd<T>&);
ALIGN_INSTANTIATE(float)
ALIGN_INSTANTIATE(double)
ALIGN_INSTANTIATE(bfloat16)
ALIGN_INSTANTIATE(float16)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
