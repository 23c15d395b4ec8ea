// expand: out[t, c] = in[t, c] + bias[c] + scale * sum_j keep_j[t, c] g[t, j] m[j, c], for a row tile and a slab of
// columns a block, with one rounding; g = mix(row, rank, band). Forward: y from z and B. Backward: dx from dz and A.
//
// Bytes: in and out once. The small matrix is read by every row tile, latent rows by every slab. Ranks beyond kRank go
// in chunks, for which small matrix and latent rows are read again for every tile of columns. Latent rows are read
// again for every band.
#pragma once

#include "cuda/adapter_matrix.cuh"

namespace align::cuda {

template <typename T>
struct ExpandJob {
  GroupedLoraShape shape;  // tokens, rank and groups count
  RowGroups groups;
  TallMatrix<T> in;
  T* out;  // [tokens, cols], assigned; may be in itself
  bool out_aligned;
  const T* bias;  // [cols], or null: zero
  SmallMatrix<T> m;
  RankMasks masks;
  float scale;  // of all ranks
  Cut cut;
  int band;  // columns of a band
};

constexpr int kExpandStages = 2;  // each tile is also written

template <class Math>
constexpr size_t kExpandShared = sizeof(typename Math::Element) *
                                 (Math::kRank * Math::kPieceRow + kTileRows * Math::kLatentRow +
                                  kExpandStages * kTileSize<typename Math::Element>)+sizeof(float) *
                                 kPieceCols<typename Math::Element, Math::kRank>;

template <class Math, class Mix>
__device__ __forceinline__ void expand_tiles(const ExpandJob<typename Math::Element>& job, const Mix& mix,
                                             int tile_index, int slab) {
  using T = typename Math::Element;
  constexpr int kRank = Math::kRank;
  RowTile tile;
  if (!find_tile(job.groups, job.shape, tile_index, &tile)) return;

  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp, first_row = warp * kWarpRows;
  const int begin = int(slab * job.cut.slab_tiles) * kTileCols<T>;
  const int64_t slab_end = begin + job.cut.slab_tiles * kTileCols<T>;
  Columns<T> at(begin, min(slab_end, job.in.cols), job.band);
  // With several chunks of ranks the piece is one tile wide, and read again for every chunk.
  const bool one_chunk = job.shape.rank <= kRank;
  const int piece_tiles = one_chunk ? kPieceTiles<kRank> : 1;
  SharedArena arena;
  T* piece = arena.take<T>(kRank * kPieceStride<T, kRank>);
  T* g = arena.take<T>(kTileRows * kLatentStride<T, kRank>);
  T* stages = arena.take<T>(kExpandStages * kTileSize<T>);
  float* bias = arena.take<float>(kPieceCols<T, kRank>);
  const Dropout dropout(job.masks.dropout);
  Units<T> units(lane, kWarp, first_row);
  units.enter(tile);

  units.copy(stages, job.in, begin, at.band_end());
  cp_async_commit();
  if (slab == 0) mix.save(tile, first_row, kWarpRows, lane, kWarp);
  if (one_chunk) fill_latent<T, kRank>(g, mix, tile, first_row, kWarpRows, 0, begin / job.band, lane, kWarp);
  int stage = 0, in_piece = piece_tiles;
  bool new_band = false;  // since the latent rows were filled
  while (!at.done()) {
    const int col = at.col, end = at.band_end();
    T* y = stages + stage * kTileSize<T>;
    cp_async_wait<0>();
    __syncwarp();  // the warp's rows of this tile are complete, those of the last are written
    at.next();
    if (!at.done()) units.copy(stages + (1 - stage) * kTileSize<T>, job.in, at.col, at.band_end());
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
        if (new_band || !one_chunk) {
          fill_latent<T, kRank>(g, mix, tile, first_row, kWarpRows, first_rank, col / job.band, lane, kWarp);
        }
        __syncthreads();  // piece, bias and latent rows are complete
      }
      const T *rows = g + first_row * kLatentStride<T, kRank>, *m = piece + in_piece * kTileCols<T>;
      for_each_stream<kRank>(job.masks, dropout, first_rank, [&](int first, int last, int stream) {
        const KeepTile<T> keep(dropout, job.masks, stream, tile, first_row, job.in.cols, col);
        Math::add(acc, rows, m, first, last, keep, job.masks.kept);
      });
    }
    Math::apply(acc, y + first_row * kTileStride<T>, bias + in_piece * kTileCols<T>, job.scale);
    __syncwarp();  // the sums of the warp's rows are complete
    units.write(y, job.out, job.out_aligned, job.in.cols, col, end);
    stage = 1 - stage;
    ++in_piece;
    new_band = at.col == end;
    if (new_band) in_piece = piece_tiles;
  }
  cp_async_wait<0>();
}

// Grid: row tiles, slabs.
template <class Math, class Mix>
__global__ void __launch_bounds__(kThreads, 2) expand_kernel(ExpandJob<typename Math::Element> job, Mix mix) {
  require(compiled_here<Math>());
  if (compiled_here<Math>()) expand_tiles<Math>(job, mix, int(blockIdx.x), int(blockIdx.y));
}

template <class Math, class Mix>
void expand(const ExpandJob<typename Math::Element>& job, const Mix& mix, Stream stream) {
  const int64_t rows = row_tiles(job.shape.tokens, job.shape.groups);
  if (rows == 0) return;
  launch(expand_kernel<Math, Mix>, Grid(rows, job.cut.slabs), dim3(kThreads), kExpandShared<Math>, stream, job, mix);
}

}  // namespace align::cuda
