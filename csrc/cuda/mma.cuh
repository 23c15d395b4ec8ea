// The three products of a tile on tensor cores (sm_80 and later), accumulated in float. Same functions as ffma.cuh.
//
// clang-format off
//   dot    [16 rows, rank]     += xd m^T     the rows that a warp has of a tile, masked, times ranks begin .. end of
//                                            the adapter matrix
//   add    [16 rows, columns]  += mask g m   the latent rows of a warp times these ranks
//   outer  [rank, 8 columns]   += g^T xd     these latent ranks of a tile, or of half of it, times the columns of a
//                                            warp, masked
// clang-format on
//
// begin and end are multiples of 8.
//
// Fragments of mma.m16n8k16: lane 4 g + q holds rows g and g + 8, columns 2 q and 2 q + 1 of an accumulator. Which
// column of a tile is which column of a fragment is free, as long as both operands agree: a lane has whole units of 16
// bytes of rows g and g + 8, whose masks are one Philox block each. For dot these are units 2 q and 2 q + 1, so that
// the rows of a tile are read without bank conflicts; for add units q and q + 4, so that a quarter of a warp writes
// whole sectors.
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

  // A lane's rows and units of a tile, and their masks.
  template <int kAcross, int kDown>
  struct Mask {
    static constexpr int kUnits = 2, kAtOnce = kRank < 64 ? 4 : 2;  // drawn at once: registers are scarce
    struct Drawn {
      const Dropout& dropout;
      PhiloxBlock lanes[kDotRows][kUnits];
    };
    int row[kDotRows];  // or -1

    __device__ Mask(const RowTile& tile, int first_row) {
#pragma unroll
      for (int i = 0; i < kDotRows; ++i) row[i] = tile.row_or_none(first_row + dot_row(i));
    }
    __device__ __forceinline__ Drawn of(const Dropout& dropout, const RankMasks& masks, int index, int64_t cols,
                                        int64_t col) const {
      Drawn drawn{dropout, {}};
#pragma unroll
      for (int first = 0; first < kDotRows * kUnits; first += kAtOnce) {
        uint64_t element[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int at = first + i;
          element[i] = int64_t(row[at / kUnits]) * (masks.count * cols) + (index * cols + col + column(at % kUnits));
        }
        draw(dropout, element, reinterpret_cast<PhiloxBlock(&)[kAtOnce]>(drawn.lanes[first / kUnits]));
      }
      return drawn;
    }
    static __device__ __forceinline__ int column(int unit) { return (lane() % 4 * kAcross + unit * kDown) * kUnit<T>; }
  };
  using DotMask = Mask<2, 1>;
  using AddMask = Mask<1, 4>;
  // outer takes so many rows of a tile at once: registers are scarce.
  static constexpr int kOuterRows = kRank < 64 ? kTileRows : kTileRows / 2;
  static constexpr int kStripSize = kThreads * kUnit<T>;
  using OuterMask = StripMask<T, kOuterRows>;

  // What a lane has of row dot_row(i): kAddUnits units of 16 bytes from columns add_column(unit) on.
  static constexpr int kAddUnits = 2;
  static __device__ __forceinline__ int add_column(int unit) { return AddMask::column(unit); }
  static __device__ __forceinline__ void add_unit(float (&v)[kUnit<T>], const Add& acc, int i, int unit) {
#pragma unroll
    for (int e = 0; e < kUnit<T>; ++e) v[e] = acc.v[4 * unit + e / 2][2 * i + e % 2];
  }

#if ALIGN_HAS_SM80
  static __device__ __forceinline__ int warp() { return int(threadIdx.x) / kWarp; }

  static __device__ __forceinline__ void load_words(uint32_t (&to)[4], const T* unit) {
    const uint4 four = *reinterpret_cast<const uint4*>(unit);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }

  // A null mask keeps all elements.
  // x: the warp's rows of a tile; m: [rank][piece's columns], from the tile's first column on.
  static __device__ __forceinline__ void dot(Dot& acc, const T* x, const T* m, int begin, int end,
                                             const typename DotMask::Drawn* mask = nullptr) {
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      uint32_t a[kDotRows][4], b[4];
#pragma unroll
      for (int i = 0; i < kDotRows; ++i) {
        load_words(a[i], x + dot_row(i) * kStride + DotMask::column(unit));
#pragma unroll
        for (int w = 0; w < 4 && mask; ++w) a[i][w] &= mask->dropout.mask(mask->lanes[i][unit].word[w]);
      }
#pragma unroll
      for (int j = 0; j < kRank; j += 8) {
        if (j < begin || j >= end) continue;
        load_words(b, m + (j + lane() / 4) * kPieceRow + DotMask::column(unit));
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
          const uint32_t words[4] = {a[0][w], a[1][w], a[0][w + 1], a[1][w + 1]};
          mma(acc.v[j / 8], words, b[w], b[w + 1], T{});
        }
      }
    }
  }

  // g: the warp's latent rows; m: [rank][piece's columns], in the order of position_in_fragments.
  static __device__ __forceinline__ void add(Add& acc, const T* g, const T* m, int begin, int end,
                                             const typename AddMask::Drawn* mask = nullptr) {
    const auto latents = [&](uint32_t (&a)[4], int k) {
      ldmatrix_x4(a, g + lane() % 16 * kLatentRow + k + lane() / 16 * 8);
      if (k < begin) a[0] = a[1] = 0;
      if (k + 8 >= end) a[2] = a[3] = 0;
    };
    const auto multiply = [&](float (&first)[4], float (&second)[4], const uint32_t (&a)[4], int k, int c) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, m + (k + lane() % 16) * kPieceRow + c * 8 + lane() / 16 * 8);
      mma(first, a, b[0], b[1], T{});
      mma(second, a, b[2], b[3], T{});
    };
    if (!mask) {
#pragma unroll
      for (int k = 0; k < kRank; k += 16) {
        if (k + 16 <= begin || k >= end) continue;
        uint32_t a[4];
        latents(a, k);
#pragma unroll
        for (int c = 0; c < kColumnTiles; c += 2) multiply(acc.v[c], acc.v[c + 1], a, k, c);
      }
      return;
    }
#pragma unroll
    for (int c = 0; c < kColumnTiles; c += 2) {
      float sum[2][4] = {};
#pragma unroll
      for (int k = 0; k < kRank; k += 16) {
        if (k + 16 <= begin || k >= end) continue;
        uint32_t a[4];
        latents(a, k);
        multiply(sum[0], sum[1], a, k, c);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int tile = c + i / 2, half = i % 2;
        const uint32_t word = mask->lanes[half][tile / 4].word[tile % 4];
        if (mask->dropout.keeps_low(word)) acc.v[tile][2 * half] += sum[i / 2][2 * half];
        if (mask->dropout.keeps_high(word)) acc.v[tile][2 * half + 1] += sum[i / 2][2 * half + 1];
      }
    }
  }

  // g, x: kOuterRows latent rows, and these rows of a tile. Latent ranks first .. last are multiplied, and rank j is
  // summed as rank j - fold.
  static __device__ __forceinline__ void outer(Outer& acc, const T* g, const T* x, unsigned first, unsigned last,
                                               int fold, const OuterMask& mask) {
    uint32_t b[kOuterRows / kWarp][4];
#pragma unroll
    for (int i = 0; i < kOuterRows / kWarp; ++i) {
      ldmatrix_x4_trans(b[i], x + (i * kWarp + lane()) * kStride + warp() * 8);
    }
    if (mask.drawn) {  // words of a row become words of a column, as those of x do
      T* strip = mask.memory + warp() * kWarp * kUnit<T>;
#pragma unroll
      for (int i = 0; i < kOuterRows / kWarp; ++i) {
        const auto word = [&](int w) { return mask.dropout.mask(mask.lanes[i].word[w]); };
        __syncwarp();  // the words before are read
        *reinterpret_cast<uint4*>(strip + lane() * kUnit<T>) = make_uint4(word(0), word(1), word(2), word(3));
        __syncwarp();  // all words are there
        uint32_t kept[4];
        ldmatrix_x4_trans(kept, strip + lane() * kUnit<T>);
#pragma unroll
        for (int w = 0; w < 4; ++w) b[i][w] &= kept[w];
      }
    }
    // Bit i: whether ranks 8 i .. 8 i + 7 are summed.
    const uint32_t eights = (1u << (last - fold + 7) / 8) - (1u << (first - fold) / 8);
    g += (lane() % 8 + lane() / 16 * 8) * kLatentRow + fold + lane() / 8 % 2 * 8;
#pragma unroll
    for (int j = 0; j < kRank; j += 16) {
      const uint32_t wanted = eights >> j / 8;
      if (!(wanted & 3)) continue;
      float sum[4] = {acc.v[j / 16][0], acc.v[j / 16][1], acc.v[j / 16][2], acc.v[j / 16][3]};
#pragma unroll
      for (int k = 0; k < kOuterRows; k += 16) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, g + k * kLatentRow + j);
        mma(sum, a, b[k / kWarp][k / 16 % 2 * 2], b[k / kWarp][k / 16 % 2 * 2 + 1], T{});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (wanted & 1 << i / 2) acc.v[j / 16][i] = sum[i];
      }
    }
  }

  // Writes scale(j) * acc to row(i)[j], j < ranks, where row(i) is not null; i is that of dot_row.
  template <typename Scale, typename Row>
  static __device__ __forceinline__ void store(const Dot& acc, const Scale& scale, int64_t ranks, const Row& row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* out = row(half);
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
  static __device__ void dot(Dot&, const T*, const T*, int, int, const typename DotMask::Drawn* = nullptr) {}
  static __device__ void add(Add&, const T*, const T*, int, int, const typename AddMask::Drawn* = nullptr) {}
  static __device__ void outer(Outer&, const T*, const T*, unsigned, unsigned, int, const OuterMask&) {}
  template <typename Scale, typename Row>
  static __device__ void store(const Dot&, const Scale&, int64_t, const Row&) {}
  template <typename Out>
  static __device__ void finish(const Outer&, const Out&) {}
#endif
};

}  // namespace align::cuda
