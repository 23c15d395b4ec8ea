// What all projection kernels share: tiles of a tall matrix [rows, columns] that stream through shared memory, latent
// rows [rows, rank], and dropout.
//
// A block has 8 warps; a tile has 16 rows for each. Where a product runs along a row (shrink, expand) a warp streams
// its own rows and waits for nobody but itself. Padding of 16 bytes a row keeps ldmatrix free of bank conflicts.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/plan.h"
#include "cuda/ptx.cuh"
#include "ops/grouped_lora.h"
#include "ops/philox.h"

namespace align::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpRows = kTileRows / kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
constexpr int kUnit = 16 / int(sizeof(T));  // columns of 16 bytes
template <typename T>
constexpr int kPad = kUnit<T>;
template <typename T>
constexpr int kTileCols = kTileBytes / int(sizeof(T));
template <typename T>
constexpr int kTileStride = kTileCols<T> + kPad<T>;
template <typename T>
constexpr int kTileSize = kTileRows * kTileStride<T>;  // elements
template <int kRank>
constexpr int kPieceTiles = kRank == 16 ? 7 : 128 / kRank;  // 14 to 16 KiB; with 8 a block would exceed sm_75's 64 KiB
template <typename T, int kRank>
constexpr int kPieceCols = kPieceTiles<kRank> * kTileCols<T>;
template <typename T, int kRank>
constexpr int kPieceStride = kPieceCols<T, kRank> + kPad<T>;
template <typename T, int kRank>
constexpr int kLatentStride = kRank + kPad<T>;

// Hands out the dynamic shared memory.
class SharedArena {
 public:
  __device__ SharedArena() : next_(static_cast<char*>(dynamic_shared())) {}
  template <typename T>
  __device__ T* take(int count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += count * int(sizeof(T));
    return piece;
  }

 private:
  char* next_;
};

// ---- Rows

// Up to 128 consecutive rows of a group, in group order. Rows are counted in 32 bits: registers are scarce.
struct RowTile {
  const int64_t* rows;  // row numbers in group order, or null
  int begin;
  int count;
  int group;

  __device__ int64_t row(int i) const { return rows ? rows[begin + i] : begin + i; }
};

// Bounds of a group in group order.
__device__ inline void group_bounds(const RowGroups& groups, int64_t tokens, int group, int* begin, int* end) {
  const int64_t first = groups.offsets ? groups.offsets[group] : 0;
  const int64_t last = groups.offsets ? groups.offsets[group + 1] : tokens;
  require(0 <= first && first <= last && last <= tokens);
  *begin = int(first), *end = int(last);
}

__device__ inline RowTile tile_of(const RowGroups& groups, int group, int begin, int end) {
  return {groups.rows, begin, end - begin < kTileRows ? end - begin : kTileRows, group};
}

// The index-th row tile, counted through all groups; false if there are fewer.
__device__ inline bool find_tile(const RowGroups& groups, const GroupedLoraShape& shape, int index, RowTile* tile) {
  // A row of no group would never be written.
  require(!groups.offsets || (groups.offsets[0] == 0 && groups.offsets[shape.groups] == shape.tokens));
  for (int k = 0; k < int(shape.groups); ++k) {
    int begin, end;
    group_bounds(groups, shape.tokens, k, &begin, &end);
    const int tiles = (end - begin + kTileRows - 1) / kTileRows;
    if (index < tiles) {
      *tile = tile_of(groups, k, begin + index * kTileRows, end);
      return true;
    }
    index -= tiles;
  }
  return false;
}

// ---- The tall matrix

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

// Walks through columns begin .. end a tile at a time. Where a router has groups of outputs, the columns of a group are
// a band, with latent rows of its own: no tile reaches from one into the next.
template <typename T>
struct Columns {
  int64_t col, end;       // of what is left
  int64_t band, in_band;  // columns of a band, and of this one up to col

  __device__ Columns(int64_t begin, int64_t last, int64_t of_band)
      : col(begin), end(last), band(of_band), in_band(begin % of_band) {}
  __device__ bool done() const { return col >= end; }
  __device__ int64_t band_end() const { return min(col - in_band + band, end); }
  __device__ void next() {
    const int64_t step = min(int64_t(kTileCols<T>), band_end() - col);
    col += step, in_band += step;
    if (in_band == band) in_band = 0;
  }
};

// ---- Dropout of the tall matrix

struct Dropout {
  uint32_t threshold;  // 0: none
  uint64_t seed, offset;

  __device__ explicit Dropout(const DropoutArgs& given) : threshold(dropout_threshold(given.p)), seed(0), offset(0) {
    if (threshold > 0) seed = given.rng[0], offset = given.rng[1];
  }
  __device__ float scale() const { return float(dropout_scale(threshold)); }
};

// Ranks of a chunk of kRank that stand on dropped x: those below a multiple of 16, or none.
template <int kRank>
__device__ int masked_ranks(const Dropout& dropout, int first_rank, int masked) {
  if (dropout.threshold == 0 || masked <= first_rank) return 0;
  return masked - first_rank < kRank ? masked - first_rank : kRank;
}
constexpr int kAllRanks = 1 << 30;

// Bit i: whether element + i is kept, for i < count (higher bits mean nothing); the elements lie in one Philox block or
// in two.
__device__ __forceinline__ uint32_t keep_bits(const Dropout& dropout, uint64_t element, int count) {
  const int first = int(element % kPhiloxLanes);
  uint32_t bits = 0;
#pragma unroll 1
  for (int done = 0; done < count; done += kPhiloxLanes - (done == 0 ? first : 0)) {
    const PhiloxBlock block = philox(dropout.seed, (element + done) / kPhiloxLanes, dropout.offset);
    uint32_t kept = 0;
#pragma unroll
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      const uint32_t value = (block.word[lane / 2] >> (16 * (lane % 2))) & 0xFFFFu;
      kept |= uint32_t(value >= dropout.threshold) << lane;
    }
    bits |= done == 0 ? kept >> first : kept << done;
  }
  return bits;
}

// Zeroes the dropped elements of a unit in shared memory.
template <typename T>
__device__ __forceinline__ void mask_unit(T* unit, uint32_t bits) {
  constexpr int kPerWord = 4 / int(sizeof(T));  // elements of 32 bits
  uint4 four = *reinterpret_cast<uint4*>(unit);
  uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t keep = bits >> (w * kPerWord);
    if constexpr (kPerWord == 1) {
      words[w] = keep & 1u ? words[w] : 0u;
    } else {
      words[w] &= (keep & 1u ? 0xFFFFu : 0u) | (keep & 2u ? 0xFFFF0000u : 0u);
    }
  }
  *reinterpret_cast<uint4*>(unit) = make_uint4(words[0], words[1], words[2], words[3]);
}

// ---- Streams

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

  // Zeroes what dropout drops, in this thread's units.
  __device__ __forceinline__ void mask(T* tile, const Dropout& dropout, int64_t cols, int64_t first_col) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (rows_[u] >= 0)
        mask_unit(place(tile, u), keep_bits(dropout, int64_t(rows_[u]) * cols + first_col + col_, kUnit<T>));
    }
  }

  // Writes this thread's units of the dropout decisions: keep[row][unit].
  __device__ __forceinline__ void decide(uint8_t* keep, const Dropout& dropout, int64_t cols, int64_t first_col) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const uint32_t bits =
          rows_[u] < 0 ? 0 : keep_bits(dropout, int64_t(rows_[u]) * cols + first_col + col_, kUnit<T>);
      keep[(row_ + u * step_) * kPerRow + col_ / kUnit<T>] = uint8_t(bits);
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
                                            int first_rank, int64_t band, int thread, int threads) {
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
