// Allocates aligned pieces of the workspace of a kernel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/skinny.h"

namespace align::cpu {

// With a null base it only measures the workspace.
class Arena {
 public:
  explicit Arena(void* base) : base_(round_up(int64_t(reinterpret_cast<intptr_t>(base)), kAlignment)) {}

  template <typename A>
  A* allocate(int64_t count) {
    A* piece = reinterpret_cast<A*>(base_ + used_);
    used_ += round_up(count * int64_t(sizeof(A)), kAlignment);
    return piece;
  }
  // Allocates a matrix whose rows begin an odd number of cache lines apart, so that a column uses all sets of a cache.
  template <typename A>
  RowMajor<A> allocate_rows(int64_t rows, int64_t columns) {
    const int64_t lines = ceil_div(columns * int64_t(sizeof(A)), kAlignment);
    const int64_t stride = (lines | 1) * kAlignment / int64_t(sizeof(A));
    return {allocate<A>(rows * stride), stride};
  }
  // Goes on after the pieces of another arena, which began at the same place, too.
  void extend(const Arena& other) { used_ = std::max(used_, other.used_); }
  int64_t bytes() const { return used_ + kAlignment; }

 private:
  static constexpr int64_t kAlignment = 64;

  int64_t base_;
  int64_t used_ = 0;
};

}  // namespace align::cpu
