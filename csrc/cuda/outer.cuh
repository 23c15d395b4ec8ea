// outer: out[j, c] = scale * sum over a group's rows of g[t, j] xd[t, c], g = mix(row, rank, band); a block owns the
// columns of kOuterTiles tiles of a band and runs through all rows, so that its sums stay in registers and nothing is
// added up later. Backward: dB from z and dy, dA from dz and x.
//
// With kDot the block also has its columns' part of dz = scaling B^T dy, in the same pass over dy ("sweep").
//
// Bytes: x once for each chunk of ranks (and parts once); latent rows by every block of columns.
#pragma once

#include "cuda/adapter_matrix.cuh"

namespace align::cuda {

template <typename T>
constexpr int kOuterCols = kOuterTiles * kTileCols<T>;  // of a block

template <typename T>
struct OuterJob {
  GroupedLoraShape shape;  // tokens, rank and groups count
  RowGroups groups;
  TallMatrix<T> x;
  RankMasks masks;        // kept: the scale
  int summed;             // streams whose outer products are added up, all or 1
  SmallMatrix<T> m;       // whose gradients these are
  float* out[kAdapters];  // [groups] gradients that lie as the adapters do, assigned; or null: not wanted
  float* parts;           // sweep: [blocks of columns, tokens, rank], assigned
  int band;               // columns of a band

  __host__ __device__ int blocks_of_band() const { return (band + kOuterCols<T> - 1) / kOuterCols<T>; }
  int blocks() const { return int(x.cols / band) * blocks_of_band(); }
  // Ranks of a stream, and chunks of them; chunks of all streams that are not added up.
  __host__ __device__ int per() const { return masks.per < m.ranks ? masks.per : m.ranks; }
  __host__ __device__ int chunks_of_stream(int rank) const { return (per() + rank - 1) / rank; }
  __host__ __device__ int chunks(int rank) const { return chunks_of_stream(rank) * (masks.streams / summed); }
};

template <class Math, bool kDot>
constexpr size_t kOuterShared =
    sizeof(typename Math::Element) * (Math::kStages * kTileSize<typename Math::Element> +
                                      2 * kTileRows * Math::kLatentRow + (kDot ? Math::kRank * Math::kPieceRow : 0));

// A tile's latent rows come in parts, two for each tile of x that is summed meanwhile: registers are scarce.
constexpr int kLatentParts = 2 * kOuterTiles;

// A thread's share of one part, on its way from global to shared memory.
template <class Math>
struct LatentShare {
  using T = typename Math::Element;
  static constexpr int kRank = Math::kRank, kRows = kTileRows / kLatentParts, kCount = kRows * kRank / kThreads;
  float v[kCount];

  template <class Mix>
  __device__ __forceinline__ void load(const Mix& mix, const RowTile& tile, int part, int first_rank, int band) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = int(threadIdx.x) + u * kThreads, row = part * kRows + i / kRank;
      v[u] = row < tile.count ? mix(tile.row(row), first_rank + i % kRank, band) : 0.f;
    }
  }
  __device__ __forceinline__ void store(T* g, int part) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = int(threadIdx.x) + u * kThreads, row = part * kRows + i / kRank;
      g[row * kLatentStride<T, kRank> + i % kRank] = to_element<T>(v[u]);
    }
  }
};

template <class Math, bool kDot, class Mix>
__device__ __forceinline__ void outer_columns(const OuterJob<typename Math::Element>& job, const Mix& mix, int block,
                                              int group, int chunk) {
  using T = typename Math::Element;
  constexpr int kRank = Math::kRank, kStages = Math::kStages;
  int begin, end;
  group_bounds(job.groups, job.shape.tokens, group, &begin, &end);
  const int stream = chunk / job.chunks_of_stream(kRank), rank_of_stream = chunk % job.chunks_of_stream(kRank) * kRank;
  const int first_rank = stream * job.per() + rank_of_stream;
  const int band = block / job.blocks_of_band(), end_col = (band + 1) * job.band;
  const int first_col = band * job.band + block % job.blocks_of_band() * kOuterCols<T>;
  // Streams that are added up take turns with a tile, which is in the second-level cache then.
  struct Turn {
    int row, stream;
  };
  const auto after = [&](const Turn& turn) {
    return turn.stream + 1 < job.summed ? Turn{turn.row, turn.stream + 1} : Turn{turn.row + kTileRows, 0};
  };
  const auto tile_at = [&](const Turn& turn) { return tile_of(job.groups, group, turn.row, end); };
  const auto col_at = [&](int step) { return first_col + step % kOuterTiles * kTileCols<T>; };

  const int first_row = int(threadIdx.x) / kWarp * kWarpRows;
  SharedArena arena;
  T* stages = arena.take<T>(kStages * kTileSize<T>);
  T* latent = arena.take<T>(2 * kTileRows * kLatentStride<T, kRank>);
  T* piece = nullptr;
  if constexpr (kDot) {
    piece = arena.take<T>(kRank * kPieceStride<T, kRank>);
    load_piece<T, kRank>(piece, job.m, group, first_rank, first_col, kOuterCols<T>, end_col);
  }
  const Dropout dropout(job.masks.dropout);
  Units<T> units(int(threadIdx.x), kThreads, 0);
  Turn ahead{begin, 0};
  const auto copy = [&](int step) {
    if (ahead.row < end) {
      units.enter(tile_at(ahead));
      units.copy(stages + step % kStages * kTileSize<T>, job.x, col_at(step), end_col);
      if (step % kOuterTiles == kOuterTiles - 1) ahead = after(ahead);
    }
    cp_async_commit();
  };

  // A part is loaded, then stored when the next one is due, all while the tile before is summed.
  LatentShare<Math> share;
  const auto latent_at = [&](int step) {
    return latent + step / kOuterTiles % 2 * kTileRows * kLatentStride<T, kRank>;
  };
  if (begin < end) {
    for (int part = 0; part < kLatentParts; ++part) {
      if (part > 0) share.store(latent, part - 1);
      share.load(mix, tile_at({begin, 0}), part, first_rank, band);
    }
  }
  for (int s = 0; s < kStages - 1; ++s) copy(s);
  typename Math::Outer acc[kOuterTiles] = {};
  Turn next;
  int step = 0;
  for (Turn turn{begin, 0}; turn.row < end; turn = next, step += kOuterTiles) {
    next = after(turn);
    const RowTile tile = tile_at(turn);
    const T* g = latent_at(step);
    typename Math::Dot dot = {};
#pragma unroll
    for (int side = 0; side < kOuterTiles; ++side) {
      T* x = stages + (step + side) % kStages * kTileSize<T>;
      cp_async_wait<kStages - 2>();
      if (dropout.threshold > 0) {
        units.enter(tile);
        units.mask(x, dropout, job.masks.streams, stream + turn.stream, job.x.cols, col_at(step + side));
      }
      if (side == 0) share.store(latent_at(step), kLatentParts - 1);
      __syncthreads();  // tile and latent rows are complete; all warps are done with the last tile
      copy(step + side + kStages - 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int part = 2 * side + half, first = half * kTileRows / 2;
        if (next.row < end) {
          if (part > 0) share.store(latent_at(step + kOuterTiles), part - 1);
          share.load(mix, tile_at(next), part, first_rank + next.stream * job.per(), band);
        }
        Math::outer(acc[side], g + first * kLatentStride<T, kRank>, x + first * kTileStride<T>);
      }
      if constexpr (kDot) {
        Math::dot(dot, x + first_row * kTileStride<T>, piece + side * kTileCols<T>, 0, kRank, KeepTile<T>());
      }
    }
    if constexpr (kDot) {
      float* parts = job.parts + int64_t(block) * job.shape.tokens * job.shape.rank;
      Math::store(
          dot, [&](int) { return job.masks.kept; }, job.shape.rank - first_rank,
          [&](int i) {
            return first_row + i < tile.count ? parts + tile.row(first_row + i) * job.shape.rank + first_rank : nullptr;
          });
    }
  }

#pragma unroll
  for (int side = 0; side < kOuterTiles; ++side) {
    Math::finish(acc[side], [&](int j, int c, float value) {
      const int rank = first_rank + j;
      const int64_t col = first_col + side * kTileCols<T> + c;
      const Adapter& adapter = job.m.adapter_of(rank);
      float* out = job.out[&adapter - job.m.adapters];
      if (rank_of_stream + j < job.per() && adapter.has(rank) && col < end_col && out != nullptr) {
        const int64_t at = group * adapter.group_stride + adapter.layout.offset(rank - adapter.start, col);
        out[at] = job.masks.kept * value;
      }
    });
  }
}

// Grid: blocks of columns, groups.
template <class Math, class Mix>
__global__ void __launch_bounds__(kThreads, 2) sweep_kernel(OuterJob<typename Math::Element> job, Mix mix) {
  require(compiled_here<Math>());
  if (compiled_here<Math>()) outer_columns<Math, true>(job, mix, int(blockIdx.x), int(blockIdx.y), 0);
}

// One pass over the tall matrix for both: the outer products, and the parts of its product with the small matrix.
template <class Math, class Mix>
void sweep(const OuterJob<typename Math::Element>& job, const Mix& mix, Stream stream) {
  const int64_t blocks = job.blocks();
  if (blocks == 0 || job.shape.groups == 0 || job.shape.rank == 0) return;
  launch(sweep_kernel<Math, Mix>, Grid(blocks, job.shape.groups), dim3(kThreads), kOuterShared<Math, true>, stream, job,
         mix);
}

}  // namespace align::cuda
