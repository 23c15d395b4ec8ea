// What the products of skinny.h are made of: tiles of vector accumulators that stay in registers. A tile reads every
// operand once and does eight or more multiply-adds for a vector of x.
#pragma once

#include <algorithm>

#include "cpu/dropout.h"
#include "cpu/simd.h"
#include "cpu/skinny.h"

namespace align::cpu {

// Accumulators of a tile: half of the 32 registers of AVX-512 and NEON, or of the 16 of AVX2 and SSE.
#if defined(__x86_64__)
template <int W>
constexpr int kTile = W == 64 ? 16 : 8;
#else
template <int W>
constexpr int kTile = 16;
#endif
constexpr int kRanks = kRankAlign;  // ranks of a tile of rows_dot and outer_add

// Rows between what is computed and what is prefetched: a few where rows come one after the other, and the next block
// where this one is in cache already.
constexpr int64_t kNear = 8, kFar = kRowBlock;

// The same value, from which nothing can be computed earlier: addresses that are needed after a loop would take
// registers from it.
ALIGN_INLINE int64_t opaque(int64_t value) {
  asm("" : "+r"(value));
  return value;
}

ALIGN_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// Runs body(width) with a compile-time constant. Double, which only gradient checks use, has no wide version.
template <typename T, typename Body>
void dispatch(const Body& body) {
  if constexpr (std::is_same_v<T, double>) {
    body(std::integral_constant<int, 16>{});
  } else {
    run_widest(body);
  }
}

// Runs body(width, masked), likewise.
template <typename T, typename Body>
void dispatch(bool masked, const Body& body) {
  if (masked) {
    dispatch<T>([&](auto width) ALIGN_INLINE_LAMBDA { body(width, std::true_type{}); });
  } else {
    dispatch<T>([&](auto width) ALIGN_INLINE_LAMBDA { body(width, std::false_type{}); });
  }
}

// Where the rows of a block, and those to prefetch meanwhile, begin. Rows beyond the block's are its last.
template <typename T>
struct RowPointers {
  T* at[kRowBlock];
  T* ahead[kRowBlock];

  RowPointers(const RowBlock& rows, const Tall<T>& x, int64_t distance) {
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
  KeptRow at[kMasked ? kRowBlock : 1];

  RowMasks(const RowBlock& rows, const KeepBits& keep) {
    for (int64_t i = 0; kMasked && keep.bytes && i < kRowBlock; ++i) {
      const int64_t row = std::min(i, rows.count - 1);
      at[i] = kept_row(keep.bytes, keep.begin(rows, row) + keep.first);
    }
  }

  // v, columns c .. of row i, with the dropped ones zeroed.
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
