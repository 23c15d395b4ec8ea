// The three products of a tile on tensor cores (sm_80 and later), accumulated in float. Same functions as ffma.cuh.
//
// clang-format off
//   dot    [16 rows, rank]     += xd m^T     the rows that a warp has of a tile, masked, times ranks begin .. end of
//                                            the adapter matrix
//   add    [16 rows, columns]  += mask g m   the latent rows of a warp times these ranks
//   outer  [rank, 8 columns]   += g^T x      half of the rows of a tile, the columns of a warp
// clang-format on
//
// begin and end are multiples of 8.
//
// Fragments of mma.m16n8k16: lane 4 g + q holds rows g and g + 8, columns 2 q and 2 q + 1 of an accumulator.
#pragma once

#include "cuda/tile.cuh"

namespace align::cuda {

template <typename T, int kRank_>
struct Mma {
  using Element = T;
  static constexpr int kRank = kRank_;
  static constexpr bool kTensorCores = true;
  static constexpr int kStages = 3;
  static constexpr int kStride = kTileStride<T>, kPieceRow = kPieceStride<T, kRank>,
                       kLatentRow = kLatentStride<T, kRank>;
  static constexpr int kColumnTiles = kTileCols<T> / 8;

  struct Dot {
    float v[kRank / 8][4];
  };
  struct Add {
    float v[kColumnTiles][4];
  };
  struct Outer {
    float v[kRank / 16][4];
  };
  // A thread's elements of Dot, i < kDotRows, j < kDotCols, and the lanes that have the same rows.
  static constexpr int kDotRows = 2, kDotCols = kRank / 4, kDotLanes = 4;
  static __device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
  static __device__ __forceinline__ int dot_row(int i) { return lane() / 4 + 8 * i; }
  static __device__ __forceinline__ int dot_col(int j) { return j / 2 * 8 + lane() % 4 * 2 + j % 2; }
  static __device__ __forceinline__ float dot_at(const Dot& acc, int i, int j) { return acc.v[j / 2][2 * i + j % 2]; }

#if ALIGN_HAS_SM80
  static __device__ __forceinline__ int warp() { return int(threadIdx.x) / kWarp; }

  // x: the warp's rows of a tile; m: [rank][piece's columns], from the tile's first column on.
  static __device__ __forceinline__ void dot(Dot& acc, const T* x, const T* m, int begin, int end,
                                             const TileMask<T>& mask) {
#pragma unroll
    for (int k = 0; k < kTileCols<T>; k += 16) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, x + lane() % 16 * kStride + k + lane() / 16 * 8);
      if (!mask.keeps_all) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t kept = mask.word(lane() / 4 + 8 * half, k) >> (lane() % 4 * 2);
          a[half] &= word_mask<T>(kept), a[half + 2] &= word_mask<T>(kept >> 8);
        }
      }
#pragma unroll
      for (int j = 0; j < kRank; j += 16) {
        if (j + 16 <= begin || j >= end) continue;
        ldmatrix_x4(b, m + (j + lane() % 8 + lane() / 16 * 8) * kPieceRow + k + lane() / 8 % 2 * 8);
        if (j >= begin) mma(acc.v[j / 8], a, b[0], b[1], T{});
        if (j + 8 < end) mma(acc.v[j / 8 + 1], a, b[2], b[3], T{});
      }
    }
  }

  // g: the warp's latent rows. Kept elements are multiplied by scale.
  static __device__ __forceinline__ void add(Add& acc, const T* g, const T* m, int begin, int end,
                                             const TileMask<T>& mask, float scale) {
#pragma unroll
    for (int c = 0; c < kTileCols<T>; c += 16) {
      float sum[2][4] = {};
#pragma unroll
      for (int k = 0; k < kRank; k += 16) {
        if (k + 16 <= begin || k >= end) continue;
        uint32_t a[4], b[4];
        ldmatrix_x4(a, g + lane() % 16 * kLatentRow + k + lane() / 16 * 8);
        if (k < begin) a[0] = a[1] = 0;
        if (k + 8 >= end) a[2] = a[3] = 0;
        ldmatrix_x4_trans(b, m + (k + lane() % 16) * kPieceRow + c + lane() / 16 * 8);
        mma(sum[0], a, b[0], b[1], T{});
        mma(sum[1], a, b[2], b[3], T{});
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t kept = mask.keeps_all ? ~0u : mask.word(lane() / 4 + 8 * half, c) >> (lane() % 4 * 2);
        const float factor = mask.keeps_all ? 1.f : scale;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = sum[i / 2][2 * half + i % 2];
          acc.v[c / 8 + i / 2][2 * half + i % 2] += kept >> (i / 2 * 8 + i % 2) & 1u ? factor * value : 0.f;
        }
      }
    }
  }

  // g: 64 latent rows; x: the rows of the tile that they belong to.
  static __device__ __forceinline__ void outer(Outer& acc, const T* g, const T* x) {
#pragma unroll 1
    for (int k = 0; k < kTileRows / 2; k += 32) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, x + (k + lane()) * kStride + warp() * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kRank; j += 16) {
          uint32_t a[4];
          ldmatrix_x4_trans(a,
                            g + (k + 16 * half + lane() % 8 + lane() / 16 * 8) * kLatentRow + j + lane() / 8 % 2 * 8);
          mma(acc.v[j / 16], a, b[2 * half], b[2 * half + 1], T{});
        }
      }
    }
  }

  // Writes scale(j) * acc to row(i)[j], j < ranks, where row(i) is not null.
  template <typename Scale, typename Row>
  static __device__ __forceinline__ void store(const Dot& acc, const Scale& scale, int64_t ranks, const Row& row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* out = row(lane() / 4 + 8 * half);
      if (out == nullptr) continue;
#pragma unroll
      for (int j = 0; j < kRank / 8; ++j) {
        const int at = 8 * j + lane() % 4 * 2;
        const float first = scale(at) * acc.v[j][2 * half], second = scale(at + 1) * acc.v[j][2 * half + 1];
        if (at + 1 < ranks && reinterpret_cast<uintptr_t>(out + at) % sizeof(float2) == 0) {
          *reinterpret_cast<float2*>(out + at) = make_float2(first, second);
        } else {
          if (at < ranks) out[at] = first;
          if (at + 1 < ranks) out[at + 1] = second;
        }
      }
    }
  }

  // Adds bias + scale * acc to the warp's rows of a tile, or to zeros; one rounding.
  static __device__ __forceinline__ void apply(const Add& acc, T* y, const float* bias, float scale, bool adds) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane() / 4 + 8 * half;
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
        const int col = 8 * i + lane() % 4 * 2;
        uint32_t* pair = reinterpret_cast<uint32_t*>(y + row * kStride + col);
        const uint32_t old = adds ? *pair : 0;
        *pair = pack<T>(low_half(old, T{}) + bias[col] + scale * acc.v[i][2 * half],
                        high_half(old, T{}) + bias[col + 1] + scale * acc.v[i][2 * half + 1]);
      }
    }
  }

  // Calls out(rank, column of the tile, value) for each element that this thread holds.
  template <typename Out>
  static __device__ __forceinline__ void finish(const Outer& acc, const Out& out) {
#pragma unroll
    for (int j = 0; j < kRank / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out(16 * j + lane() / 4 + i / 2 * 8, warp() * 8 + lane() % 4 * 2 + i % 2, acc.v[j][i]);
      }
    }
  }
#else
  static __device__ void dot(Dot&, const T*, const T*, int, int, const TileMask<T>&) {}
  static __device__ void add(Add&, const T*, const T*, int, int, const TileMask<T>&, float) {}
  static __device__ void outer(Outer&, const T*, const T*) {}
  template <typename Scale, typename Row>
  static __device__ void store(const Dot&, const Scale&, int64_t, const Row&) {}
  static __device__ void apply(const Add&, T*, const float*, float, bool) {}
  template <typename Out>
  static __device__ void finish(const Outer&, const Out&) {}
#endif
};

}  // namespace align::cuda
