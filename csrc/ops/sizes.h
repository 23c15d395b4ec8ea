// How large the sizes of an operator may be, on every device. Kernels count rows, columns and ranks in 32 bits where
// registers are scarce, with room for a tile beyond the last one, and multiply them in 64: the bounds are such that no
// product of sizes of tensors that exist exceeds either. Sizes that nothing but an argument says are multiplied by
// product().
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

namespace align {

constexpr int64_t kMaxRows = (int64_t(1) << 31) - 1024;  // tokens
constexpr int64_t kMaxColumns = int64_t(1) << 30;        // in_dim, out_dim, and the rank of a loss's latents
constexpr int64_t kMaxCount = int64_t(1) << 16;          // tasks, groups, heads
constexpr int64_t kMaxRanks = int64_t(1) << 19;          // of all that one product holds: heads, offset path, router

// The product of sizes, the largest number instead of one that does not fit: such a tensor or workspace is refused
// where memory is taken.
constexpr int64_t product(std::initializer_list<int64_t> sizes) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  int64_t result = 1;
  for (const int64_t size : sizes) {
    if (size == 0) return 0;
    result = result > kMost / size ? kMost : result * size;
  }
  return result;
}

}  // namespace align
