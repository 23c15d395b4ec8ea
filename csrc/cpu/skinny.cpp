// Each product is made of tiles of vector accumulators that stay in registers: a tile reads every operand once and
// does eight or more multiply-adds for a vector of x.
#include "cpu/skinny.h"

#include <algorithm>

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

// v with the lanes of dropped elements zeroed; lane l has the bit first_bit + l.
template <bool kMasked, int W, typename A>
ALIGN_INLINE Vec<A, W> mask(const Vec<A, W>& v, const KeepBits& keep, int64_t first_bit) {
  if constexpr (kMasked) {
    return zero_dropped<W, A>(v, keep.bits, first_bit);
  } else {
    return v;
  }
}

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

// First elements of kRows rows from t on; those beyond end are copies of row t.
template <int kRows>
ALIGN_INLINE void first_elements(const RowOrder& order, int64_t t, int64_t end, int64_t (&element)[kRows]) {
  for (int i = 0; i < kRows; ++i) element[i] = order.first_element(t + i < end ? t + i : t);
}

// ---- rows_dot

// Adds columns [first, last) of rows t .. t+kRows-1 to ranks j .. j+7.
template <int W, bool kMasked, typename T>
ALIGN_INLINE void dot_tile(const RowsDot<T>& op, int64_t t, int64_t end, int64_t j, int64_t first, int64_t last) {
  using A = Acc<T>;
  constexpr int kRows = kTile<W> / kRanks, kLane = kLanes<A, W>;
  int64_t element[kRows];
  first_elements(op.order, t, end, element);
  Vec<A, W> sum[kTile<W>] = {};
  const auto add_columns = [&](int64_t c, auto load_x) ALIGN_INLINE_LAMBDA {
    Vec<A, W> xd[kRows];
    for (int i = 0; i < kRows; ++i) {
      xd[i] = mask<kMasked, W, A>(load_x(op.x + element[i] + c), op.keep, op.keep.index(op.order, element[i], c));
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
  for (int i = 0; i < kRows && t + i < end; ++i) {
    constexpr int kBytes = kRanks * sizeof(A);
    A* out = op.out.row(t + i) + j;
    store<kBytes>(out, load<kBytes>(out) + load<kBytes>(total + i * kRanks));
  }
}

template <int W, bool kMasked, typename T>
ALIGN_INLINE void rows_dot_tiles(const RowsDot<T>& op, int64_t begin, int64_t end) {
  constexpr int64_t kPanelBytes = 32 * 1024;  // eight ranks of a panel of a stay in the first-level cache
  constexpr int64_t kPanel = kPanelBytes / kRanks / sizeof(Acc<T>);
  for (int64_t t = begin; t < end; ++t) std::fill_n(op.out.row(t), op.out.stride, Acc<T>(0));
  for (int64_t first = 0; first < op.order.columns; first += kPanel) {
    const int64_t last = std::min(first + kPanel, op.order.columns);
    for (int64_t j = 0; j < op.out.stride; j += kRanks) {
      for (int64_t t = begin; t < end; t += kTile<W> / kRanks) {
        dot_tile<W, kMasked, T>(op, t, end, j, first, last);
      }
    }
  }
}

// ---- rank_add

// sum[i][v] = the products of one term, before scale and mask, for kRows rows and kVecs vectors of columns from c on.
template <int W, int kRows, int kVecs, typename A>
ALIGN_INLINE void term_products(const RankTerm<A>& term, int64_t t, int64_t end, int64_t c,
                                Vec<A, W> (&sum)[kRows][kVecs]) {
  const A* g[kRows];
  for (int i = 0; i < kRows; ++i) {
    g[i] = term.g.row(t + i < end ? t + i : t);
    for (int v = 0; v < kVecs; ++v) sum[i][v] = Vec<A, W>{};
  }
  for (int64_t j = 0; j < term.rank; ++j) {
    Vec<A, W> b[kVecs];
    for (int v = 0; v < kVecs; ++v) b[v] = load<W>(term.b.row(j) + c + v * kLanes<A, W>);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVecs; ++v) sum[i][v] += b[v] * g[i][j];
    }
  }
}

// Rows t .. t+3, kVecs vectors of columns from c on; unless kWhole only lanes columns of the last vector exist. The
// sums of the first term stay in registers; those of further terms (kMany) go through the stack.
template <int W, int kRows, int kVecs, bool kWhole, bool kMasked, bool kMany, typename T>
ALIGN_INLINE void add_tile(const RankAdd<T>& op, int64_t t, int64_t end, const int64_t (&element)[kRows], int64_t c,
                           int64_t lanes) {
  using A = Acc<T>;
  constexpr int kLane = kLanes<A, W>;
  const auto term_value = [&](const RankTerm<A>& term, const Vec<A, W>& sum, int i, int v) ALIGN_INLINE_LAMBDA {
    if (kMasked && !term.keep.bits) return term.scale * sum;
    return term.scale * mask<kMasked, W, A>(sum, term.keep, term.keep.index(op.order, element[i], c + v * kLane));
  };
  Vec<A, W> sum[kRows][kVecs];
  Vec<A, W> further[kRows][kVecs] = {};
  for (int64_t k = 1; kMany && k < op.count; ++k) {
    term_products<W>(op.terms[k], t, end, c, sum);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVecs; ++v) further[i][v] += term_value(op.terms[k], sum[i][v], i, v);
    }
  }
  term_products<W>(op.terms[0], t, end, c, sum);
  for (int i = 0; i < kRows; ++i) {
    if (t + i >= end) break;
    for (int v = 0; v < kVecs; ++v) {
      const int64_t e = element[i] + c + v * kLane;
      Vec<A, W> y = {};
      if (op.in) y = kWhole ? load<W>(op.in + e) : load_first<W>(op.in + e, lanes);
      if (op.bias) {
        const T* bias = op.bias + c + v * kLane;
        y += kWhole ? load<W>(bias) : load_first<W>(bias, lanes);
      }
      y += term_value(op.terms[0], sum[i][v], i, v);
      if (kMany) y += further[i][v];
      if (kWhole) {
        store<W>(op.out + e, y);
      } else {
        store_first<W>(op.out + e, y, lanes);
      }
    }
  }
}

template <int W, bool kMasked, bool kMany, typename T>
ALIGN_INLINE void rank_add_tiles(const RankAdd<T>& op, int64_t begin, int64_t end) {
  constexpr int kRows = 4, kVecs = kTile<W> / kRows;
  constexpr int64_t kLane = kLanes<Acc<T>, W>, kWide = kVecs * kLane;
  constexpr int64_t kPanel = 256;  // rank rows of a panel of b stay in the first-level cache, up to rank 32
  for (int64_t first = 0; first < op.order.columns; first += kPanel) {
    const int64_t last = std::min(first + kPanel, op.order.columns);
    for (int64_t t = begin; t < end; t += kRows) {
      int64_t element[kRows];
      first_elements(op.order, t, end, element);
      int64_t c = first;
      for (; c + kWide <= last; c += kWide) {
        add_tile<W, kRows, kVecs, true, kMasked, kMany, T>(op, t, end, element, c, kLane);
      }
      for (; c < last; c += kLane) {
        add_tile<W, kRows, 1, false, kMasked, kMany, T>(op, t, end, element, c, std::min(kLane, last - c));
      }
    }
  }
}

// ---- outer_add

// Ranks j .. j+7, kVecs vectors of columns from c on; unless kWhole only lanes columns of the last vector exist. g is
// that of rows begin .. end-1 and of these ranks.
template <int W, int kVecs, bool kWhole, bool kMasked, typename T>
ALIGN_INLINE void outer_tile(const OuterAdd<T>& op, Small<const Acc<T>> g, int64_t begin, int64_t end, int64_t j,
                             int64_t c, int64_t lanes) {
  using A = Acc<T>;
  constexpr int kLane = kLanes<A, W>;
  Vec<A, W> sum[kRanks][kVecs] = {};
  for (int64_t t = begin; t < end; ++t) {
    const int64_t element = op.order.first_element(t);
    const A* factor = g.row(t - begin);
    Vec<A, W> xd[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const int64_t column = c + v * kLane;
      const T* x = op.x + element + column;
      xd[v] = mask<kMasked, W, A>(kWhole ? load<W>(x) : load_first<W>(x, lanes), op.keep,
                                  op.keep.index(op.order, element, column));
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
        store<W>(w, load<W>(w) + op.scale * sum[k][v]);
      } else {
        store_first<W>(w, load_first<W>(w, lanes) + op.scale * sum[k][v], lanes);
      }
    }
  }
}

constexpr int64_t kOuterRows = 64;

// Ranks j .. j+7 of g in rows begin .. end-1, times their factors v if there are any; then they lie in product.
template <typename T, typename A = Acc<T>>
ALIGN_INLINE Small<const A> outer_factors(const OuterAdd<T>& op, int64_t begin, int64_t end, int64_t j,
                                          A (&product)[kOuterRows * kRanks]) {
  if (!op.v.data) return {op.g.row(begin) + j, op.g.stride};
  const int64_t ranks = std::min<int64_t>(kRanks, op.rank - j);
  for (int64_t t = begin; t < end; ++t) {
    A* row = product + (t - begin) * kRanks;
    std::fill_n(row, kRanks, A(0));
    for (int64_t k = 0; k < ranks; ++k) row[k] = op.g.row(t)[j + k] * op.v.row(t)[(j + k) / op.width];
  }
  return {product, kRanks};
}

// Partial sums over blocks of rows keep the rounding error of a long sum small, and their rows in the cache.
template <int W, bool kMasked, typename T>
ALIGN_INLINE void outer_add_tiles(const OuterAdd<T>& op, int64_t begin, int64_t end, int64_t first, int64_t last) {
  constexpr int64_t kVecs = kTile<W> / kRanks, kLane = kLanes<Acc<T>, W>, kWide = kVecs * kLane;
  Acc<T> product[kOuterRows * kRanks];
  for (int64_t t = begin; t < end; t += kOuterRows) {
    const int64_t stop = std::min(t + kOuterRows, end);
    for (int64_t j = 0; j < op.rank; j += kRanks) {
      const auto g = outer_factors(op, t, stop, j, product);
      int64_t c = first;
      for (; c + kWide <= last; c += kWide) outer_tile<W, kVecs, true, kMasked, T>(op, g, t, stop, j, c, kLane);
      for (; c < last; c += kLane) {
        outer_tile<W, 1, false, kMasked, T>(op, g, t, stop, j, c, std::min(kLane, last - c));
      }
    }
  }
}

}  // namespace

template <typename T>
void rows_dot(const RowsDot<T>& op, int64_t begin, int64_t end) {
  dispatch<T>(op.keep.bits, [&](auto width, auto masked)
                                ALIGN_INLINE_LAMBDA { rows_dot_tiles<width(), masked(), T>(op, begin, end); });
}

template <typename T>
void rank_add(const RankAdd<T>& op, int64_t begin, int64_t end) {
  const bool masked_terms = std::any_of(op.terms, op.terms + op.count, [](const auto& term) { return term.keep.bits; });
  if (op.count > 1) {
    dispatch<T>(masked_terms, [&](auto width, auto masked)
                                  ALIGN_INLINE_LAMBDA { rank_add_tiles<width(), masked(), true, T>(op, begin, end); });
  } else {
    dispatch<T>(masked_terms, [&](auto width, auto masked)
                                  ALIGN_INLINE_LAMBDA { rank_add_tiles<width(), masked(), false, T>(op, begin, end); });
  }
}

template <typename T>
void outer_add(const OuterAdd<T>& op, int64_t begin, int64_t end, int64_t first, int64_t last) {
  dispatch<T>(op.keep.bits, [&](auto width, auto masked) ALIGN_INLINE_LAMBDA {
    outer_add_tiles<width(), masked(), T>(op, begin, end, first, last);
  });
}

#define ALIGN_INSTANTIATE(T)                                   \
  template void rows_dot(const RowsDot<T>&, int64_t, int64_t); \
  template void rank_add(const RankAdd<T>&, int64_t, int64_t); \
  template void outer_add(const OuterAdd<T>&, int64_t, int64_t, int64_t, int64_t);
ALIGN_INSTANTIATE(float)
ALIGN_INSTANTIATE(double)
ALIGN_INSTANTIATE(bfloat16)
ALIGN_INSTANTIATE(float16)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
