// Products with one small dimension, the rank, over a block of rows of a big matrix x or y:
//
//   rows_dot   out[i,j]  = sum_c xd[i,c] a[j,c]                            shrink, and its twin dz = dy B
//   rank_add   y[i,c]    = y_in[i,c] + bias[c] + sum over terms of scale m[i,c] sum_j g[i,j] b[j,c]    expand, and dx
//   outer_add  w[j,c]   += sum_i g[i,j] xd[i,c]                            dA and dB
//   dot_outer  out[i,j]  = sum_c x[i,c] bt[c,j], w[j,c] += sum_i g[i,j] x[i,c]   dz and dB of more ranks, dy read once
//   add_up     w[c]      = scale sum_k parts[k][c]                         what several outer_adds made
//
// xd is x with dropped elements zeroed and m is 0 or 1; dropout's 1/(1-p) is part of the scales. Big matrices are of
// type T; the small ones (a, b, g, out, w) are Acc<T>. The products run on the calling thread, on the widest vectors
// there are, and the order of every sum depends on the shapes alone. They ask the cache for rows further on while they
// compute: a row is far from the next in memory, and the processor does not guess that well.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/dtype.h"

namespace align::cpu {

constexpr int64_t kRankAlign = 8;     // a, out and g have their ranks padded with zeros to a multiple of this
constexpr int64_t kColumnAlign = 16;  // a and b have their columns padded with zeros to a multiple of this
constexpr int64_t kRowBlock = 64;     // rows of a block, at most

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

// Rows first .. first + count - 1 of an order of rows that has end of them.
struct RowBlock {
  const int64_t* order;  // row i of the order is row order[i] of memory; null: i itself
  int64_t first, count, end;

  int64_t row(int64_t i) const { return order ? order[first + i] : first + i; }
  int64_t row_ahead(int64_t i, int64_t distance) const { return row(std::min(i + distance, end - 1 - first)); }
};

inline RowBlock all_rows(int64_t rows) { return {nullptr, 0, rows, rows}; }

// A big row-major matrix, or some columns of one.
template <typename T>
struct Tall {
  T* data;
  int64_t columns;
  int64_t stride = columns;  // elements from one row to the next

  T* row(int64_t row) const { return data + row * stride; }
};

// The dropout bits of a block of rows (dropout.h): of the whole of each row, or of one of the parts that have a mask of
// their own, in the order (row, part, column). Rows that come one after the other are drawn together.
struct KeepBits {
  const uint8_t* bytes = nullptr;  // or null: no dropout
  int64_t row_bytes = 0;           // from one row of the block to the next, if rows have an order
  int64_t row_elements = 0;        // of all parts
  int64_t first = 0;               // element of a row that column 0 is

  // The bit that element 0 of row i of the block is.
  int64_t begin(const RowBlock& rows, int64_t i) const {
    if (rows.order) return 8 * i * row_bytes + rows.row(i) * row_elements % 8;
    return rows.first * row_elements % 8 + i * row_elements;
  }
};

template <typename T>
struct RowsDot {
  RowBlock rows;
  Tall<const T> x;
  KeepBits keep;  // of x
  Small<const Acc<T>> a;
  Small<Acc<T>> out;                // assigned
  int64_t rank;                     // rounded up to kRankAlign
  const bfloat16* tiles = nullptr;  // of a (amx/amx.h), or null
};
template <typename T>
void rows_dot(const RowsDot<T>& op);

// m * scale * g b; m is that of keep.
template <typename A>
struct RankTerm {
  KeepBits keep;  // of out
  Small<A> g;     // kRowBlock rows, though those beyond the block's count for nothing
  Small<A> b;
  int64_t rank;
  A scale;
  const bfloat16* tiles = nullptr;  // of b (amx/amx.h), or null
};

template <typename T>
struct RankAdd {
  RowBlock rows;
  const T* in;  // like out, or null: zero; may be out
  Tall<T> out;  // assigned, one rounding for all terms
  const RankTerm<Acc<T>>* terms;
  int64_t count;                // of terms, at least 1
  const T* bias = nullptr;      // [columns], added to every row, or null: zero
  bfloat16* factors = nullptr;  // scratch if the terms have tiles: their factor_tiles
};
template <typename T>
void rank_add(const RankAdd<T>& op);

template <typename T>
struct OuterAdd {
  RowBlock rows;
  Tall<const T> x;
  KeepBits keep;  // of x
  Small<const Acc<T>> g;
  int64_t rank;
  Small<Acc<T>> w;              // accumulated into
  bool first;                   // w is assigned instead
  bfloat16* factors = nullptr;  // scratch for AMX: factor_tiles(rank)
};
template <typename T>
void outer_add(const OuterAdd<T>& op);

// rows_dot of a, given as its transpose bt, and outer_add, for ranks that fill vectors of their own.
template <typename T>
struct DotOuter {
  RowBlock rows;
  Tall<const T> x;
  Small<const Acc<T>> bt;  // [columns, rank padded with zeros to a multiple of kColumnAlign]
  Small<Acc<T>> out;       // assigned, kRowBlock rows, padded like bt
  int64_t rank;            // of bt and out
  Small<const Acc<T>> g;
  int64_t w_rank;
  Small<Acc<T>> w;                  // accumulated into
  bool first;                       // w is assigned instead
  const bfloat16* tiles = nullptr;  // of bt's transpose (amx/amx.h), or null
  bfloat16* factors = nullptr;      // scratch if there are tiles: factor_tiles(w_rank)
};
template <typename T>
void dot_outer(const DotOuter<T>& op);

// count parts, at least 1, that may be read up to a multiple of kColumnAlign columns.
template <typename A>
void add_up(const A* const* parts, int64_t count, A scale, int64_t columns, A* w);

}  // namespace align::cpu
