// How the work of a projection is split: pure functions of sizes and device, tested without a GPU
// (cpp_tests/test_plan.cpp).
//
// A tile is 128 rows of 128 bytes (64 columns of 16 bits, 32 of float), which is 16 KiB. With padding, three stages of
// tiles, the adapter matrix and the latent rows a block needs 72 to 93 KiB, so that two blocks share a multiprocessor
// of sm_80 and sm_90, each with 32 KiB of loads in flight. An H100 needs about 20 KiB in flight for each multiprocessor
// (bandwidth times latency). Rows of 128 bytes fill whole sectors and all 32 banks. 128 rows are 16 rows, one mma, for
// each of 8 warps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace align::cuda {

struct Device {
  int multiprocessors;
  int major;         // major number of the compute capability
  int shared_bytes;  // the most shared memory of a block
};

constexpr int kTileRows = 128;
constexpr int kTileBytes = 128;          // bytes of a row of a tile
constexpr int kOuterTiles = 2;           // tiles side by side whose outer products a block keeps in registers
constexpr int kSweepTiles = 4;           // the same for the sweep (outer.cuh) with 16 bits; the FFMA of float have 2
constexpr int64_t kMinSplitTiles = 4;    // with fewer tiles the prologue of a block would cost too much
constexpr int64_t kMaxShrinkSplits = 8;  // each block of expand reads the partials of all of them
constexpr int64_t kBlocksPerMultiprocessor = 2;

constexpr int kSharedForFloat64 = 104 << 10;  // shared memory of a block, for float at padded rank 64

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The blocks of a launch, checked against the limits of the hardware. More blocks along y or z take several launches.
struct Grid {
  static constexpr int64_t kMostX = (int64_t(1) << 31) - 1, kMost = (int64_t(1) << 16) - 1;  // along y and z
  unsigned x, y, z;

  Grid(int64_t along_x, int64_t along_y = 1, int64_t along_z = 1)
      : x(unsigned(along_x)), y(unsigned(along_y)), z(unsigned(along_z)) {
    if (along_x <= kMostX && along_y <= kMost && along_z <= kMost) return;
    throw std::length_error("a kernel would need " + std::to_string(along_x) + " x " + std::to_string(along_y) + " x " +
                            std::to_string(along_z) + " blocks; there may be " + std::to_string(kMostX) + " x " +
                            std::to_string(kMost) + " x " + std::to_string(kMost));
  }
};

// An upper bound of the row tiles of all groups: each group but one may end in the middle of a tile.
constexpr int64_t row_tiles(int64_t tokens, int64_t groups) {
  return tokens == 0 ? 0 : ceil_div(tokens, kTileRows) + std::max<int64_t>(groups, 1) - 1;
}

// How the columns of a token matrix are split over blocks: split_tiles tiles for each split, or fewer for the last one.
struct Cut {
  int64_t splits;
  int64_t split_tiles;
};

// With the row tiles there are as many splits as fit two blocks on each multiprocessor, or up to three more where the
// busiest multiprocessor has less to do with them.
inline Cut cut_columns(int64_t cols, int64_t element_bytes, int64_t row_tiles, int64_t max_splits,
                       const Device& device) {
  const int64_t tiles = std::max<int64_t>(ceil_div(cols * element_bytes, kTileBytes), 1);
  const int64_t rows = std::max<int64_t>(row_tiles, 1),
                most = std::clamp<int64_t>(tiles / kMinSplitTiles, 1, max_splits);
  const int64_t fewest = std::clamp<int64_t>(device.multiprocessors * kBlocksPerMultiprocessor / rows, 1, most);
  const auto busiest = [&](int64_t splits) {
    return ceil_div(rows * splits, device.multiprocessors) * ceil_div(tiles, splits);
  };
  int64_t splits = fewest;
  for (int64_t more = fewest + 1; more <= std::min(fewest + 3, most); ++more) {
    if (busiest(more) < busiest(splits)) splits = more;
  }
  const int64_t split_tiles = ceil_div(tiles, splits);
  return {ceil_div(tiles, split_tiles), split_tiles};
}

// The rows of a chunk, whose outer products one block sums, for a gradient of so many ranks. The sums take 4 rank bytes
// a column: up to rank 64 a 16th of what the rows have of it in 16 bits, or less. How rows are cut decides the bits of
// a gradient, so that nothing of the device may.
constexpr int64_t outer_rows(int64_t rank) { return rank <= 16 ? 512 : rank <= 32 ? 1024 : 2048; }

// An upper bound of the chunks of all groups, of which each has one at least; row_tile.cuh numbers them.
constexpr int64_t outer_chunks(int64_t tokens, int64_t groups, int64_t rank) {
  return groups == 0 ? 0 : std::max<int64_t>(ceil_div(tokens, outer_rows(rank)), 1) + groups - 1;
}

// The chunks whose sums are kept to be added: none if no group can have two.
constexpr int64_t outer_sums(int64_t tokens, int64_t groups, int64_t rank) {
  return tokens <= outer_rows(rank) ? 0 : outer_chunks(tokens, groups, rank);
}

// The number of blocks of columns; one thread block sums the outer products of each, for a chunk of rows.
inline int64_t outer_blocks(int64_t cols, int64_t element_bytes) {
  return ceil_div(cols * element_bytes, kTileBytes * kOuterTiles);
}
// The same for the sweep. Each block of columns has its partials of dz.
inline int64_t sweep_blocks(int64_t cols, int64_t element_bytes) {
  return ceil_div(cols * element_bytes, kTileBytes * (element_bytes == 2 ? kSweepTiles : kOuterTiles));
}

struct Plan {
  bool tensor_cores;    // mma.sync, for 16-bit types from sm_80 on; otherwise FFMA
  int padded_rank;      // 16, 32 or 64; larger ranks take several chunks of 64
  int64_t rank_chunks;  // each chunk reads the token matrix again
  Cut shrink;           // split of x: split-K, added in order
  Cut expand;           // split of y, or of each of its groups of outputs
  Cut shrink_dy;        // the same for dy, if the backward pass takes two passes over it
  Cut expand_dx;        // split of dx
  // Whether one pass over dy computes dz and dB. A block then keeps dB of kSweepTiles tiles in registers and writes its
  // partials of dz. These cost 8 rank bytes for each row, to write and to read, instead of a second read of 4 * 128
  // bytes. Above rank 16 the registers would hold half as many tiles, and the partials would save less than half of
  // that read, so there are no such kernels.
  bool one_pass;
};

inline Plan plan(int64_t tokens, int64_t in_dim, int64_t out_dim, int64_t rank, int64_t groups, int64_t element_bytes,
                 const Device& device, int64_t output_groups = 1) {
  const int64_t rows = row_tiles(tokens, groups), any = int64_t(1) << 15;
  Plan p;
  p.tensor_cores = element_bytes == 2 && device.major >= 8;
  // FFMA keeps latent rows in float. The 64 KiB of sm_75 are enough for rank 16 in two passes, the 99 KiB of sm_86,
  // sm_89 and sm_120 for rank 32.
  const bool fits_64 = element_bytes == 2 || device.shared_bytes >= kSharedForFloat64;
  p.padded_rank = rank <= 16 || device.major < 8 ? 16 : rank <= 32 || !fits_64 ? 32 : 64;
  p.rank_chunks = ceil_div(rank, p.padded_rank);
  p.shrink = cut_columns(in_dim, element_bytes, rows, kMaxShrinkSplits, device);
  const int64_t group_cols = out_dim / output_groups, group_rows = rows * output_groups;
  p.expand = cut_columns(group_cols, element_bytes, group_rows, any, device);
  p.shrink_dy = cut_columns(group_cols, element_bytes, group_rows, any, device);
  p.expand_dx = cut_columns(in_dim, element_bytes, rows, any, device);
  p.one_pass = rank <= 16 && out_dim > 0 && device.major >= 8;
  return p;
}

}  // namespace align::cuda
