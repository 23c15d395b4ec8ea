// expand computes out[t, c] = in[t, c] (or 0) + bias[c] + scale * sum_j mask_j[t, c] g[t, j] m[j, c] with one rounding.
// A block computes a row tile and a split of the columns. g[t, j] is source(row, rank, output group). The forward pass
// computes y from z and B, the backward pass dx from dz and A.
//
// Bytes: in is read once, if there is one, and out written once. Every row tile reads the adapter matrix, every split
// the latent rows. More than kRank ranks are taken in chunks: every tile of columns
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
  int output_groups = 1;
};

template <class Math>
constexpr size_t kExpandShared =
    sizeof(typename Math::Element) * (Math::kRank * Math::kPieceRow + kTileRows * Math::kLatentRow) +
    sizeof(float) * kPieceCols<typename Math::Element, Math::kRank>;

// Writes a unit of a row, v with what is added to it, to columns col .. end.
template <typename T>
__device__ __forceinline__ void write_unit(const ExpandJob<T>& job, float (&v)[kUnit<T>], const float* bias, int row,
                                           int col, int end) {
  if (row < 0 || col >= end) return;
  const int64_t at = int64_t(row) * job.in.cols + col;
  if (job.in.data) {
    T in[kUnit<T>] = {};
    if (job.in.aligned) {
      const uint4 bits = *reinterpret_cast<const uint4*>(job.in.data + at);
      memcpy(in, &bits, sizeof(bits));
    } else {
#pragma unroll
      for (int e = 0; e < kUnit<T>; ++e) {
        if (col + e < end) in[e] = job.in.data[at + e];
      }
    }
#pragma unroll
    for (int e = 0; e < kUnit<T>; ++e) v[e] += widen(in[e]);
  }
  if (job.bias) {
#pragma unroll
    for (int e = 0; e < kUnit<T>; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(bias + e);
      v[e] += four.x, v[e + 1] += four.y, v[e + 2] += four.z, v[e + 3] += four.w;
    }
  }
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = pack_word<T>(v + w * (kUnit<T> / 4));
  if (job.out_aligned) {
    *reinterpret_cast<uint4*>(job.out + at) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
  T unit[kUnit<T>];
  memcpy(unit, words, sizeof(words));
#pragma unroll
  for (int e = 0; e < kUnit<T>; ++e) {
    if (col + e < end) job.out[at + e] = unit[e];
  }
}

template <class Math, class LatentSource>
__device__ __forceinline__ void expand_tiles(const ExpandJob<typename Math::Element>& job, const LatentSource& source,
                                             int tile_index, int split) {
  using T = typename Math::Element;
  constexpr int kRank = Math::kRank;
  RowTile tile;
  if (!find_tile(job.groups, job.shape, tile_index, &tile)) return;

  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp, first_row = warp * kWarpRows;
  const ColumnRange range = columns_of<T>(job.cut, job.in.cols, job.output_groups, split);
  // With several chunks of ranks the piece of the adapter matrix is one tile wide and loaded for every chunk.
  const bool one_chunk = job.shape.rank <= kRank;
  const int piece_tiles = one_chunk ? kPieceTiles<kRank> : 1;
  SharedArena arena;
  T* piece = arena.allocate<T>(kRank * kPieceStride<T, kRank>);
  T* g = arena.allocate<T>(kTileRows * kLatentStride<T, kRank>);
  float* bias = arena.allocate<float>(kPieceCols<T, kRank>);
  const Dropout dropout(job.masks.dropout, job.in.cols);
  const typename Math::AddMask mask(tile, first_row);
  const auto factor = [&](int rank) { return job.scale * (job.masks.has(rank) ? job.masks.scale : 1.f); };

  if (split == 0) source.save(tile, first_row, kWarpRows, lane, kWarp);
  bool filled = false;  // whether the latent rows of the only chunk are there
  int in_piece = piece_tiles;
  for (int col = range.begin; col < range.end; col += kTileCols<T>) {
    typename Math::Add acc = {};
    const bool new_piece = in_piece == piece_tiles;
    if (new_piece) in_piece = 0;
    for (int first_rank = 0; first_rank == 0 || first_rank < job.shape.rank; first_rank += kRank) {
      if (new_piece) {
        const int width = piece_width<T>(piece_tiles, col, range.end);
        __syncthreads();  // all warps are done with the piece, the bias and their latent rows
        load_piece<T, kRank, Math::kTensorCores>(piece, job.m, tile.group, first_rank, col, width, range.end);
        for (int c = thread_again(); job.bias && c < width; c += kThreads) {
          bias[c] = col + c < range.end ? widen(job.bias[col + c]) : 0.f;
        }
        if (!filled) {
          fill_latent<T, kRank>(g, source, factor, tile, first_row, kWarpRows, first_rank, range.group,
                                thread_again() % kWarp, kWarp);
        }
        filled = one_chunk;
        __syncthreads();  // piece, bias and latent rows are complete
      }
      const T *latents = g + first_row * kLatentStride<T, kRank>, *m = piece + in_piece * kTileCols<T>;
      for_each_mask(job.masks, job.masks.drawn(dropout), first_rank, kRank, [&](int first, int last, int mask_index) {
        if (mask_index < 0) return Math::add(acc, latents, m, first, last);
        const auto drawn = mask.of(dropout, job.masks, mask_index, job.in.cols, col);
        Math::add(acc, latents, m, first, last, &drawn);
      });
    }
#pragma unroll
    for (int i = 0; i < Math::kDotRows; ++i) {
#pragma unroll
      for (int unit = 0; unit < Math::kAddUnits; ++unit) {
        const int column = Math::add_column(unit);
        float v[kUnit<T>];
        Math::add_unit(v, acc, i, unit);
        write_unit(job, v, bias + in_piece * kTileCols<T> + column, mask.row[i], col + column, range.end);
      }
    }
    ++in_piece;
  }
}

// Grid: row tiles, splits of all groups of outputs.
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
  launch(expand_kernel<Math, LatentSource>, Grid(rows, job.cut.splits * job.output_groups), dim3(kThreads),
         kExpandShared<Math>, stream, job, source);
}

}  // namespace align::cuda
