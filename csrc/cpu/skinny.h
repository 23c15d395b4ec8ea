// Skinny products: one dimension, the rank, is small. They work on a block of rows of a token matrix x or y.
//
// clang-format off
//   rows_dot   out[i,j]    = sum_c xd[i,c] a[j,c]                                shrink, and dz = dy B
//   rank_add   y[i,c]      = y_in[i,c] + bias[c]
//                            + sum over terms of scale m[i,c] sum_j g[i,j] b[j,c] expand, and dx
//   outer_add  outer[j,c] += sum_i g[i,j] xd[i,c]                                dA and dB
//   dot_outer  out[i,j]    = sum_c x[i,c] bt[c,j], and
//              outer[j,c] += sum_i g[i,j] x[i,c]                                 dz and dB of many ranks in one pass
//   add_up     sums[j,c]   = scale sum_k partials[k][j,c]                        adds the results of several outer_adds
// clang-format on
//
// xd is x with dropped elements set to zero, and m is 0 or 1; the factor 1/(1-p) of dropout is part of the scales.
// Token matrices have type T, all other matrices Acc<T>. The products run on the calling thread with the widest vectors
// of the processor, and the order of every sum depends on the processor and the shapes alone. They prefetch later rows
// while they compute: rows are far apart in memory, and the processor does not predict these accesses well.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops/dtype.h"

namespace align::cpu {

constexpr int64_t kRankAlign =
    8;  // the ranks of a and out are padded with zeros to a multiple of this, those of g at will
constexpr int64_t kColumnAlign = 16;  // the columns of a and b are padded with zeros to a multiple of this
constexpr int64_t kRowBlock = 64;     // the most rows of a block

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
constexpr int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// A row-major matrix whose rows lie stride elements apart.
template <typename A>
struct RowMajor {
  A* data;
  int64_t stride;

  A* row(int64_t i) const { return data + i * stride; }
  operator RowMajor<const A>() const { return {data, stride}; }
};

// Rows first .. first + count - 1 of a sequence of rows, which has `end` rows.
struct RowBlock {
  const int64_t* order;  // row i of the sequence is row order[i] in memory; null: row i
  int64_t first, count, end;

  int64_t row(int64_t i) const { return order ? order[first + i] : first + i; }
  int64_t row_ahead(int64_t i, int64_t distance) const { return row(std::min(i + distance, end - 1 - first)); }
};

inline RowBlock all_rows(int64_t rows) { return {nullptr, 0, rows, rows}; }

// A row-major matrix [tokens, columns], or some columns of one.
template <typename T>
struct TokenMatrix {
  T* data;
  int64_t columns;
  int64_t stride = columns;  // elements from one row to the next

  T* row(int64_t row) const { return data + row * stride; }
};

// The dropout bits of a block of rows (dropout.h). A row may have several masks; the bits then have the order (row,
// mask, column). Rows whose numbers follow one another are drawn together.
struct MaskBits {
  const uint8_t* bytes = nullptr;      // null: no dropout
  int64_t row_bytes = 0;               // distance between the rows of a block, if they are drawn one by one
  int64_t row_elements = 0;            // elements of all masks of a row
  int64_t first = 0;                   // the element of column 0 of this mask
  int64_t row_numbers = row_elements;  // dropout numbers from one row to the next
  int64_t first_number = 0;            // of element 0 of row 0

  int64_t number(int64_t row) const { return first_number + row * row_numbers; }
  bool one_by_one(const RowBlock& rows) const { return rows.order || row_numbers != row_elements; }
  // The number of the bit of element 0 of row i of the block.
  int64_t begin(const RowBlock& rows, int64_t i) const {
    if (one_by_one(rows)) return 8 * i * row_bytes + number(rows.row(i)) % 8;
    return number(rows.first) % 8 + i * row_elements;
  }
};

template <typename T>
struct RowsDot {
  RowBlock rows;
  TokenMatrix<const T> x;
  MaskBits mask = {};  // mask on x
  RowMajor<const Acc<T>> a;
  RowMajor<Acc<T>> out;             // assigned
  int64_t rank;                     // out has it rounded up to kRankAlign
  const bfloat16* tiles = nullptr;  // the tiles of a (bf16/units.h), or null
};
template <typename T>
void rows_dot(const RowsDot<T>& op);

// One term m * scale * g b of rank_add, in which m is the mask.
template <typename A>
struct RankTerm {
  MaskBits mask = {};  // mask on out
  RowMajor<A> g;       // kRowBlock rows; rows beyond the block have no effect
  RowMajor<A> b;
  int64_t rank;
  A scale;
  const bfloat16* tiles = nullptr;  // the tiles of b (bf16/units.h), or null
};

template <typename T>
struct RankAdd {
  RowBlock rows;
  const T* in;         // of the shape of out, or null: zero; may be out
  TokenMatrix<T> out;  // assigned with one rounding for all terms
  const RankTerm<Acc<T>>* terms;
  int64_t count;                // number of terms, at least 1
  const T* bias = nullptr;      // [columns], added to every row, or null: zero
  bfloat16* factors = nullptr;  // scratch for a bfloat16 unit: factor_tiles of all terms
};
template <typename T>
void rank_add(const RankAdd<T>& op);

template <typename T>
struct OuterAdd {
  RowBlock rows;
  TokenMatrix<const T> x;
  MaskBits mask = {};  // mask on x
  RowMajor<const Acc<T>> g;
  int64_t rank;
  RowMajor<Acc<T>> outer;       // accumulated into
  bool first;                   // outer is assigned instead
  bfloat16* factors = nullptr;  // scratch for a bfloat16 unit: factor_tiles(rank)
};
template <typename T>
void outer_add(const OuterAdd<T>& op);

// rows_dot with the transpose bt of a, and outer_add, for ranks that fill whole vectors.
template <typename T>
struct DotOuter {
  RowBlock rows;
  TokenMatrix<const T> x;
  RowMajor<const Acc<T>> bt;  // [columns, rank padded with zeros to a multiple of kColumnAlign]
  RowMajor<Acc<T>> out;       // assigned, kRowBlock rows, padded like bt
  int64_t rank;               // rank of bt and out
  RowMajor<const Acc<T>> g;
  int64_t outer_rank;
  RowMajor<Acc<T>> outer;           // accumulated into
  bool first;                       // outer is assigned instead
  const bfloat16* tiles = nullptr;  // the tiles of the transpose of bt (bf16/units.h), or null
  bfloat16* factors = nullptr;      // scratch for a bfloat16 unit: factor_tiles(outer_rank)
};
template <typename T>
void dot_outer(const DotOuter<T>& op);

// count is at least 1. The partials may be read up to a multiple of kColumnAlign columns.
template <typename A>
void add_up(const RowMajor<const A>* partials, int64_t count, A scale, int64_t rows, int64_t columns, RowMajor<A> sums);

}  // namespace align::cpu
