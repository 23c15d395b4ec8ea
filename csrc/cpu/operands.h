// Converts adapters to the accumulation type, padded with zeros: clear the target, then add each matrix to it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/skinny.h"
#include "ops/convert.h"

namespace align::cpu {

constexpr int64_t kPackColumns = 256;  // columns that a thread packs at a time

// An adapter as the user gave it, or its transpose.
template <typename T>
struct Operand {
  const T* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
};

template <typename A>
void clear_columns(RowMajor<A> target, int64_t rows, int64_t first, int64_t last) {
  for (int64_t j = 0; j < rows; ++j) {
    std::fill(target.row(j) + std::min(first, target.stride), target.row(j) + std::min(last, target.stride), A(0));
  }
}

// Adds columns [first, last) of a matrix, rounded to T.
template <typename T, typename TA>
void add_columns(const Operand<TA>& operand, RowMajor<Acc<T>> target, int64_t first, int64_t last) {
  for (int64_t j = 0; j < operand.rows; ++j) {
    const TA* source = operand.data + j * operand.row_stride;
    Acc<T>* row = target.row(j);
    for (int64_t c = first; c < std::min(last, operand.columns); ++c) {
      const TA value = source[c * operand.column_stride];
      if constexpr (std::is_same_v<T, TA>) {
        row[c] += widen(value);
      } else {
        row[c] += widen(narrow<T>(value));
      }
    }
  }
}

}  // namespace align::cpu
