// The largest sizes of an operator, on every device. Where registers are scarce, kernels count rows, columns and ranks
// in 32 bits, with room for a tile beyond the last one; they multiply them in 64 bits. With these bounds neither
// overflows for tensors that exist. Sizes that only an argument gives are multiplied by product().
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

namespace align {

constexpr int64_t kMaxRows = (int64_t(1) << 31) - 1024;  // tokens
constexpr int64_t kMaxColumns = int64_t(1) << 30;        // in_dim, out_dim, and the rank of a loss's latents
constexpr int64_t kMaxCount = int64_t(1) << 16;          // tasks, groups, heads
constexpr int64_t kMaxRanks = int64_t(1) << 19;          // of all heads, the offset path and the router together

// The product of sizes, or the largest number if it overflows: such a tensor or workspace is refused when its memory is
// allocated.
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
