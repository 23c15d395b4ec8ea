// outer computes out[j, c] = scale * sum over the rows of a group of g[t, j] xd[t, c]. g[t, j] is
// source(row, rank, output group). A block owns a few tiles of columns of one output group and runs through a
// chunk of a group's rows with its sums in registers. A warp masks what it multiplies, for one mask after the other;
// the tile in shared memory stays as it is. The sums of a group of several chunks are added in order by
// sum_chunks; a single chunk writes the gradient itself. The backward pass computes dB from z and dy, and dA from dz
// and x.
//
// With kDot a block also computes what its columns contribute to dz = scaling B^T dy, in the same pass over dy. This is
// called the sweep.
//
// Bytes: x is read once for each chunk of ranks, however many masks there are; where those of one adapter have more
// ranks together, they read a tile again from the second-level cache. The partials are written once; the sums of chunks
// of rows are written and read once. Every block of columns reads the latent rows.
#pragma once

#include "cuda/adapter_matrix.cuh"

namespace align::cuda {

// The tiles side by side, and the columns, of a block.
template <typename T, bool kDot>
constexpr int kSides = kDot && sizeof(T) == 2 ? kSweepTiles : kOuterTiles;
template <typename T, bool kDot>
constexpr int kOuterCols = kSides<T, kDot> * kTileCols<T>;

template <typename T>
struct OuterJob {
  GroupedLoraShape shape;  // tokens, rank and groups count
  RowGroups groups = {};
  TokenMatrix<T> x;
  RankMasks masks;            // masks.scale multiplies the sums of ranks that see a mask
  bool adds_masks = false;    // whether all masks are those of one adapter, whose gradient is the sum of theirs
  AdapterMatrix<T> m;         // the adapters whose gradients are computed
  float* out[kAdapters];      // [groups] gradients in the layout of the adapters, assigned; null: not wanted
  float* partials = nullptr;  // sweep: [blocks of columns, tokens, rank], assigned
  int output_groups = 1;
  // Set by place_sums.
  int chunk_rows = 0;
  float* sums[kAdapters] = {};  // [outer_sums] gradients of chunks, assigned for groups of several chunks

  __host__ __device__ int group_cols() const { return int(x.cols) / output_groups; }
  // The blocks of columns.
  template <bool kDot>
  __host__ __device__ int blocks_of_group() const {
    return (group_cols() + kOuterCols<T, kDot> - 1) / kOuterCols<T, kDot>;
  }
  template <bool kDot>
  int blocks() const {
    return output_groups * blocks_of_group<kDot>();
  }
  __host__ __device__ int ranks_of_mask() const { return masks.ranks_each < m.ranks ? masks.ranks_each : m.ranks; }
  // The ranks that are added to earlier ones, and the chunks of the others.
  __host__ __device__ int folded() const { return adds_masks ? (masks.count - 1) * masks.ranks_each : 0; }
  __host__ __device__ int chunks(int rank) const { return (m.ranks - folded() + rank - 1) / rank; }
  // How many masks that are added up fit a chunk of ranks, with the ranks that see none.
  __device__ int masks_at_once(int rank) const { return 1 + max(rank - (m.ranks - folded()), 0) / masks.ranks_each; }
  int64_t row_chunks() const { return outer_chunks(shape.tokens, shape.groups, ranks_of_mask()); }
};

// The floats of the sums of all chunks of rows, for the gradient of one adapter.
template <typename T>
int64_t floats_of_sums(const GroupedLoraShape& shape, const RankMasks& masks, const AdapterMatrix<T>& m, int adapter) {
  const int64_t ranks = std::min(masks.ranks_each, m.ranks);
  return outer_sums(shape.tokens, shape.groups, ranks) * m.adapters[adapter].group_stride;
}

// Cuts the rows into chunks, whose sums begin at `floats`. Returns where they end.
template <typename T>
float* place_sums(OuterJob<T>& job, float* floats) {
  job.chunk_rows = int(outer_rows(job.ranks_of_mask()));
  for (int i = 0; i < kAdapters; ++i) {
    if (job.out[i] == nullptr) continue;
    job.sums[i] = floats;
    floats += floats_of_sums(job.shape, job.masks, job.m, i);
  }
  return floats;
}

template <class Math, bool kDot>
constexpr size_t kOuterShared = sizeof(typename Math::Element) *
                                (Math::kStages * kTileSize<typename Math::Element> + 2 * kTileRows * Math::kLatentRow +
                                 (kDot ? Math::kRank * Math::kPieceRow : Math::kStripSize));

// The latent rows of a tile are loaded in slices, one for each part of a tile of x that is summed meanwhile, because
// registers are scarce. This is a slice's values that one thread carries from global to shared memory.
template <class Math, int kSlices>
struct LatentValues {
  using T = typename Math::Element;
  static constexpr int kRank = Math::kRank, kRows = kTileRows / kSlices, kStep = kThreads / kRank,
                       kCount = kRows / kStep;
  float v[kCount] = {};

  template <class LatentSource>
  __device__ __forceinline__ void load(const LatentSource& source, const RowTile& tile, int slice, int first_rank,
                                       int output_group) {
    const unsigned thread = thread_again();
    const int j = first_rank + int(thread % kRank), first = slice * kRows + int(thread / kRank);
    const int left = j < source.ranks ? tile.count - first : 0;
    if (tile.rows) {  // rows in groups have no router
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const float* value = source.value(tile.row(min(first + u * kStep, tile.count - 1)), j);
        v[u] = u * kStep < left ? *value : 0.f;
      }
      return;
    }
    const float* value = source.value(tile.begin + first, j);
#pragma unroll
    for (int u = 0; u < kCount; ++u) v[u] = u * kStep < left ? value[u * kStep * int(source.width)] : 0.f;
    if (j < source.weighted) {
      const float* weight = source.weight(tile.begin + first, j, output_group);
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        v[u] *= u * kStep < left ? weight[u * kStep * source.output_groups * source.heads] : 1.f;
      }
    }
  }
  __device__ __forceinline__ void store(T* g, int slice) const {
    const unsigned thread = thread_again();
    g += (slice * kRows + thread / kRank) * kLatentStride<T, kRank> + thread % kRank;
#pragma unroll
    for (int u = 0; u < kCount; ++u) g[u * kStep * kLatentStride<T, kRank>] = to_element<T>(v[u]);
  }
};

template <class Math, bool kDot, class LatentSource>
__device__ __forceinline__ void outer_columns(const OuterJob<typename Math::Element>& job, const LatentSource& source,
                                              int block, int row_chunk, int rank_chunk) {
  using T = typename Math::Element;
  constexpr int kRank = Math::kRank, kStages = Math::kStages, kTiles = kSides<T, kDot>, kRows = Math::kOuterRows,
                kParts = kTileRows / kRows, kSlices = kParts * kTiles;
  RowChunk chunk;
  if (!find_chunk(job.groups, job.shape, row_chunk, job.chunk_rows, &chunk)) return;
  const int group = chunk.group, begin = chunk.begin, end = chunk.end;
  const int first_rank = rank_chunk * kRank;
  const int blocks_of_group = job.template blocks_of_group<kDot>();
  const int output_group = block / blocks_of_group, end_col = (output_group + 1) * job.group_cols();
  const int first_col = output_group * job.group_cols() + block % blocks_of_group * kOuterCols<T, kDot>;
  // The masks that are added up. More than fit a chunk of ranks use a tile one turn after the other.
  const int masks = kDot || !job.adds_masks ? 1 : job.masks.count, at_once = masks > 1 ? job.masks_at_once(kRank) : 1;
  struct Turn {
    int row, mask;
  };
  const auto after = [&](const Turn& turn) {
    return turn.mask + at_once < masks ? Turn{turn.row, turn.mask + at_once} : Turn{turn.row + kTileRows, 0};
  };
  const auto rank_of = [&](const Turn& turn) {
    return first_rank + (masks > 1 ? turn.mask * job.masks.ranks_each : 0);
  };
  const auto tile_at = [&](const Turn& turn) { return tile_of(job.groups, group, turn.row, end); };
  const auto col_at = [&](int side) { return first_col + side * kTileCols<T>; };

  const int first_row = int(threadIdx.x) / kWarp * kWarpRows;
  SharedArena arena;
  T* stages = arena.allocate<T>(kStages * kTileSize<T>);
  T* latent = arena.allocate<T>(2 * kTileRows * kLatentStride<T, kRank>);
  // Fragments may reach into the padding of a latent row.
  *reinterpret_cast<uint4*>(latent + threadIdx.x * kLatentStride<T, kRank> + kRank) = make_uint4(0, 0, 0, 0);
  T* piece = nullptr;
  if constexpr (kDot) {
    piece = arena.allocate<T>(kRank * kPieceStride<T, kRank>);
    load_piece<T, kRank, false>(piece, job.m, group, first_rank, first_col, kOuterCols<T, kDot>, end_col);
  }
  T* strips = kDot ? nullptr : arena.allocate<T>(Math::kStripSize);
  const Dropout dropout(job.masks.dropout, job.x.cols);
  Units<T> copied(int(threadIdx.x), kThreads, 0);
  const auto copy = [&](const Turn& of, int step, int side) {
    if (of.row < end) {
      if (side == 0) copied.enter(tile_at(of));
      copied.copy(stages + step % kStages * kTileSize<T>, job.x, col_at(side), end_col);
    }
    cp_async_commit();
  };

  // A slice is loaded, and stored when the next one is loaded, while the tile before is summed.
  LatentValues<Math, kSlices> values;
  const auto latent_at = [&](int step) { return latent + step / kTiles % 2 * kTileRows * kLatentStride<T, kRank>; };
  if (begin < end) {
    for (int slice = 0; slice < kSlices; ++slice) {
      if (slice > 0) values.store(latent, slice - 1);
      values.load(source, tile_at({begin, 0}), slice, first_rank, output_group);
    }
  }
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy({begin, 0}, s, s);
  typename Math::Outer acc[kTiles] = {};
  Turn next;
  int step = 0;
  for (Turn turn{begin, 0}; turn.row < end; turn = next, step += kTiles) {
    next = after(turn);
    const RowTile tile = tile_at(turn);
    const T* g = latent_at(step);
    typename Math::Dot dot = {};
#pragma unroll
    for (int side = 0; side < kTiles; ++side) {
      T* x = stages + (step + side) % kStages * kTileSize<T>;
      cp_async_wait<kStages - 2>();
      if (side == 0) values.store(latent_at(step), kSlices - 1);
      __syncthreads();  // tile and latent rows are complete; all warps are done with the last tile
      constexpr int kAhead = kStages - 1;
      copy(side + kAhead < kTiles ? turn : next, step + side + kAhead, (side + kAhead) % kTiles);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int slice = kParts * side + part;
        if (next.row < end) {
          if (slice > 0) values.store(latent_at(step + kTiles), slice - 1);
          values.load(source, tile_at(next), slice, rank_of(next), output_group);
        }
        const T *rows = g + part * kRows * kLatentStride<T, kRank>, *of_x = x + part * kRows * kTileStride<T>;
        if constexpr (kDot) {
          Math::outer(acc[side], rows, of_x, 0, kRank, 0, typename Math::OuterMask(dropout, false, strips));
        } else {
          const int drawn = job.masks.drawn(dropout);
          const int ranks = turn.mask + at_once < masks ? at_once * job.masks.ranks_each - first_rank : kRank;
          const auto sum = [&](int first, int last, int index) {
            const int fold = masks > 1 ? ((index < 0 ? masks - 1 : index) - turn.mask) * job.masks.ranks_each : 0;
            typename Math::OuterMask mask(dropout, index >= 0 && drawn > 0, strips);
            if (mask.drawn) mask.draw(tile, job.masks, index, job.x.cols, col_at(side), part * kRows);
            Math::outer(acc[side], rows, of_x, first, last, fold, mask);
          };
          for_each_mask(job.masks, masks > 1 ? masks : drawn, rank_of(turn), min(ranks, kRank), sum);
        }
      }
      if constexpr (kDot) {
        Math::dot(dot, x + first_row * kTileStride<T>, piece + side * kTileCols<T>, 0, kRank);
      }
    }
    if constexpr (kDot) {
      float* partials = job.partials + int64_t(block) * job.shape.tokens * job.shape.rank;
      Math::store(
          dot, [&](int) { return job.masks.scale; }, job.shape.rank - first_rank,
          [&](int i) {
            const int row = first_row + Math::dot_row(i);
            return row < tile.count ? partials + tile.row(row) * job.shape.rank + first_rank : nullptr;
          });
    }
  }

  // A group's only chunk writes its gradient, others their sums.
  const auto& outs = chunk.only ? job.out : job.sums;
  const int64_t place = chunk.only ? group : row_chunk;
#pragma unroll
  for (int side = 0; side < kTiles; ++side) {
    Math::finish(acc[side], [&](int j, int c, float value) {
      const int folded = first_rank + j, rank = folded < job.masks.ranks_each ? folded : folded + job.folded();
      const int64_t col = first_col + side * kTileCols<T> + c;
      const Adapter& adapter = job.m.adapter_of(rank);
      float* out = outs[&adapter - job.m.adapters];
      if (adapter.has(rank) && col < end_col && out != nullptr) {
        const int64_t at = place * adapter.group_stride + adapter.layout.offset(rank - adapter.start, col);
        out[at] = (job.masks.has(rank) ? job.masks.scale : 1.f) * value;
      }
    });
  }
}

// Grid: blocks of columns for each chunk of rows.
template <class Math, class LatentSource>
__global__ void __launch_bounds__(kThreads, 2)
    sweep_kernel(OuterJob<typename Math::Element> job, LatentSource source, int blocks) {
  require(compiled_here<Math>());
  if (!compiled_here<Math>()) return;
  outer_columns<Math, true>(job, source, int(blockIdx.x) % blocks, int(blockIdx.x) / blocks, 0);
}

// The sweep: one pass over the token matrix for the outer products and for the partials of its product with the adapter
// matrix.
template <class Math, class LatentSource>
void sweep(const OuterJob<typename Math::Element>& job, const LatentSource& source, Stream stream) {
  const int64_t blocks = job.template blocks<true>() * job.row_chunks();
  if (blocks == 0 || job.shape.rank == 0) return;
  launch(sweep_kernel<Math, LatentSource>, blocks, dim3(kThreads), kOuterShared<Math, true>, stream, job, source,
         job.template blocks<true>());
}

constexpr int kChunkSums = 3 * kAdapters;

// The gradients whose sums of chunks of rows are added.
struct ChunkSums {
  struct Gradient {
    float* out;         // [groups, elements], assigned for groups of several chunks
    const float* sums;  // [chunks, elements]
    int64_t elements;
    int chunk_rows;
    int64_t stride;       // from the sums of one chunk to those of the next
    bool of_only_chunks;  // whether those of a group's only chunk are here too, and not in `out` yet
    int blocks;           // 0: there is no such gradient
  };
  GroupedLoraShape shape;
  RowGroups groups;
  Gradient gradients[kChunkSums];
  int count = 0;

  void add(float* out, const float* sums, int64_t elements, int chunk_rows, int64_t stride, bool of_only_chunks) {
    const int blocks = int(Grid(ceil_div(elements, kThreads) * shape.groups).x);
    gradients[count++] = {out, sums, elements, chunk_rows, stride, of_only_chunks, blocks};
  }
  // The gradients that `outer` and `sweep` have left as sums.
  template <typename T>
  void add(const OuterJob<T>& job) {
    for (int i = 0; i < kAdapters; ++i) {
      const int64_t elements = job.m.adapters[i].group_stride;
      if (job.out[i] == nullptr || floats_of_sums(job.shape, job.masks, job.m, i) == 0) continue;
      add(job.out[i], job.sums[i], elements, job.chunk_rows, elements, /*of_only_chunks=*/false);
    }
  }
};

void sum_chunks(const ChunkSums& job, Stream stream);  // defined in projection.cu

// Adds the sums of chunks of up to kChunkSums gradients in one launch.
template <typename T>
void sum_chunks(std::initializer_list<OuterJob<T>> jobs, Stream stream) {
  ChunkSums all = {jobs.begin()->shape, jobs.begin()->groups, {}};
  for (const OuterJob<T>& job : jobs) all.add(job);
  sum_chunks(all, stream);
}

}  // namespace align::cuda
