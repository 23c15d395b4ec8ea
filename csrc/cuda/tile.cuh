// Shared by all projection kernels: tiles of a token matrix [tokens, columns] that stream through shared memory, and
// latent rows [tokens, rank].
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/ptx.cuh"

namespace align::cuda {

template <typename T>
struct TokenMatrix {
  const T* data;  // [tokens, cols], or null: zeros
  int64_t cols;
  bool aligned;          // all rows begin at multiples of 16 bytes
  const void* readable;  // a valid address for copies of zero bytes
};

template <typename T>
bool rows_aligned(const T* data, int64_t cols) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && cols * int64_t(sizeof(T)) % 16 == 0;
}

// readable: 16-byte aligned device memory, used if data is null. group_cols: see Columns; 0 means one group.
template <typename T>
TokenMatrix<T> token_matrix(const T* data, int64_t cols, const void* readable, int64_t group_cols = 0) {
  return {data, cols, rows_aligned(data, cols) && group_cols * int64_t(sizeof(T)) % 16 == 0, data ? data : readable};
}

// The columns of the only output group of a matrix, at least 1.
inline int single_group(int64_t cols) { return std::max(int(cols), 1); }

// Walks through columns begin .. end one tile at a time. If a router has groups of outputs, each group of columns has
// its own latent rows: no tile reaches from one group into the next.
template <typename T>
struct Columns {
  int col, end;      // the columns that are left
  int group_cols;    // columns of a group
  int col_in_group;  // columns of the current group before col

  __device__ Columns(int begin, int64_t last, int cols_of_group)
      : col(begin), end(int(last)), group_cols(cols_of_group), col_in_group(begin % cols_of_group) {}
  __device__ bool done() const { return col >= end; }
  __device__ int group_end() const { return min(col - col_in_group + group_cols, end); }
  __device__ void next() {
    const int step = min(kTileCols<T>, group_end() - col);
    col += step, col_in_group += step;
    if (col_in_group == group_cols) col_in_group = 0;
  }
};

// ---- Tiles

// The units of 16 bytes that one thread copies, of a tile or of the 16 rows of its warp: the same columns of every
// step-th row.
template <typename T>
class Units {
 public:
  static constexpr int kPerRow = kTileCols<T> / kUnit<T>;
  static constexpr int kCount = kTileRows * kPerRow / kThreads;

  // `threads` threads together take the rows of a tile from first_row on.
  __device__ Units(int thread, int threads, int first_row)
      : row_(first_row + thread / kPerRow), step_(threads / kPerRow), col_(thread % kPerRow * kUnit<T>) {}

  // The calls after this one work on the rows of this tile.
  __device__ __forceinline__ void enter(const RowTile& tile) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = row_ + u * step_;
      rows_[u] = i < tile.count ? int(tile.row(i)) : -1;
    }
  }

  // Starts the copy of the tile that begins at column first_col. Columns from end on are filled with zeros.
  __device__ __forceinline__ void copy(T* tile, const TokenMatrix<T>& m, int64_t first_col, int64_t end) const {
    const int64_t col = first_col + col_, left = m.data ? end - col : 0;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      T* to = address(tile, u);
      const T* from = m.data + int64_t(rows_[u]) * m.cols + col;
      if (m.aligned) {
        const bool inside = rows_[u] >= 0 && left > 0;
        cp_async16(to, inside ? from : m.readable, inside ? 16 : 0);
      } else {
#pragma unroll 1
        for (int e = 0; e < kUnit<T>; ++e) to[e] = rows_[u] >= 0 && e < left ? from[e] : T{};
      }
    }
  }

  // Zeroes the elements of this thread that mask number index of `masks` masks drops.
  __device__ __forceinline__ void mask(T* tile, const Dropout& dropout, int masks, int index, int64_t cols,
                                       int64_t first_col) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (rows_[u] < 0) continue;
      const int64_t element = (int64_t(rows_[u]) * masks + index) * cols + first_col + col_;
      mask_unit(address(tile, u), mask_bits(dropout, element, kUnit<T>));
    }
  }

  // Writes the tile to columns first_col .. end of a matrix.
  __device__ __forceinline__ void write(const T* tile, T* out, bool aligned, int64_t cols, int64_t first_col,
                                        int64_t end) const {
    const int64_t col = first_col + col_, left = end - col;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (rows_[u] < 0) continue;
      const T* from = address(tile, u);
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
  __device__ __forceinline__ P* address(P* tile, int u) const {
    return tile + (row_ + u * step_) * kTileStride<T> + col_;
  }

  int row_, step_, col_;
  int rows_[kCount];  // row numbers in the matrix, or -1
};

// ---- Latent rows

// Rounds float values to T.
template <typename T, typename S>
__device__ __forceinline__ T to_element(S value) {
  if constexpr (std::is_same_v<S, T>) {
    return value;
  } else {
    return round_to<T>(value);
  }
}

// Fills g [rows, kRank] with source(row, rank, output_group) for rows first .. first + count - 1 of a tile and kRank
// ranks from first_rank on. Rows beyond the tile are zero.
template <typename T, int kRank, typename LatentSource>
__device__ __forceinline__ void fill_latent(T* g, const LatentSource& source, const RowTile& tile, int first, int count,
                                            int first_rank, int output_group, int thread, int threads) {
#pragma unroll 2
  for (int i = thread; i < count * kRank; i += threads) {
    const int row = first + i / kRank, j = i % kRank;
    g[row * kLatentStride<T, kRank> + j] =
        to_element<T>(row < tile.count ? source(tile.row(row), first_rank + j, output_group) : 0.f);
  }
}

// Whether plan.h uses the kernels of Math on the architecture that is being compiled: 16-bit types use tensor cores
// from sm_80 on and FFMA before; before sm_80 the rank is always padded to 16.
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
