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

// ---- Dropout of the tall matrix

struct Dropout {
  uint32_t threshold;  // 0: none
  uint64_t seed, offset;

  __device__ explicit Dropout(const DropoutArgs& given) : threshold(dropout_threshold(given.p)), seed(0), offset(0) {
    if (threshold > 0) seed = given.rng[0], offset = given.rng[1];
  }
  __device__ float scale() const { return float(dropout_scale(threshold)); }
};

// Which ranks see which masks of the tall matrix: ranks i * per .. (i + 1) * per the i-th stream's, whose elements are
// number (row * streams + i) * cols + c; those beyond all streams see the matrix as it is.
struct RankMasks {
  DropoutArgs dropout;
  int streams;
  int per;     // a multiple of 8; or kAllRanks
  float kept;  // what products of ranks with masks are multiplied by

  __device__ bool has(int rank) const { return rank < streams * per; }
};
constexpr int kAllRanks = 1 << 30;
constexpr RankMasks kNoMasks = {{0, nullptr}, 1, kAllRanks, 1};

// Calls body(begin, end, stream) for the ranks of a chunk of kRank that see a stream, then for the others, stream -1.
template <int kRank, typename Body>
__device__ __forceinline__ void for_each_stream(const RankMasks& masks, const Dropout& dropout, int first_rank,
                                                const Body& body) {
  const int streams = dropout.threshold > 0 ? masks.streams : 0;
#pragma unroll 1
  for (int stream = 0; stream <= streams; ++stream) {
    const int begin = max(stream * masks.per - first_rank, 0);
    const int end = stream < streams ? min((stream + 1) * masks.per - first_rank, kRank) : kRank;
    if (begin < end) body(begin, end, stream < streams ? stream : -1);
  }
}

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

// The low bits of keep as a mask of a word: of two elements of 16 bits, or one of 32.
template <typename T>
__device__ __forceinline__ uint32_t word_mask(uint32_t keep) {
  if constexpr (sizeof(T) == 4) return keep & 1u ? ~0u : 0u;
  return (keep & 1u ? 0xFFFFu : 0u) | (keep & 2u ? 0xFFFF0000u : 0u);
}

// Zeroes the dropped elements of a unit in shared memory.
template <typename T>
__device__ __forceinline__ void mask_unit(T* unit, uint32_t bits) {
  constexpr int kPerWord = 4 / int(sizeof(T));  // elements of 32 bits
  uint4 four = *reinterpret_cast<uint4*>(unit);
  four.x &= word_mask<T>(bits), four.y &= word_mask<T>(bits >> kPerWord);
  four.z &= word_mask<T>(bits >> 2 * kPerWord), four.w &= word_mask<T>(bits >> 3 * kPerWord);
  *reinterpret_cast<uint4*>(unit) = four;
}

// What a stream keeps of a warp's 16 rows of a tile: lane 2 i + h holds half h of row i.
template <typename T>
struct KeepTile {
  static constexpr int kHalf = kTileCols<T> / 2;
  bool all = true;
  uint32_t bits = 0;

  // From the first of the warp's rows and column col on; stream -1 keeps all.
  __device__ KeepTile(const Dropout& dropout, const RankMasks& masks, int stream, const RowTile& tile, int first_row,
                      int64_t cols, int64_t col)
      : all(stream < 0) {
    const int lane = int(threadIdx.x) % kWarp, row = first_row + lane / 2;
    if (all || row >= tile.count) return;
    bits = keep_bits(dropout, (tile.row(row) * masks.streams + stream) * cols + col + lane % 2 * kHalf, kHalf);
  }
  KeepTile() = default;

  // Bit c: whether column + c of one of the rows is kept, in the same half of it. All lanes of the warp must call.
  __device__ __forceinline__ uint32_t word(int row, int column) const {
    return __shfl_sync(kAllLanes, bits, 2 * row + column / kHalf) >> column % kHalf;
  }
};

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
