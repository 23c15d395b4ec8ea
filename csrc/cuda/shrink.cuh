// shrink: parts[slab][t, :] = scale * sum over the slab's columns of xd[t, c] m[:, c], for a row tile and a slab of
// columns a block (a router's ranks: of x without dropout, and not scaled); the slabs' parts are added in order by
// whoever reads them. Forward: z = A xd. Backward, in two passes: dz = scaling B^T dy.
//
// Bytes: x once for each chunk of ranks; parts are written once. The small matrix is read by every row tile.
#pragma once

#include "cuda/small.cuh"

namespace align::cuda {

template <typename T>
struct ShrinkJob {
  GroupedLoraShape shape;  // tokens, rank and groups count
  RowGroups groups;
  TallMatrix<T> x;
  SmallMatrix<T> m;
  DropoutArgs dropout;
  int masked;    // ranks below take dropped x, a multiple of 16, or kAllRanks
  float scale;   // of the masked ranks' results; of all of them without dropout
  float* parts;  // [slabs, tokens, rank], assigned
  Cut cut;
};

template <class Math>
constexpr size_t kShrinkShared = sizeof(typename Math::Element) *
                                 (Math::kRank * Math::kPieceRow + Math::kStages * kTileSize<typename Math::Element>);

// Grid: row tiles, slabs, chunks of ranks.
template <class Math>
__global__ void __launch_bounds__(kThreads, 2) shrink_kernel(ShrinkJob<typename Math::Element> job) {
  require(compiled_here<Math>());
  if (!compiled_here<Math>()) return;
  using T = typename Math::Element;
  constexpr int kRank = Math::kRank, kStages = Math::kStages;
  RowTile tile;
  if (!find_tile(job.groups, job.shape, int(blockIdx.x), &tile)) return;

  const int warp = int(threadIdx.x) / kWarp, first_row = warp * kWarpRows;
  const int first_rank = int(blockIdx.z) * kRank;
  const int64_t begin = int64_t(blockIdx.y) * job.cut.slab_tiles * kTileCols<T>;
  const int64_t slab_end = begin + job.cut.slab_tiles * kTileCols<T>;
  const int64_t end = slab_end < job.x.cols ? slab_end : job.x.cols;
  SharedArena arena;
  T* piece = arena.take<T>(kRank * kPieceStride<T, kRank>);
  T* stages = arena.take<T>(kStages * kTileSize<T>);
  const Dropout dropout(job.dropout);
  const int masked = masked_ranks<kRank>(dropout, first_rank, job.masked);
  Units<T> units(int(threadIdx.x) % kWarp, kWarp, first_row);
  units.enter(tile);

  for (int s = 0; s < kStages - 1; ++s) {
    if (begin + s * kTileCols<T> < end) units.copy(stages + s * kTileSize<T>, job.x, begin + s * kTileCols<T>);
    cp_async_commit();
  }
  typename Math::Dot acc = {};
  int stage = 0, in_piece = kPieceTiles<kRank>;
  for (int64_t col = begin; col < end; col += kTileCols<T>) {
    if (in_piece == kPieceTiles<kRank>) {
      __syncthreads();  // all warps are done with the piece
      load_piece<T, kRank>(piece, job.m, tile.group, first_rank, col, piece_width<T>(kPieceTiles<kRank>, col, end));
      __syncthreads();  // the piece is complete
      in_piece = 0;
    }
    T* x = stages + stage * kTileSize<T>;
    cp_async_wait<kStages - 2>();
    __syncwarp();  // the warp's rows of this tile are complete, and it is done with those of the last
    const int next = stage == 0 ? kStages - 1 : stage - 1;
    const int64_t next_col = col + (kStages - 1) * kTileCols<T>;
    if (next_col < end) units.copy(stages + next * kTileSize<T>, job.x, next_col);
    cp_async_commit();
    const T *rows = x + first_row * kTileStride<T>, *m = piece + in_piece * kTileCols<T>;
    if (masked < kRank) {
      Math::dot(acc, rows, m, masked, kRank);
      __syncwarp();  // the rows have been read as they are
    }
    if (masked > 0) {
      units.mask(x, dropout, job.x.cols, col);
      __syncwarp();  // the rows are masked
      Math::dot(acc, rows, m, 0, masked);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    ++in_piece;
  }

  float* parts = job.parts + int64_t(blockIdx.y) * job.shape.tokens * job.shape.rank;
  const auto scale = [&](int j) { return first_rank + j < job.masked ? job.scale : 1.f; };
  Math::store(acc, scale, job.shape.rank - first_rank, [&](int i) {
    return first_row + i < tile.count ? parts + tile.row(first_row + i) * job.shape.rank + first_rank : nullptr;
  });
}

template <class Math>
void shrink(const ShrinkJob<typename Math::Element>& job, int64_t rank_chunks, Stream stream) {
  const int64_t rows = row_tiles(job.shape.tokens, job.shape.groups);
  if (rows == 0 || rank_chunks == 0) return;
  launch(shrink_kernel<Math>, dim3(unsigned(rows), unsigned(job.cut.slabs), unsigned(rank_chunks)), dim3(kThreads),
         kShrinkShared<Math>, stream, job);
}

}  // namespace align::cuda
