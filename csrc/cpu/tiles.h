// The tiles of the products of skinny.h: vector accumulators that stay in registers. A tile reads every operand once.
#pragma once

#include <algorithm>

#include "cpu/dropout.h"
#include "cpu/simd.h"
#include "cpu/skinny.h"

namespace align::cpu {

// The accumulators of most tiles take half of the registers: 32 with AVX-512 and NEON, 16 with AVX2 and SSE.
#if defined(__x86_64__)
template <int W>
constexpr int kTile = W == 64 ? 16 : 8;
#else
template <int W>
constexpr int kTile = 16;
#endif
// The vectors of a tile that are multiplied by so many factors each. Four factors take more of AVX2's registers: 12
// sums, 3 vectors and a factor; SSE, which has no multiply-add, needs one for the product.
template <int W>
constexpr int tile_vecs(int factors) {
  return W == 32 && factors == 4 ? 3 : kTile<W> / factors;
}
constexpr int kRanks = kRankAlign;  // ranks of a tile of rows_dot and outer_add

// How many rows ahead is prefetched: a few if rows are read one after the other, the next block if this one is in
// cache.
constexpr int64_t kNear = 8, kFar = kRowBlock;

// Returns the same value, but the compiler cannot compute with it earlier: addresses that are needed after a loop would
// take registers from it.
ALIGN_INLINE int64_t opaque(int64_t value) {
  asm("" : "+r"(value));
  return value;
}

// Into the second-level cache, or the first-level one.
ALIGN_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }
ALIGN_INLINE void prefetch_near(const void* address) { __builtin_prefetch(address, 0, 3); }

// Runs body(width) with a compile-time constant. double, for gradient checks only, always has 16-byte vectors.
template <typename T, typename Body>
void dispatch(const Body& body) {
  if constexpr (std::is_same_v<T, double>) {
    body(std::integral_constant<int, 16>{});
  } else {
    run_widest(body);
  }
}

// Runs body(width, masked) with compile-time constants.
template <typename T, typename Body>
void dispatch(bool masked, const Body& body) {
  if (masked) {
    dispatch<T>([&](auto width) ALIGN_INLINE_LAMBDA { body(width, std::true_type{}); });
  } else {
    dispatch<T>([&](auto width) ALIGN_INLINE_LAMBDA { body(width, std::false_type{}); });
  }
}

// The addresses of the rows of a block, and of the rows to prefetch meanwhile. Rows beyond the block repeat its last
// row.
template <typename T>
struct RowPointers {
  T* at[kRowBlock];
  T* ahead[kRowBlock];

  RowPointers(const RowBlock& rows, const TokenMatrix<T>& x, int64_t distance) {
    for (int64_t i = 0; i < kRowBlock; ++i) {
      const int64_t row = std::min(i, rows.count - 1);
      at[i] = x.row(rows.row(row));
      ahead[i] = x.row(rows.row_ahead(row, distance));
    }
  }
};

// The masks of a block's rows.
template <bool kMasked>
struct RowMasks {
  MaskRow at[kMasked ? kRowBlock : 1];

  RowMasks(const RowBlock& rows, const MaskBits& mask) {
    for (int64_t i = 0; kMasked && mask.bytes && i < kRowBlock; ++i) {
      const int64_t row = std::min(i, rows.count - 1);
      at[i] = mask_row(mask.bytes, mask.begin(rows, row) + mask.first);
    }
  }

  // Sets the dropped elements of v to zero. v holds the columns of row i from c on.
  template <int W, typename A>
  ALIGN_INLINE Vec<A, W> apply(const Vec<A, W>& v, int64_t i, int64_t c) const {
    if constexpr (kMasked) {
      return zero_dropped<W, A>(v, at[i], c);
    } else {
      return v;
    }
  }
};

}  // namespace align::cpu
