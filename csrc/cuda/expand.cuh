// expand computes out[t, c] = in[t, c] (or 0) + bias[c] + scale * sum_j mask_j[t, c] g[t, j] m[j, c] with one rounding.
// A block computes a row tile and a split of the columns. g[t, j] is source(row, rank, output group). The forward pass
// computes y from z and B, the backward pass dx from dz and A.
//
// Bytes: in is read once, if there is one, and out written once. Every row tile reads the adapter matrix, every split
// the latent rows, and again for every output group. More than kRank ranks are taken in chunks: every tile of columns
// then reads the adapter matrix and the latent rows for each chunk.
#pragma once

#include "cuda/adapter_matrix.cuh"

namespace align::cuda {

template <typename T>
struct ExpandJob {
  GroupedLoraShape shape;  // tokens, rank and groups count
  RowGroups groups = {};
  TokenMatrix<T> in;  // its data may be null: zeros, of which nothing is read
  T* out;             // [tokens, cols], assigned; may be in itself
  bool out_aligned;
  const T* bias = nullptr;  // [cols], or null: zero
  AdapterMatrix<T> m;
  RankMasks masks;
  float scale;  // multiplies the sums of all ranks
  Cut cut;
  int group_cols;  // columns of an output group
};

constexpr int kExpandStages = 2;  // each tile is also written

template <class Math>
constexpr size_t kExpandShared = sizeof(typename Math::Element) *
                                 (Math::kRank * Math::kPieceRow + kTileRows * Math::kLatentRow +
                                  kExpandStages * kTileSize<typename Math::Element>)+sizeof(float) *
                                 kPieceCols<typename Math::Element, Math::kRank>;

template <class Math, class LatentSource>
__device__ __forceinline__ void expand_tiles(const ExpandJob<typename Math::Element>& job, const LatentSource& source,
                                             int tile_index, int split) {
  using T = typename Math::Element;
  constexpr int kRank = Math::kRank;
  RowTile tile;
  if (!find_tile(job.groups, job.shape, tile_index, &tile)) return;

  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp, first_row = warp * kWarpRows;
  const int begin = int(split * job.cut.split_tiles) * kTileCols<T>;
  const int64_t split_end = begin + job.cut.split_tiles * kTileCols<T>;
  Columns<T> at(begin, min(split_end, job.in.cols), job.group_cols);
  // With several chunks of ranks the piece of the adapter matrix is one tile wide and loaded for every chunk.
  const bool one_chunk = job.shape.rank <= kRank;
  const int piece_tiles = one_chunk ? kPieceTiles<kRank> : 1;
  SharedArena arena;
  T* piece = arena.allocate<T>(kRank * kPieceStride<T, kRank>);
  T* g = arena.allocate<T>(kTileRows * kLatentStride<T, kRank>);
  T* stages = arena.allocate<T>(kExpandStages * kTileSize<T>);
  float* bias = arena.allocate<float>(kPieceCols<T, kRank>);
  const Dropout dropout(job.masks.dropout);
  Units<T> units(lane, kWarp, first_row);
  units.enter(tile);

  const bool reads = job.in.data != nullptr;
  if (reads) units.copy(stages, job.in, begin, at.group_end());
  cp_async_commit();
  if (split == 0) source.save(tile, first_row, kWarpRows, lane, kWarp);
  if (one_chunk) fill_latent<T, kRank>(g, source, tile, first_row, kWarpRows, 0, begin / job.group_cols, lane, kWarp);
  int stage = 0, in_piece = piece_tiles;
  bool new_group = false;  // whether the output group has changed since the latent rows were filled
  while (!at.done()) {
    const int col = at.col, end = at.group_end();
    T* y = stages + stage * kTileSize<T>;
    cp_async_wait<0>();
    __syncwarp();  // the warp's rows of this tile are complete, those of the last are written
    at.next();
    if (reads && !at.done()) units.copy(stages + (1 - stage) * kTileSize<T>, job.in, at.col, at.group_end());
    cp_async_commit();
    typename Math::Add acc = {};
    const bool new_piece = in_piece == piece_tiles;
    if (new_piece) in_piece = 0;
    for (int first_rank = 0; first_rank == 0 || first_rank < job.shape.rank; first_rank += kRank) {
      if (new_piece) {
        const int width = piece_width<T>(piece_tiles, col, end);
        __syncthreads();  // all warps are done with the piece, the bias and their latent rows
        load_piece<T, kRank>(piece, job.m, tile.group, first_rank, col, width, end);
        for (int c = int(threadIdx.x); c < width; c += kThreads) {
          bias[c] = job.bias && col + c < end ? widen(job.bias[col + c]) : 0.f;
        }
        if (new_group || !one_chunk) {
          fill_latent<T, kRank>(g, source, tile, first_row, kWarpRows, first_rank, col / job.group_cols, lane, kWarp);
        }
        __syncthreads();  // piece, bias and latent rows are complete
      }
      const T *rows = g + first_row * kLatentStride<T, kRank>, *m = piece + in_piece * kTileCols<T>;
      for_each_mask<kRank>(job.masks, dropout, first_rank, [&](int first, int last, int mask_index) {
        const TileMask<T> mask(dropout, job.masks, mask_index, tile, first_row, job.in.cols, col);
        Math::add(acc, rows, m, first, last, mask, job.masks.scale);
      });
    }
    Math::apply(acc, y + first_row * kTileStride<T>, bias + in_piece * kTileCols<T>, job.scale, reads);
    __syncwarp();  // the sums of the warp's rows are complete
    units.write(y, job.out, job.out_aligned, job.in.cols, col, end);
    stage = 1 - stage;
    ++in_piece;
    new_group = at.col == end;
    if (new_group) in_piece = piece_tiles;
  }
  cp_async_wait<0>();
}

// Grid: row tiles, splits.
template <class Math, class LatentSource>
__global__ void __launch_bounds__(kThreads, 2)
    expand_kernel(ExpandJob<typename Math::Element> job, LatentSource source) {
  require(compiled_here<Math>());
  if (compiled_here<Math>()) expand_tiles<Math>(job, source, int(blockIdx.x), int(blockIdx.y));
}

template <class Math, class LatentSource>
void expand(const ExpandJob<typename Math::Element>& job, const LatentSource& source, Stream stream) {
  const int64_t rows = row_tiles(job.shape.tokens, job.shape.groups);
  if (rows == 0) return;
  launch(expand_kernel<Math, LatentSource>, Grid(rows, job.cut.splits), dim3(kThreads), kExpandShared<Math>, stream,
         job, source);
}

}  // namespace align::cuda
