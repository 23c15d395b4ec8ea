// Products with one small dimension, the rank, over rows of a big operand x or y:
//
//   rows_dot   out[t,j]  = sum_c xd[t,c] a[j,c]                            shrink, and its twin dz = dy B
//   rank_add   y[t,c]    = y_in[t,c] + bias[c] + sum over terms of scale m[t,c] sum_j g[t,j] b[j,c]    expand, and dx
//   outer_add  w[j,c]   += scale sum_t v[t, j / width] g[t,j] xd[t,c]      dA and dB
//
// xd is x with dropped elements zeroed and m is 0 or 1; dropout's 1/(1-p) is part of the scales. Big operands are of
// type T; the small ones (a, b, g, w) are Acc<T>. They run on the calling thread, on the widest vectors there are,
// and the order of every sum depends on the shapes alone.
#pragma once

#include <cstdint>

#include "ops/dtype.h"

namespace align::cpu {

constexpr int64_t kRankAlign = 8;     // a, out and g have their ranks padded with zeros to a multiple of this
constexpr int64_t kColumnAlign = 16;  // a and b have their columns padded with zeros to a multiple of this
constexpr int64_t kRowBlock = 32;     // rows worth one call of rows_dot and rank_add: they share a pass over a and b
constexpr int64_t kColumnBlock = 64;  // columns [first, last) of outer_add begin at a multiple of this

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
constexpr int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// A small row-major matrix.
template <typename A>
struct Small {
  A* data;
  int64_t stride;

  A* row(int64_t i) const { return data + i * stride; }
  operator Small<const A>() const { return {data, stride}; }
};

// Where the rows of a big matrix lie, row i of the order being row rows[i] of memory.
struct RowOrder {
  const int64_t* rows;  // or null: i itself
  int64_t columns;
  int64_t stride = columns;  // elements from one row of memory to the next

  int64_t first_element(int64_t i) const { return (rows ? rows[i] : i) * stride; }
};

// The dropout bits of a big matrix: of the whole of it, or of one of several heads, each with a mask of its own, in
// the order (row, head, column); the matrix has no gaps between its rows.
struct KeepBits {
  const uint8_t* bits = nullptr;  // or null: no dropout
  int64_t heads = 1;
  int64_t head = 0;

  // The bit of element first + c of a row that begins at first.
  int64_t index(const RowOrder& order, int64_t first, int64_t c) const {
    return first * heads + head * order.columns + c;
  }
};

template <typename T>
struct RowsDot {
  RowOrder order;
  const T* x;
  KeepBits keep;  // of x
  Small<const Acc<T>> a;
  Small<Acc<T>> out;  // assigned, columns 0 .. stride-1
};
template <typename T>
void rows_dot(const RowsDot<T>& op, int64_t begin, int64_t end);

// m * scale * g b; m is that of keep.
template <typename A>
struct RankTerm {
  KeepBits keep;  // of out
  Small<A> g;
  Small<A> b;
  int64_t rank;
  A scale;
};

template <typename T>
struct RankAdd {
  RowOrder order;
  const T* in;  // or null: zero; may be out
  T* out;       // assigned, one rounding for all terms
  const RankTerm<Acc<T>>* terms;
  int64_t count;            // of terms, at least 1
  const T* bias = nullptr;  // [columns], added to every row, or null: zero
};
template <typename T>
void rank_add(const RankAdd<T>& op, int64_t begin, int64_t end);

template <typename T>
struct OuterAdd {
  RowOrder order;
  const T* x;
  KeepBits keep;  // of x
  Small<const Acc<T>> g;
  int64_t rank;
  Acc<T> scale;
  Small<Acc<T>> w;             // accumulated into
  Small<const Acc<T>> v = {};  // factors of g, one for every width ranks, or null: 1
  int64_t width = 1;
};
// Rows [begin, end), columns [first, last).
template <typename T>
void outer_add(const OuterAdd<T>& op, int64_t begin, int64_t end, int64_t first, int64_t last);

}  // namespace align::cpu
