// The small operands of a product in the accumulation type, padded with zeros: clear, then add what they consist of.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/skinny.h"
#include "ops/convert.h"

namespace align::cpu {

constexpr int64_t kPrepareColumns = 256;  // a unit of work

// A small matrix as the user gave it, or its transpose.
template <typename T>
struct Operand {
  const T* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
};

template <typename A>
void clear_columns(Small<A> target, int64_t rows, int64_t first, int64_t last) {
  for (int64_t j = 0; j < rows; ++j) {
    std::fill(target.row(j) + std::min(first, target.stride), target.row(j) + std::min(last, target.stride), A(0));
  }
}

template <typename T>
void add_columns(const Operand<T>& operand, Small<Acc<T>> target, int64_t first, int64_t last) {
  for (int64_t j = 0; j < operand.rows; ++j) {
    const T* source = operand.data + j * operand.row_stride;
    Acc<T>* row = target.row(j);
    for (int64_t c = first; c < std::min(last, operand.columns); ++c)
      row[c] += widen(source[c * operand.column_stride]);
  }
}

}  // namespace align::cpu
