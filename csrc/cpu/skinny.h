// Products with one small dimension, the rank, over rows of a big operand x or y:
//
//   rows_dot   out[t,j]  = sum_c xd[t,c] a[j,c]                            shrink, and its twin dz = dy B
//   rank_add   y[t,c]    = y_in[t,c] + bias[c] + scale m[t,c] sum_j g[t,j] b[j,c]    expand, and dx
//   outer_add  w[j,c]   += scale sum_t g[t,j] xd[t,c]                      dA and dB
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

  int64_t first_element(int64_t i) const { return (rows ? rows[i] : i) * columns; }
};

template <typename T>
struct RowsDot {
  RowOrder order;
  const T* x;
  const uint8_t* keep;  // dropout bits of x, or null: no dropout
  Small<const Acc<T>> a;
  Small<Acc<T>> out;  // assigned, columns 0 .. stride-1
};
template <typename T>
void rows_dot(const RowsDot<T>& op, int64_t begin, int64_t end);

template <typename T>
struct RankAdd {
  RowOrder order;
  const T* in;          // or null: zero; may be out
  T* out;               // assigned
  const uint8_t* keep;  // dropout bits of out, or null: no dropout
  Small<const Acc<T>> g;
  Small<const Acc<T>> b;
  int64_t rank;
  Acc<T> scale;
  const T* bias = nullptr;  // [columns], added to every row, or null: zero
};
template <typename T>
void rank_add(const RankAdd<T>& op, int64_t begin, int64_t end);

template <typename T>
struct OuterAdd {
  RowOrder order;
  const T* x;
  const uint8_t* keep;  // dropout bits of x, or null: no dropout
  Small<const Acc<T>> g;
  int64_t rank;
  Acc<T> scale;
  Small<Acc<T>> w;  // accumulated into
};
// Rows [begin, end), columns [first, last).
template <typename T>
void outer_add(const OuterAdd<T>& op, int64_t begin, int64_t end, int64_t first, int64_t last);

}  // namespace align::cpu
