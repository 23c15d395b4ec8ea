// Hands out aligned pieces of a kernel's workspace.
#pragma once

#include <cstdint>

#include "cpu/skinny.h"

namespace align::cpu {

// With a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(round_up(int64_t(reinterpret_cast<intptr_t>(base)), kAlignment)) {}

  template <typename A>
  A* take(int64_t count) {
    A* piece = reinterpret_cast<A*>(base_ + used_);
    used_ += round_up(count * int64_t(sizeof(A)), kAlignment);
    return piece;
  }
  // Rows begin an odd number of cache lines apart: a column of such a matrix lies in all sets of a cache, not in a few.
  template <typename A>
  Small<A> take_small(int64_t rows, int64_t columns) {
    const int64_t lines = ceil_div(columns * int64_t(sizeof(A)), kAlignment);
    const int64_t stride = (lines | 1) * kAlignment / int64_t(sizeof(A));
    return {take<A>(rows * stride), stride};
  }
  int64_t bytes() const { return used_ + kAlignment; }

 private:
  static constexpr int64_t kAlignment = 64;

  int64_t base_;
  int64_t used_ = 0;
};

}  // namespace align::cpu
