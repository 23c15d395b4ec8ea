// shrink computes partials[split][t, :] = scale * sum over the columns of the split of xd[t, c] m[:, c]. A block
// computes a row tile and a split of the columns (split-K). job.masks says which mask of x a rank sees and holds the
// scale. Every kernel that reads the partials adds those of all splits in order. The forward pass computes z = A xd,
// the backward pass, if it takes two passes over dy, dz = scaling B^T dy.
//
// A router may have groups of outputs. Then partials[split][t, (i, d)] is the sum over the output groups k of the split
// of w[t, k, i] times the sum q of that group. The gradient <u_i, q_i> of the weights goes to segments: a split writes
// one segment for each output group that it has columns of. The sums q stay in registers.
//
// Bytes: x is read once for each chunk of ranks, however many masks there are. The partials are written once; each
// further output group of a split reads and writes them again. Every row tile reads the adapter matrix.
#pragma once

#include "cuda/adapter_matrix.cuh"

namespace align::cuda {

// The weights of a router and their gradient, for the shrink of dy.
struct RouterWeights {
  int output_groups;
  int heads, rank;
  const float* w;  // [tokens, output_groups, heads], or null: no router
  const float* u;  // [tokens, heads * rank]
  // [chunks of ranks, output_groups + splits - 1, tokens, heads], assigned. Output group k of split s has segment k +
  // s.
  float* segments;

  __host__ __device__ int64_t segments_of_chunk(int64_t splits) const { return output_groups + splits - 1; }
};

template <typename T>
struct ShrinkJob {
  GroupedLoraShape shape;  // tokens, rank and groups count
  RowGroups groups = {};
  TokenMatrix<T> x;
  AdapterMatrix<T> m;
  RankMasks masks;
  float* partials;  // [splits, tokens, rank], assigned
  Cut cut;
  int group_cols;  // columns of an output group
  RouterWeights router_weights = {};
};

// Adds the sums q of one output group, times the weights, to the partials of the split, and writes the gradient of the
// weights, for the rows of this warp.
template <class Math>
__device__ __forceinline__ void weigh_output_group(const typename Math::Dot& q,
                                                   const ShrinkJob<typename Math::Element>& job, const RowTile& tile,
                                                   int first_rank, int output_group, bool first) {
  const RouterWeights& router_weights = job.router_weights;
  const int split = int(blockIdx.y), heads = router_weights.heads, columns = heads * router_weights.rank,
            width = int(job.shape.rank);
  const int64_t segment = blockIdx.z * router_weights.segments_of_chunk(job.cut.splits) + output_group + split;
  const int first_row = int(threadIdx.x) / kWarp * kWarpRows;
#pragma unroll
  for (int i = 0; i < Math::kDotRows; ++i) {
    const int at = first_row + Math::dot_row(i);
    const bool here = at < tile.count;
    const int64_t row = here ? tile.row(at) : 0;
    const float *w = router_weights.w + (row * router_weights.output_groups + output_group) * heads,
                *u = router_weights.u + row * columns;
    float* partials = job.partials + (split * job.shape.tokens + row) * width;
#pragma unroll 1
    for (int head = 0; head <= heads; ++head) {  // number `heads` is the offset path
      const int begin = head * router_weights.rank - first_rank,
                end = head < heads ? begin + router_weights.rank : width - first_rank;
      const float weight = here && head < heads ? w[head] : 1.f;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < Math::kDotCols; ++j) {
        const int column = Math::dot_col(j);
        if (!here || column < begin || column >= end) continue;
        const float value = Math::dot_at(q, i, j);
        if (head < heads) sum += u[first_rank + column] * value;
        partials[first_rank + column] = (first ? 0.f : partials[first_rank + column]) + weight * value;
      }
#pragma unroll
      for (int lanes = Math::kDotLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      if (here && head < heads && threadIdx.x % Math::kDotLanes == 0) {
        router_weights.segments[(segment * job.shape.tokens + row) * heads + head] = sum;
      }
    }
  }
}

template <class Math>
constexpr size_t kShrinkShared = sizeof(typename Math::Element) *
                                 (Math::kRank * Math::kPieceRow + Math::kStages * kTileSize<typename Math::Element>);

// Grid: row tiles, splits, chunks of ranks.
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
  const int begin = int(blockIdx.y * job.cut.split_tiles) * kTileCols<T>;
  const int64_t split_end = begin + job.cut.split_tiles * kTileCols<T>;
  Columns<T> at(begin, min(split_end, job.x.cols), job.group_cols), ahead = at;
  SharedArena arena;
  T* piece = arena.allocate<T>(kRank * kPieceStride<T, kRank>);
  T* stages = arena.allocate<T>(kStages * kTileSize<T>);
  const Dropout dropout(job.masks.dropout);
  Units<T> units(int(threadIdx.x) % kWarp, kWarp, first_row);
  units.enter(tile);

  const auto copy = [&](int s) {
    if (!ahead.done()) {
      units.copy(stages + s * kTileSize<T>, job.x, ahead.col, ahead.group_end());
      ahead.next();
    }
    cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) copy(s);
  typename Math::Dot acc = {};
  int stage = 0, in_piece = kPieceTiles<kRank>;
  while (!at.done()) {
    const int col = at.col, end = at.group_end();
    if (in_piece == kPieceTiles<kRank>) {
      __syncthreads();  // all warps are done with the piece
      load_piece<T, kRank>(piece, job.m, tile.group, first_rank, col, piece_width<T>(kPieceTiles<kRank>, col, end),
                           end);
      __syncthreads();  // the piece is complete
      in_piece = 0;
    }
    T* x = stages + stage * kTileSize<T>;
    cp_async_wait<kStages - 2>();
    __syncwarp();  // the warp's rows of this tile are complete, and it is done with those of the last
    copy(stage == 0 ? kStages - 1 : stage - 1);
    const T *rows = x + first_row * kTileStride<T>, *m = piece + in_piece * kTileCols<T>;
    for_each_mask<kRank>(job.masks, dropout, first_rank, [&](int first, int last, int mask_index) {
      const TileMask<T> mask(dropout, job.masks, mask_index, tile, first_row, job.x.cols, col);
      Math::dot(acc, rows, m, first, last, mask);
    });
    stage = stage + 1 == kStages ? 0 : stage + 1;
    ++in_piece;
    at.next();
    if (at.col == end) {
      in_piece = kPieceTiles<kRank>;
      if (job.router_weights.w) {
        weigh_output_group<Math>(acc, job, tile, first_rank, col / job.group_cols,
                                 col / job.group_cols == begin / job.group_cols);
        acc = {};
      }
    }
  }
  if (job.router_weights.w && begin < job.x.cols) return;

  float* partials = job.partials + int64_t(blockIdx.y) * job.shape.tokens * job.shape.rank;
  const auto scale = [&](int j) { return job.masks.has(first_rank + j) ? job.masks.scale : 1.f; };
  Math::store(acc, scale, job.shape.rank - first_rank, [&](int i) {
    return first_row + i < tile.count ? partials + tile.row(first_row + i) * job.shape.rank + first_rank : nullptr;
  });
}

template <class Math>
void shrink(const ShrinkJob<typename Math::Element>& job, int64_t rank_chunks, Stream stream) {
  const int64_t rows = row_tiles(job.shape.tokens, job.shape.groups);
  if (rows == 0 || rank_chunks == 0) return;
  launch(shrink_kernel<Math>, Grid(rows, job.cut.splits, rank_chunks), dim3(kThreads), kShrinkShared<Math>, stream,
         job);
}

}  // namespace align::cuda
