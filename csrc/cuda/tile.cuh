// What all projection kernels share: tiles of a token matrix [tokens, columns] that stream through shared memory, and
// latent rows [tokens, rank].
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/ptx.cuh"

namespace align::cuda {

template <typename T>
struct TallMatrix {
  const T* data;  // [tokens, cols], or null: zeros
  int64_t cols;
  bool aligned;     // rows begin at multiples of 16 bytes
  const void* any;  // an address that may be read, for copies of nothing
};

template <typename T>
bool rows_aligned(const T* data, int64_t cols) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && cols * int64_t(sizeof(T)) % 16 == 0;
}

// any: device memory, 16 bytes aligned, should data be null. band: see Columns; 0: one.
template <typename T>
TallMatrix<T> tall(const T* data, int64_t cols, const void* any, int64_t band = 0) {
  return {data, cols, rows_aligned(data, cols) && band * int64_t(sizeof(T)) % 16 == 0, data ? data : any};
}

// Columns of a matrix that is one band, at least 1.
inline int band_of(int64_t cols) { return std::max(int(cols), 1); }

// Walks through columns begin .. end a tile at a time. Where a router has groups of outputs, the columns of a group are
// a band, with latent rows of its own: no tile reaches from one into the next.
template <typename T>
struct Columns {
  int col, end;       // of what is left
  int band, in_band;  // columns of a band, and of this one up to col

  __device__ Columns(int begin, int64_t last, int of_band)
      : col(begin), end(int(last)), band(of_band), in_band(begin % of_band) {}
  __device__ bool done() const { return col >= end; }
  __device__ int band_end() const { return min(col - in_band + band, end); }
  __device__ void next() {
    const int step = min(kTileCols<T>, band_end() - col);
    col += step, in_band += step;
    if (in_band == band) in_band = 0;
  }
};

// ---- Tiles

// A thread's share of a tile, or of its warp's 16 rows: units of 16 bytes, the same columns of every step-th row.
template <typename T>
class Units {
 public:
  static constexpr int kPerRow = kTileCols<T> / kUnit<T>;
  static constexpr int kCount = kTileRows * kPerRow / kThreads;

  // thread of `threads`, which share rows first_row .. of a tile.
  __device__ Units(int thread, int threads, int first_row)
      : row_(first_row + thread / kPerRow), step_(threads / kPerRow), col_(thread % kPerRow * kUnit<T>) {}

  // The rows that follow are those of this tile.
  __device__ __forceinline__ void enter(const RowTile& tile) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = row_ + u * step_;
      rows_[u] = i < tile.count ? int(tile.row(i)) : -1;
    }
  }

  // Starts the copy of the tile at column first_col; zeros from column end on.
  __device__ __forceinline__ void copy(T* tile, const TallMatrix<T>& m, int64_t first_col, int64_t end) const {
    const int64_t col = first_col + col_, left = m.data ? end - col : 0;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      T* to = place(tile, u);
      const T* from = m.data + int64_t(rows_[u]) * m.cols + col;
      if (m.aligned) {
        const bool inside = rows_[u] >= 0 && left > 0;
        cp_async16(to, inside ? from : m.any, inside ? 16 : 0);
      } else {
#pragma unroll 1
        for (int e = 0; e < kUnit<T>; ++e) to[e] = rows_[u] >= 0 && e < left ? from[e] : T{};
      }
    }
  }

  // Zeroes what the stream-th of so many streams drops, in this thread's units.
  __device__ __forceinline__ void mask(T* tile, const Dropout& dropout, int streams, int stream, int64_t cols,
                                       int64_t first_col) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (rows_[u] < 0) continue;
      const int64_t element = (int64_t(rows_[u]) * streams + stream) * cols + first_col + col_;
      mask_unit(place(tile, u), keep_bits(dropout, element, kUnit<T>));
    }
  }

  // Writes the tile to columns first_col .. end of a matrix.
  __device__ __forceinline__ void write(const T* tile, T* out, bool aligned, int64_t cols, int64_t first_col,
                                        int64_t end) const {
    const int64_t col = first_col + col_, left = end - col;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (rows_[u] < 0) continue;
      const T* from = place(tile, u);
      T* to = out + int64_t(rows_[u]) * cols + col;
      if (aligned) {
        if (left > 0) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll 1
        for (int e = 0; e < kUnit<T> && e < left; ++e) to[e] = from[e];
      }
    }
  }

 private:
  template <typename P>
  __device__ __forceinline__ P* place(P* tile, int u) const {
    return tile + (row_ + u * step_) * kTileStride<T> + col_;
  }

  int row_, step_, col_;
  int rows_[kCount];  // of the matrix, or -1
};

// ---- Latent rows

// What is made in float, or given in float, is rounded to T.
template <typename T, typename S>
__device__ __forceinline__ T to_element(S value) {
  if constexpr (std::is_same_v<S, T>) {
    return value;
  } else {
    return round_to<T>(value);
  }
}

// Rows first .. first + count of a tile as g [.., kRank]: mix(row, j, band) for ranks first_rank .., zeros beyond.
template <typename T, int kRank, typename Mix>
__device__ __forceinline__ void fill_latent(T* g, const Mix& mix, const RowTile& tile, int first, int count,
                                            int first_rank, int band, int thread, int threads) {
#pragma unroll 2
  for (int i = thread; i < count * kRank; i += threads) {
    const int row = first + i / kRank, j = i % kRank;
    g[row * kLatentStride<T, kRank> + j] =
        to_element<T>(row < tile.count ? mix(tile.row(row), first_rank + j, band) : 0.f);
  }
}

// Whether the kernels of Math are run on the architecture that is being compiled (plan.h): 16-bit types take tensor
// cores from sm_80 on, and FFMA before; before sm_80 the rank is padded to 16.
template <class Math>
__device__ constexpr bool compiled_here() {
#ifdef ALIGN_ON_SIMT
  return true;
#else
  constexpr bool k16Bit = sizeof(typename Math::Element) == 2;
  return ALIGN_HAS_SM80 ? Math::kTensorCores == k16Bit : !Math::kTensorCores && Math::kRank == 16;
#endif
}

}  // namespace align::cuda
