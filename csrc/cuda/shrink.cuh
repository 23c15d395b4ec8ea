// shrink: parts[slab][t, :] = scale * sum over the slab's columns of xd[t, c] m[:, c], for a row tile and a slab of
// columns a block; ranks see the masks that job.masks gives them, and scale is theirs; the slabs' parts are added in
// order by whoever reads them. Forward: z = A xd. Backward, in two passes: dz = scaling B^T dy.
//
// With groups of outputs (columns in bands) parts[slab][t, (i, d)] is the sum over the slab's bands k of w[t, k, i]
// times the band's own sum q, and the weights' gradient <u_i, q_i> goes to segments, in one piece for each slab that
// has columns of the band: no band's q leaves the registers.
//
// Bytes: x once for each chunk of ranks, however many masks there are; parts are written once, with bands also read
// again and written by each of the slab's bands. The small matrix is read by every row tile.
#pragma once

#include "cuda/adapter_matrix.cuh"

namespace align::cuda {

// What a router's weights and their gradient are to the shrink of dy. w null: no router.
struct Weighing {
  int bands;
  int heads, rank;
  const float* w;   // [tokens, bands, heads]
  const float* u;   // [tokens, heads * rank]
  float* segments;  // [chunks of ranks, bands + slabs - 1, tokens, heads], assigned; band k of slab s has segment k + s

  __host__ __device__ int64_t segments_of_chunk(int64_t slabs) const { return bands + slabs - 1; }
};

template <typename T>
struct ShrinkJob {
  GroupedLoraShape shape;  // tokens, rank and groups count
  RowGroups groups;
  TallMatrix<T> x;
  SmallMatrix<T> m;
  RankMasks masks;
  float* parts;  // [slabs, tokens, rank], assigned
  Cut cut;
  int band;  // columns of a band
  Weighing weighing;
};

// A band's sums of the warp's rows: weighted into the slab's parts, and what they say of the weights.
template <class Math>
__device__ __forceinline__ void weigh_band(const typename Math::Dot& q, const ShrinkJob<typename Math::Element>& job,
                                           const RowTile& tile, int first_rank, int band, bool first) {
  const Weighing& weighing = job.weighing;
  const int slab = int(blockIdx.y), heads = weighing.heads, columns = heads * weighing.rank,
            width = int(job.shape.rank);
  const int64_t segment = blockIdx.z * weighing.segments_of_chunk(job.cut.slabs) + band + slab;
  const int first_row = int(threadIdx.x) / kWarp * kWarpRows;
#pragma unroll
  for (int i = 0; i < Math::kDotRows; ++i) {
    const int at = first_row + Math::dot_row(i);
    const bool here = at < tile.count;
    const int64_t row = here ? tile.row(at) : 0;
    const float *w = weighing.w + (row * weighing.bands + band) * heads, *u = weighing.u + row * columns;
    float* parts = job.parts + (slab * job.shape.tokens + row) * width;
#pragma unroll 1
    for (int head = 0; head <= heads; ++head) {  // the last one stands for the offset path
      const int begin = head * weighing.rank - first_rank,
                end = head < heads ? begin + weighing.rank : width - first_rank;
      const float weight = here && head < heads ? w[head] : 1.f;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < Math::kDotCols; ++j) {
        const int column = Math::dot_col(j);
        if (!here || column < begin || column >= end) continue;
        const float value = Math::dot_at(q, i, j);
        if (head < heads) sum += u[first_rank + column] * value;
        parts[first_rank + column] = (first ? 0.f : parts[first_rank + column]) + weight * value;
      }
#pragma unroll
      for (int lanes = Math::kDotLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      if (here && head < heads && threadIdx.x % Math::kDotLanes == 0) {
        weighing.segments[(segment * job.shape.tokens + row) * heads + head] = sum;
      }
    }
  }
}

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
  const int begin = int(blockIdx.y * job.cut.slab_tiles) * kTileCols<T>;
  const int64_t slab_end = begin + job.cut.slab_tiles * kTileCols<T>;
  Columns<T> at(begin, min(slab_end, job.x.cols), job.band), ahead = at;
  SharedArena arena;
  T* piece = arena.take<T>(kRank * kPieceStride<T, kRank>);
  T* stages = arena.take<T>(kStages * kTileSize<T>);
  const Dropout dropout(job.masks.dropout);
  Units<T> units(int(threadIdx.x) % kWarp, kWarp, first_row);
  units.enter(tile);

  const auto copy = [&](int s) {
    if (!ahead.done()) {
      units.copy(stages + s * kTileSize<T>, job.x, ahead.col, ahead.band_end());
      ahead.next();
    }
    cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) copy(s);
  typename Math::Dot acc = {};
  int stage = 0, in_piece = kPieceTiles<kRank>;
  while (!at.done()) {
    const int col = at.col, end = at.band_end();
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
    for_each_stream<kRank>(job.masks, dropout, first_rank, [&](int first, int last, int stream) {
      const KeepTile<T> keep(dropout, job.masks, stream, tile, first_row, job.x.cols, col);
      Math::dot(acc, rows, m, first, last, keep);
    });
    stage = stage + 1 == kStages ? 0 : stage + 1;
    ++in_piece;
    at.next();
    if (at.col == end) {
      in_piece = kPieceTiles<kRank>;
      if (job.weighing.w) {
        weigh_band<Math>(acc, job, tile, first_rank, col / job.band, col / job.band == begin / job.band);
        acc = {};
      }
    }
  }
  if (job.weighing.w && begin < job.x.cols) return;

  float* parts = job.parts + int64_t(blockIdx.y) * job.shape.tokens * job.shape.rank;
  const auto scale = [&](int j) { return job.masks.has(first_rank + j) ? job.masks.kept : 1.f; };
  Math::store(acc, scale, job.shape.rank - first_rank, [&](int i) {
    return first_row + i < tile.count ? parts + tile.row(first_row + i) * job.shape.rank + first_rank : nullptr;
  });
}

template <class Math>
void shrink(const ShrinkJob<typename Math::Element>& job, int64_t rank_chunks, Stream stream) {
  const int64_t rows = row_tiles(job.shape.tokens, job.shape.groups);
  if (rows == 0 || rank_chunks == 0) return;
  launch(shrink_kernel<Math>, Grid(rows, job.cut.slabs, rank_chunks), dim3(kThreads), kShrinkShared<Math>, stream, job);
}

}  // namespace align::cuda
