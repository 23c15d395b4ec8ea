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
__device__ __forceinline__ void store4(float* to, const float (&v)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
template <typename T>
__device__ __forceinline__ void store4(T* to, const float (&v)[4]) {
  uint32_t half[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) half[i] = narrow<T>(v[i]).bits;
  *reinterpret_cast<uint2*>(to) = make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16);
}

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
  // dot: lane 8 a + b has rows a + 4 i and ranks b + 8 j. add: rows a + 4 i and columns 4 b + 32 i.
  static constexpr int kRows = 4, kRanks = kRank / 8, kRanksAtOnce = 2;
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
  static constexpr int kDotRows = kRows, kDotCols = kRanks, kDotLanes = 8;

  static __device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
  static __device__ __forceinline__ int dot_row(int i) { return lane() / 8 + 4 * i; }
  static __device__ __forceinline__ int dot_col(int j) { return lane() % 8 + 8 * j; }
  static __device__ __forceinline__ float dot_at(const Dot& acc, int i, int j) { return acc.v[i][j]; }
  static __device__ __forceinline__ int warp() { return int(threadIdx.x) / kWarp; }

  static __device__ __forceinline__ void dot(Dot& acc, const T* x, const T* m, int begin, int end,
                                             const TileMask<T>& mask) {
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
        if (!mask.keeps_all) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) zero_dropped(xs[i], mask.word(dot_row(i), c));
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
                                             const TileMask<T>& mask, float scale) {
    g += lane() / 8 * kLatentRow;
    m += lane() % 8 * 4;
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
          load4(ms, m + (k + e) * kPieceRow + 32 * group);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[i][c] += gs[i][e] * ms[c];
          }
        }
      }
      const float factor = mask.keeps_all ? 1.f : scale;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (!mask.keeps_all) zero_dropped(sum[i], mask.word(dot_row(i), lane() % 8 * 4 + 32 * group));
#pragma unroll
        for (int c = 0; c < 4; ++c) acc.v[i][group][c] += factor * sum[i][c];
      }
    }
  }

  static __device__ __forceinline__ int outer_column() {
    return (warp() * kGroups + lane() / (kRankLanes * kRowLanes)) * 4;
  }
  static __device__ __forceinline__ int outer_rank() { return lane() / kRowLanes % kRankLanes * kOuterRanks; }

  static __device__ __forceinline__ void outer(Outer& acc, const T* g, const T* x) {
    x += outer_column();
    g += outer_rank();
    float sum[kOuterRanks][4] = {};
#pragma unroll 1
    for (int row = lane() % kRowLanes; row < kTileRows / 2; row += kRowLanes) {
      float xs[4], gs[kOuterRanks];
      load4(xs, x + row * kStride);
      load4(gs, g + row * kLatentRow);
#pragma unroll
      for (int j = 0; j < kOuterRanks; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[j][c] += gs[j] * xs[c];
      }
    }
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
      float* out = row(lane() / 8 + 4 * i);
      if (out == nullptr) continue;
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        if (lane() % 8 + 8 * j < ranks) out[lane() % 8 + 8 * j] = scale(lane() % 8 + 8 * j) * acc.v[i][j];
      }
    }
  }

  static __device__ __forceinline__ void apply(const Add& acc, T* y, const float* bias, float scale, bool adds) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      T* row = y + (lane() / 8 + 4 * i) * kStride;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int col = lane() % 8 * 4 + 32 * group;
        float four[4] = {};
        if (adds) load4(four, row + col);
#pragma unroll
        for (int c = 0; c < 4; ++c) four[c] += bias[col + c] + scale * acc.v[i][group][c];
        store4(row + col, four);
      }
    }
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
        if (lane() % kRowLanes == 0) out(outer_rank() + j, outer_column() + c, sum);
      }
    }
  }
};

}  // namespace align::cuda
