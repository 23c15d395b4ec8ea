// The threads of a block, and the rows and the shared memory that a tile takes.
//
// A block has 8 warps; a tile has 16 rows for each. Where a product runs along a row (shrink, expand) a warp streams
// its own rows and waits for nobody but itself. Padding of 16 bytes a row keeps ldmatrix free of bank conflicts.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/plan.h"
#include "ops/grouped_lora.h"

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

// Allocates pieces of the dynamic shared memory.
class SharedArena {
 public:
  __device__ SharedArena() : next_(static_cast<char*>(dynamic_shared())) {}
  template <typename T>
  __device__ T* allocate(int count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += count * int(sizeof(T));
    return piece;
  }

 private:
  char* next_;
};

// Up to 128 consecutive rows of a group, in group order. Row numbers have 32 bits because registers are scarce.
struct RowTile {
  const int64_t* rows;  // row numbers in group order, or null
  int begin;
  int count;
  int group;

  __device__ int64_t row(int i) const { return rows ? rows[begin + i] : begin + i; }
  __device__ int row_or_none(int i) const { return i < count ? int(row(i)) : -1; }
};

// Finds where a group begins and ends in group order.
__device__ inline void group_bounds(const RowGroups& groups, int64_t tokens, int group, int* begin, int* end) {
  const int64_t first = groups.offsets ? groups.offsets[group] : 0;
  const int64_t last = groups.offsets ? groups.offsets[group + 1] : tokens;
  require(0 <= first && first <= last && last <= tokens);
  *begin = int(first), *end = int(last);
}

__device__ inline RowTile tile_of(const RowGroups& groups, int group, int begin, int end) {
  return {groups.rows, begin, end - begin < kTileRows ? end - begin : kTileRows, group};
}

// Finds row tile number index, counted over all groups. Returns false if there are fewer tiles.
__device__ inline bool find_tile(const RowGroups& groups, const GroupedLoraShape& shape, int index, RowTile* tile) {
  // A row that belongs to no group would never be written.
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

// ---- Chunks of rows, for outer products

// The number of the first chunk of a group that begins at row `begin` in group order. A group's chunks have consecutive
// numbers; some numbers may belong to no chunk.
__host__ __device__ inline int first_chunk(int begin, int group, int chunk_rows) {
  return (begin - 1) / chunk_rows + group;
}
// The chunks of a group of so many rows. An empty group has an empty one, whose sums are zero.
__host__ __device__ inline int count_chunks(int rows, int chunk_rows) {
  return rows <= chunk_rows ? 1 : (rows - 1) / chunk_rows + 1;
}

struct RowChunk {
  int group;
  int begin, end;  // rows in group order
  bool only;       // whether the group has no other
};

// Finds chunk number index. Returns false if there is none.
__device__ inline bool find_chunk(const RowGroups& groups, const GroupedLoraShape& shape, int index, int chunk_rows,
                                  RowChunk* chunk) {
  int group = 0, last = int(shape.groups) - 1, begin, end;
  while (group < last) {  // the last group whose first chunk is not beyond index
    const int middle = group + (last - group + 1) / 2;
    group_bounds(groups, shape.tokens, middle, &begin, &end);
    if (first_chunk(begin, middle, chunk_rows) <= index) {
      group = middle;
    } else {
      last = middle - 1;
    }
  }
  group_bounds(groups, shape.tokens, group, &begin, &end);
  const int in_group = index - first_chunk(begin, group, chunk_rows), count = count_chunks(end - begin, chunk_rows);
  if (in_group >= count) return false;
  begin += in_group * chunk_rows;
  *chunk = {group, begin, end - begin < chunk_rows ? end : begin + chunk_rows, count == 1};
  return true;
}

}  // namespace align::cuda
