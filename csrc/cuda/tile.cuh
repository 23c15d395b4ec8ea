// Shared by all projection kernels: tiles of a token matrix [tokens, columns] that stream through shared memory, and
// latent rows [tokens, rank].
#pragma once

#include "cuda/dropout.cuh"

namespace align::cuda {

template <typename T>
struct TokenMatrix {
  const T* data;  // [tokens, cols]
  int64_t cols;
  bool aligned;  // all rows begin at multiples of 16 bytes

  __device__ uint32_t row_bytes() const { return uint32_t(cols) * uint32_t(sizeof(T)); }
};

template <typename T>
bool rows_aligned(const T* data, int64_t cols) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && cols * int64_t(sizeof(T)) % 16 == 0;
}

// output_groups: see columns_of.
template <typename T>
TokenMatrix<T> token_matrix(const T* data, int64_t cols, int output_groups = 1) {
  if (cols * int64_t(sizeof(T)) > UINT32_MAX) throw std::length_error("a row of a matrix has 4 GiB or more");
  return {data, cols, rows_aligned(data, cols) && rows_aligned<T>(nullptr, cols / output_groups)};
}

// The columns of a block. If a router has groups of outputs, each group of columns has its own latent rows, and is cut
// on its own: number index counts the splits of all groups.
struct ColumnRange {
  int group, begin, end;
};
template <typename T>
__device__ ColumnRange columns_of(const Cut& cut, int64_t cols, int output_groups, int index) {
  const int group_cols = int(cols) / output_groups, group = index / int(cut.splits);
  const int begin = index % int(cut.splits) * int(cut.split_tiles) * kTileCols<T>;
  const int end = min(begin + int(cut.split_tiles) * kTileCols<T>, group_cols);
  return {group, group * group_cols + begin, group * group_cols + end};
}

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
    left_ = tile.count - row_;
    if (tile.rows) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) rows_[u] = int(tile.rows[tile.begin + min(row_ + u * step_, tile.count - 1)]);
    } else {
#pragma unroll
      for (int u = 0; u < kCount; ++u) rows_[u] = tile.begin + min(row_ + u * step_, tile.count - 1);
    }
  }

  // Starts the copy of the tile that begins at column first_col. Rows beyond the tile and columns from end on are
  // filled with zeros.
  __device__ __forceinline__ void copy(T* tile, const TokenMatrix<T>& m, int first_col, int end) const {
    const int col = first_col + col_;
    const T* column = m.data + col;
    if (m.aligned) {
      const int left = col < end ? left_ : 0;
      const SharedAddress to = shared_address(address(tile, 0));
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const char* from = reinterpret_cast<const char*>(column) + uint64_t(uint32_t(rows_[u])) * m.row_bytes();
        cp_async16(to + u * step_ * kTileStride<T> * int(sizeof(T)), from, u * step_ < left ? 16 : 0);
      }
      return;
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      T* to = address(tile, u);
      const T* from = column + opaque(uint32_t(rows_[u])) * m.cols;  // no product stays in registers for it
#pragma unroll 1
      for (int e = 0; e < kUnit<T>; ++e) to[e] = u * step_ < left_ && col + e < end ? from[e] : T{};
    }
  }

 private:
  template <typename P>
  __device__ __forceinline__ P* address(P* tile, int u) const {
    return tile + (row_ + u * step_) * kTileStride<T> + col_;
  }

  int row_, step_, col_;
  int left_;          // rows of the tile from row_ on
  int rows_[kCount];  // row numbers in the matrix; beyond the tile those of its last row
};

// The mask of some rows of a warp's strip of a tile, which is 16 bytes of each row. A lane has rows lane + 32 i.
template <typename T, int kRows>
struct StripMask {
  const Dropout& dropout;
  bool drawn;  // otherwise all elements are kept
  T* memory;   // [kStripSize], in which Mma::outer transposes the words
  PhiloxBlock lanes[kRows / kWarp];

  __device__ StripMask(const Dropout& of, bool is_drawn, T* with) : dropout(of), drawn(is_drawn), memory(with) {}

  // The lanes of mask number index, for rows from `first` on of a tile that begins at column col.
  __device__ __forceinline__ void draw(const RowTile& tile, const RankMasks& masks, int index, int64_t cols,
                                       int64_t col, int first) {
    const unsigned thread = thread_again();
    const int in_tile = int(thread / kWarp) * kUnit<T>;
    const int skipped = kUnit<T> < kPhiloxLanes && dropout.whole ? in_tile % kPhiloxLanes : 0;  // half of a block
    const uint64_t of_row = masks.count * cols, start = index * cols + col + in_tile - skipped;
    const int lane_row = first + int(thread % kWarp);
    uint64_t element[kRows / kWarp];
    if (tile.rows) {
#pragma unroll
      for (int i = 0; i < kRows / kWarp; ++i) {
        element[i] = tile.rows[tile.begin + min(lane_row + i * kWarp, tile.count - 1)] * of_row + start;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows / kWarp; ++i) {
        element[i] = i == 0 ? uint32_t(tile.begin + lane_row) * of_row + start : element[i - 1] + kWarp * of_row;
      }
    }
    align::cuda::draw(dropout, element, lanes);
#pragma unroll
    for (int i = 0; i < kRows / kWarp; ++i) {
      if (skipped > 0) lanes[i].word[0] = lanes[i].word[2], lanes[i].word[1] = lanes[i].word[3];
    }
  }
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

// 32 bits of a unit: two elements of 16 bits, or one of float.
template <typename T>
__device__ __forceinline__ uint32_t pack_word(const float* v) {
  if constexpr (sizeof(T) == 2) {
    return pack<T>(v[0], v[1]);
  } else {
    uint32_t bits;
    memcpy(&bits, v, sizeof(bits));
    return bits;
  }
}

// Fills g [rows, kRank] with factor(rank) * source(row, rank, output_group) for rows first .. first + count - 1 of a
// tile and kRank ranks from first_rank on. Rows beyond the tile are zero.
template <typename T, int kRank, typename LatentSource, typename Factor>
__device__ __forceinline__ void fill_latent(T* g, const LatentSource& source, const Factor& factor, const RowTile& tile,
                                            int first, int count, int first_rank, int output_group, int thread,
                                            int threads) {
#pragma unroll 2
  for (int i = thread; i < count * kRank; i += threads) {
    const int row = first + i / kRank, j = i % kRank;
    g[row * kLatentStride<T, kRank> + j] = to_element<T>(
        row < tile.count ? factor(first_rank + j) * source(tile.row(row), first_rank + j, output_group) : 0.f);
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
