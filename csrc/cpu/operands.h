// Converts adapters to the accumulation type, padded with zeros: clear the target, then add each matrix to it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/skinny.h"
#include "ops/convert.h"

namespace align::cpu {

constexpr int64_t kPackColumns = 256;  // columns that a thread packs at a time

// A row-major matrix of an adapter, as the user gave it.
template <typename T>
struct Operand {
  const T* data;
  int64_t rows, columns;

  const T* row(int64_t i) const { return data + i * columns; }
};

template <typename A>
void clear_columns(RowMajor<A> target, int64_t rows, int64_t first, int64_t last) {
  for (int64_t j = 0; j < rows; ++j) {
    std::fill(target.row(j) + std::min(first, target.stride), target.row(j) + std::min(last, target.stride), A(0));
  }
}

// A value of an adapter, rounded to T.
template <typename T, typename TA>
ALIGN_INLINE Acc<T> rounded(TA value) {
  if constexpr (std::is_same_v<T, TA>) {
    return widen(value);
  } else {
    return widen(narrow<T>(value));
  }
}

// Adds columns [first, last) of rows from..to-1 of a matrix, rounded to T, to rows from..to-1 of target.
template <typename T, typename TA>
void add_columns(const Operand<TA>& operand, RowMajor<Acc<T>> target, int64_t from, int64_t to, int64_t first,
                 int64_t last) {
  for (int64_t j = from; j < std::min(to, operand.rows); ++j) {
    const TA* source = operand.row(j);
    Acc<T>* row = target.row(j);
    for (int64_t c = first; c < std::min(last, operand.columns); ++c) row[c] += rounded<T>(source[c]);
  }
}

// Transposes 4 x 4 elements.
ALIGN_INLINE void transpose(Vec<float, 16> (&rows)[4]) {
  const auto a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const auto b = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const auto c = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const auto d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  rows[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  rows[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

template <typename T, typename TA>
ALIGN_INLINE void add_transposed_blocks(const Operand<TA>& operand, RowMajor<Acc<T>> target, int64_t first,
                                        int64_t last) {
  last = std::min(last, operand.rows);
  // In blocks of 4 x 4, since a column of the operand lies in as many cache lines as it has elements.
  constexpr int64_t kBlock = std::is_same_v<Acc<T>, float> ? 4 : 1;
  for (int64_t c = first; c < last; c += kBlock) {
    int64_t j = 0;
    if constexpr (kBlock == 4) {
      for (; c + kBlock <= last && j + kBlock <= operand.columns; j += kBlock) {
        Vec<float, 16> block[kBlock];
        for (int64_t i = 0; i < kBlock; ++i) {
          block[i] = load<16>(operand.row(c + i) + j);
          if constexpr (!std::is_same_v<T, TA>) {
            T narrowed[kBlock];
            store<16>(narrowed, block[i]);
            block[i] = load<16>(narrowed);
          }
        }
        transpose(block);
        for (int64_t k = 0; k < kBlock; ++k) {
          float* to = target.row(j + k) + c;
          store<16>(to, load<16>(to) + block[k]);
        }
      }
    }
    for (; j < operand.columns; ++j) {
      for (int64_t i = c; i < std::min(c + kBlock, last); ++i) target.row(j)[i] += rounded<T>(operand.row(i)[j]);
    }
  }
}

// Adds columns [first, last) of the transpose of a matrix, rounded to T, to target.
template <typename T, typename TA>
void add_transpose(const Operand<TA>& operand, RowMajor<Acc<T>> target, int64_t first, int64_t last) {
  run_widest([&](auto) ALIGN_INLINE_LAMBDA { add_transposed_blocks<T, TA>(operand, target, first, last); });
}

}  // namespace align::cpu
