// shrink computes partials[split][t, :] = scale * sum over the columns of the split of xd[t, c] m[:, c]. A block
// computes a row tile and a split of the columns (split-K). job.masks says which mask of x a rank sees and holds the
// scale. Every kernel that reads the partials adds those of all splits in order. The forward pass computes z = A xd,
// the backward pass, if it takes two passes over dy, dz = scaling B^T dy.
//
// If a router has groups of outputs, each group has partials of its own.
//
// Bytes: x is read once for each chunk of ranks, however many masks there are. The partials are written once. Every row
// tile reads the adapter matrix.
#pragma once

#include "cuda/adapter_matrix.cuh"

namespace align::cuda {

template <typename T>
struct ShrinkJob {
  GroupedLoraShape shape;  // tokens, rank and groups count
  RowGroups groups = {};
  TokenMatrix<T> x;
  AdapterMatrix<T> m;
  RankMasks masks;
  float* partials;  // [output_groups, splits, tokens, rank], assigned
  Cut cut;
  int output_groups = 1;
};

template <class Math>
constexpr size_t kShrinkShared = sizeof(typename Math::Element) *
                                 (Math::kRank * Math::kPieceRow + Math::kStages * kTileSize<typename Math::Element>);

// Grid: row tiles, splits of all groups of outputs, chunks of ranks.
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
  const ColumnRange range = columns_of<T>(job.cut, job.x.cols, job.output_groups, int(blockIdx.y));
  const int end = range.end;
  SharedArena arena;
  T* piece = arena.allocate<T>(kRank * kPieceStride<T, kRank>);
  T* stages = arena.allocate<T>(kStages * kTileSize<T>);
  const Dropout dropout(job.masks.dropout, job.x.cols);
  const typename Math::DotMask mask(tile, first_row);
  Units<T> units(int(threadIdx.x) % kWarp, kWarp, first_row);
  units.enter(tile);

  const auto copy = [&](int s, int col) {
    if (col < end) units.copy(stages + s * kTileSize<T>, job.x, col, end);
    cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) copy(s, range.begin + s * kTileCols<T>);
  typename Math::Dot acc = {};
  int stage = 0, in_piece = kPieceTiles<kRank>;
  for (int col = range.begin; col < end; col += kTileCols<T>) {
    if (in_piece == kPieceTiles<kRank>) {
      __syncthreads();  // all warps are done with the piece
      load_piece<T, kRank, false>(piece, job.m, tile.group, first_rank, col,
                                  piece_width<T>(kPieceTiles<kRank>, col, end), end);
      __syncthreads();  // the piece is complete
      in_piece = 0;
    }
    T* x = stages + stage * kTileSize<T>;
    cp_async_wait<kStages - 2>();
    __syncwarp();  // the warp's rows of this tile are complete, and it is done with those of the last
    copy(stage == 0 ? kStages - 1 : stage - 1, col + (kStages - 1) * kTileCols<T>);
    const T *rows = x + first_row * kTileStride<T>, *m = piece + in_piece * kTileCols<T>;
    for_each_mask(job.masks, job.masks.drawn(dropout), first_rank, kRank, [&](int first, int last, int mask_index) {
      if (mask_index < 0) return Math::dot(acc, rows, m, first, last);
      const auto drawn = mask.of(dropout, job.masks, mask_index, job.x.cols, col);
      Math::dot(acc, rows, m, first, last, &drawn);
    });
    stage = stage + 1 == kStages ? 0 : stage + 1;
    ++in_piece;
  }

  float* partials = job.partials + int64_t(blockIdx.y) * job.shape.tokens * job.shape.rank;
  const auto scale = [&](int j) { return job.masks.has(first_rank + j) ? job.masks.scale : 1.f; };
  Math::store(acc, scale, job.shape.rank - first_rank,
              [&](int i) { return mask.row[i] < 0 ? nullptr : partials + mask.row[i] * job.shape.rank + first_rank; });
}

template <class Math>
void shrink(const ShrinkJob<typename Math::Element>& job, int64_t rank_chunks, Stream stream) {
  const int64_t rows = row_tiles(job.shape.tokens, job.shape.groups);
  if (rows == 0 || rank_chunks == 0) return;
  launch(shrink_kernel<Math>, Grid(rows, job.cut.splits * job.output_groups, rank_chunks), dim3(kThreads),
         kShrinkShared<Math>, stream, job);
}

}  // namespace align::cuda
