// The three products of a tile by ordinary fused multiply-adds, for float and, before sm_80, for 16-bit types. Same
// functions as mma.cuh. A thread reads four neighbouring operands at a time and uses each several times. The sum of a
// tile is computed separately and then added, because rounding grows with the length of a sum.
#pragma once

#include "cuda/tile.cuh"

namespace align::cuda {

__device__ __forceinline__ void load4(float (&to)[4], const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
template <typename T>
__device__ __forceinline__ void load4(float (&to)[4], const T* from) {
  const uint2 four = *reinterpret_cast<const uint2*>(from);
  to[0] = low_half(four.x, T{}), to[1] = high_half(four.x, T{});
  to[2] = low_half(four.y, T{}), to[3] = high_half(four.y, T{});
}
// One mask for the 16 rows that a warp has of a tile. Lane 2 i + h draws half h of row i and holds its bits.
template <typename T>
struct TileMask {
  static constexpr int kHalf = kTileCols<T> / 2, kBlocks = kHalf / kPhiloxLanes;
  struct Drawn {
    uint32_t bits = 0;

    // Bit c of the result says whether column + c of a row is kept, within one half of the row. All lanes of the warp
    // must call it.
    __device__ __forceinline__ uint32_t word(int row, int column) const {
      return __shfl_sync(kAllLanes, bits, 2 * row + column / kHalf) >> column % kHalf;
    }
  };
  static constexpr int kRows = 4;
  int row[kRows];  // of dot and add, or -1
  int drawn_row, half;

  __device__ TileMask(const RowTile& tile, int first_row) {
    const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kRows; ++i) row[i] = tile.row_or_none(first_row + lane / 8 + 4 * i);
    drawn_row = tile.row_or_none(first_row + lane / 2), half = lane % 2;
  }
  __device__ Drawn of(const Dropout& dropout, const RankMasks& masks, int index, int64_t cols, int64_t col) const {
    Drawn drawn;
    uint64_t element[kBlocks];
    PhiloxBlock lanes[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      element[i] = int64_t(drawn_row) * (masks.count * cols) + (index * cols + col + half * kHalf + i * kPhiloxLanes);
    }
    draw(dropout, element, lanes);
#pragma unroll
    for (int w = 0; w < 4 * kBlocks; ++w) {
      const uint32_t word = lanes[w / 4].word[w % 4];
      drawn.bits |= uint32_t(dropout.keeps_low(word)) << 2 * w | uint32_t(dropout.keeps_high(word)) << (2 * w + 1);
    }
    return drawn;
  }
};

// Sets the elements whose bit is 0 to zero.
__device__ __forceinline__ void zero_dropped(float (&v)[4], uint32_t bits) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = bits >> i & 1u ? v[i] : 0.f;
}

template <typename T, int kRank_>
struct Ffma {
  using Element = T;
  static constexpr int kRank = kRank_;
  static constexpr bool kTensorCores = false;
  static constexpr int kStages = 2;  // sm_75 has 64 KiB of shared memory for a block
  static constexpr int kStride = kTileStride<T>, kPieceRow = kPieceStride<T, kRank>,
                       kLatentRow = kLatentStride<T, kRank>;
  // dot: lane 8 a + b has rows a + 4 i and ranks b + 8 j. add: rows a + 4 i and a unit of 16 bytes.
  static constexpr int kRows = TileMask<T>::kRows, kRanks = kRank / 8, kRanksAtOnce = 2;
  static constexpr int kGroups = kTileCols<T> / 32;
  // outer: a warp has kGroups groups of 4 columns. Its lanes are divided over the groups, the ranks and the rows.
  static constexpr int kOuterRanks = 4, kRankLanes = kRank / kOuterRanks, kRowLanes = kWarp / kRankLanes / kGroups;

  struct Dot {
    float v[kRows][kRanks];
  };
  struct Add {
    float v[kRows][kGroups][4];
  };
  struct Outer {
    float v[kOuterRanks][4];
  };
  using DotMask = TileMask<T>;
  using AddMask = TileMask<T>;
  // outer takes so many rows of a tile at once: registers are scarce.
  static constexpr int kOuterRows = sizeof(T) == 2 ? kTileRows / 4 : kTileRows / 2;
  static constexpr int kStripSize = 0;
  struct OuterMask {
    StripMask<T, kWarp> rows;
    bool drawn;
    uint32_t bits = 0;  // bit kUnit<T> * i + c: whether column c of row lane + 32 i is kept

    __device__ OuterMask(const Dropout& dropout, bool is_drawn, T* memory)
        : rows(dropout, is_drawn, memory), drawn(is_drawn) {}
    __device__ __forceinline__ void draw(const RowTile& tile, const RankMasks& masks, int index, int64_t cols,
                                         int64_t col, int first) {
#pragma unroll 1
      for (int i = kOuterRows / kWarp - 1; i >= 0; --i) {
        rows.draw(tile, masks, index, cols, col, first + i * kWarp);
#pragma unroll
        for (int w = kUnit<T> / 2 - 1; w >= 0; --w) {
          const uint32_t word = rows.lanes[0].word[w];
          bits = bits << 2 | uint32_t(rows.dropout.keeps_high(word)) << 1 | uint32_t(rows.dropout.keeps_low(word));
        }
      }
    }
  };
  static constexpr int kDotRows = kRows, kDotCols = kRanks, kDotLanes = 8;

  static __device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
  static __device__ __forceinline__ int dot_row(int i) { return lane() / 8 + 4 * i; }
  static __device__ __forceinline__ int dot_col(int j) { return lane() % 8 + 8 * j; }
  static __device__ __forceinline__ float dot_at(const Dot& acc, int i, int j) { return acc.v[i][j]; }
  static __device__ __forceinline__ int warp() { return int(threadIdx.x) / kWarp; }

  static __device__ __forceinline__ void dot(Dot& acc, const T* x, const T* m, int begin, int end,
                                             const typename DotMask::Drawn* mask = nullptr) {
    x += lane() / 8 * kStride;
    m += lane() % 8 * kPieceRow;
#pragma unroll
    for (int first = 0; first < kRanks; first += kRanksAtOnce) {
      if (8 * (first + kRanksAtOnce) <= begin || 8 * first >= end) continue;
      float sum[kRows][kRanksAtOnce] = {};
#pragma unroll 1
      for (int c = 0; c < kTileCols<T>; c += 4) {
        float xs[kRows][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) load4(xs[i], x + 4 * i * kStride + c);
        if (mask) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) zero_dropped(xs[i], mask->word(dot_row(i), c));
        }
#pragma unroll
        for (int j = 0; j < kRanksAtOnce; ++j) {
          float ms[4];
          load4(ms, m + 8 * (first + j) * kPieceRow + c);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[i][j] += xs[i][e] * ms[e];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kRanksAtOnce; ++j) {
          const int rank = 8 * (first + j);
          if (begin <= rank && rank < end) acc.v[i][first + j] += sum[i][j];
        }
      }
    }
  }

  static __device__ __forceinline__ void add(Add& acc, const T* g, const T* m, int begin, int end,
                                             const typename AddMask::Drawn* mask = nullptr) {
    g += lane() / 8 * kLatentRow;
    m += add_column(0);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float sum[kRows][4] = {};
#pragma unroll 1
      for (int k = begin; k < end; k += 4) {
        float gs[kRows][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) load4(gs[i], g + 4 * i * kLatentRow + k);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float ms[4];
          load4(ms, m + (k + e) * kPieceRow + 4 * group);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[i][c] += gs[i][e] * ms[c];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (mask) zero_dropped(sum[i], mask->word(dot_row(i), add_column(0) + 4 * group));
#pragma unroll
        for (int c = 0; c < 4; ++c) acc.v[i][group][c] += sum[i][c];
      }
    }
  }

  static __device__ __forceinline__ int outer_column(unsigned thread) {
    return int(thread / (kRankLanes * kRowLanes)) * 4;
  }
  static __device__ __forceinline__ int outer_rank(unsigned thread) {
    return int(thread / kRowLanes % kRankLanes) * kOuterRanks;
  }

  static __device__ __forceinline__ void outer(Outer& acc, const T* g, const T* x, unsigned first, unsigned last,
                                               int fold, const OuterMask& mask) {
    const unsigned thread = thread_again(), rank = outer_rank(thread) + fold;
    x += thread % kRowLanes * kStride + outer_column(thread);
    g += thread % kRowLanes * kLatentRow + min(rank, unsigned(kRank - kOuterRanks));
    float sum[kOuterRanks][4] = {};
#pragma unroll 1
    for (int row = 0; row < kOuterRows; row += kRowLanes) {
      float xs[4], gs[kOuterRanks];
      load4(xs, x + row * kStride);
      load4(gs, g + row * kLatentRow);
      if (mask.drawn) {
        const unsigned again = thread_again();
        const uint32_t of_row = __shfl_sync(kAllLanes, mask.bits, row % kWarp + again % kRowLanes);
        zero_dropped(xs, of_row >> row / kWarp * kUnit<T> >> outer_column(again) % kUnit<T>);
      }
#pragma unroll
      for (int j = 0; j < kOuterRanks; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[j][c] += gs[j] * xs[c];
      }
    }
    if (rank < first || rank >= last) return;
#pragma unroll
    for (int j = 0; j < kOuterRanks; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) acc.v[j][c] += sum[j][c];
    }
  }

  template <typename Scale, typename Row>
  static __device__ __forceinline__ void store(const Dot& acc, const Scale& scale, int64_t ranks, const Row& row) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float* out = row(i);
      if (out == nullptr) continue;
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        if (lane() % 8 + 8 * j < ranks) out[lane() % 8 + 8 * j] = scale(lane() % 8 + 8 * j) * acc.v[i][j];
      }
    }
  }

  // What a lane has of row dot_row(i): a unit of 16 bytes from column add_column on.
  static constexpr int kAddUnits = 1;
  static __device__ __forceinline__ int add_column(int) { return lane() % 8 * kUnit<T>; }
  static __device__ __forceinline__ void add_unit(float (&v)[kUnit<T>], const Add& acc, int i, int) {
#pragma unroll
    for (int e = 0; e < kUnit<T>; ++e) v[e] = acc.v[i][e / 4][e % 4];
  }

  // The lanes that have sums of the same element add them first, always in the same order.
  template <typename Out>
  static __device__ __forceinline__ void finish(const Outer& acc, const Out& out) {
#pragma unroll
    for (int j = 0; j < kOuterRanks; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float sum = acc.v[j][c];
#pragma unroll
        for (int offset = kRowLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        if (lane() % kRowLanes == 0) out(outer_rank(threadIdx.x) + j, outer_column(threadIdx.x) + c, sum);
      }
    }
  }
};

}  // namespace align::cuda
