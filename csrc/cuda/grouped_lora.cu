// Grouped LoRA mixes nothing: the latent rows of expand are z, or dz, as shrink left it (shrink.cuh, expand.cuh).
//
//   forward   base, shrink (z), expand (y)
//   backward  base, sweep (dB, parts of dz) or shrink (parts of dz), sum of the parts, backward (dA, dx, and dB)
//
// A row tile belongs to one group, and uses its A and B.
#include "ops/grouped_lora.h"

#include "cuda/projection.cuh"

namespace align::cuda {
namespace {

// Latent rows that lie in parts, one for each slab; they are added in order.
struct SumOfParts {
  const float* parts;  // [count, tokens, rank]
  int64_t count, tokens, rank;
  float* sum;  // [tokens, rank], assigned by save, or null

  __device__ float operator()(int64_t row, int64_t j, int = 0) const {
    return j < rank ? sum_of_parts(parts, count, tokens * rank, row * rank + j) : 0;
  }

  // Rows first .. first + rows of a tile.
  __device__ void save(const RowTile& tile, int first, int rows, int thread, int threads) const {
    if (sum == nullptr) return;
    for (int64_t i = thread; i < rows * rank; i += threads) {
      const int at = first + int(i / rank);
      if (at < tile.count) sum[tile.row(at) * rank + i % rank] = (*this)(tile.row(at), i % rank);
    }
  }
};

// sum[e] = the parts of e in order, + more[e].
__global__ void __launch_bounds__(kThreads) sum_kernel(SumOfParts parts, const float* more) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= parts.tokens * parts.rank) return;
  const float total = parts(e / parts.rank, e % parts.rank);
  parts.sum[e] = more ? total + more[e] : total;
}

// ---- Rows in group order. A block a group: it counts the rows of the groups before its own, then writes its own in
// order, 256 at a time; a row's place is its rank among the votes of its warp and the warps before.
__global__ void __launch_bounds__(kThreads)
    sort_kernel(const int64_t* group, int64_t tokens, int64_t groups, int64_t* rows, int64_t* offsets) {
  __shared__ int votes[2][kWarps];
  const int64_t mine = blockIdx.x;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  int64_t before = 0;
  for (int64_t t = threadIdx.x; t < tokens; t += kThreads) {
    require(0 <= group[t] && group[t] < groups);
    before += group[t] < mine;
  }
  int64_t next = block_sum(before);
  if (threadIdx.x == 0) offsets[mine] = next;
  if (threadIdx.x == 0 && mine == 0) offsets[groups] = tokens;
  int turn = 0;
  for (int64_t first = 0; first < tokens; first += kThreads, turn = 1 - turn) {
    const int64_t t = first + threadIdx.x;
    const bool here = t < tokens && group[t] == mine;
    const unsigned vote = __ballot_sync(kAllLanes, here);
    if (lane == 0) votes[turn][warp] = __popc(vote);
    __syncthreads();  // votes are complete; those of the last turn but one have been read
    int64_t place = next + __popc(vote & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += votes[turn][w];
      next += votes[turn][w];
    }
    if (here) rows[place] = t;
  }
}

// ---- Launchers

template <typename T, typename W>
SmallMatrix<T> small_a(const GroupedLoraShape& shape, const W* A) {
  const Layout layout = layout_of_a(shape.rank, shape.in_dim);
  return stack<T>(shape.in_dim, {A, std::is_same_v<W, float>, int(shape.rank), layout, shape.rank * shape.in_dim, 0});
}
template <typename T, typename W>
SmallMatrix<T> small_b(const GroupedLoraShape& shape, const W* B) {
  const Layout layout = layout_of_b(shape.rank, shape.out_dim);
  return stack<T>(shape.out_dim, {B, std::is_same_v<W, float>, int(shape.rank), layout, shape.rank * shape.out_dim, 0});
}

Plan plan_for(const GroupedLoraShape& shape, int64_t element_bytes) {
  return plan(shape.tokens, shape.in_dim, shape.out_dim, shape.rank, shape.groups, element_bytes, current_device());
}

// Parts of dz: of the sweep's blocks of columns, or of shrink's slabs.
int64_t dz_parts(const Plan& plan, const GroupedLoraShape& shape, int64_t element_bytes) {
  return plan.one_pass ? outer_blocks(shape.out_dim, element_bytes) : plan.shrink_dy.slabs;
}

int64_t latent_bytes(const GroupedLoraShape& shape) { return shape.tokens * shape.rank * int64_t(sizeof(float)); }

}  // namespace

int64_t grouped_lora_forward_workspace(const GroupedLoraShape& shape, int64_t element_bytes) {
  const Plan plan = plan_for(shape, element_bytes);
  return plan.shrink.slabs > 1 ? plan.shrink.slabs * latent_bytes(shape) : 0;
}

int64_t grouped_lora_backward_workspace(const GroupedLoraShape& shape, int64_t element_bytes) {
  return (dz_parts(plan_for(shape, element_bytes), shape, element_bytes) + 1) * latent_bytes(shape);
}

template <typename T, typename W>
void grouped_lora_forward(const GroupedLoraForwardArgs<T, W>& args, Stream stream) {
  const GroupedLoraShape& shape = args.shape;
  const Plan plan = plan_for(shape, sizeof(T));
  const bool split = plan.shrink.slabs > 1;
  float* parts = split ? static_cast<float*>(args.workspace) : args.z;
  const SumOfParts z{parts, plan.shrink.slabs, shape.tokens, shape.rank, split ? args.z : nullptr};
  const double kept = dropout_scale(dropout_threshold(args.dropout.p));
  const int in_band = band_of(shape.in_dim), out_band = band_of(shape.out_dim);
  with_math<T>(plan, [&](auto math) {
    using Math = decltype(math);
    shrink<Math>({shape,
                  args.row_groups,
                  tall(args.x, shape.in_dim, args.z),
                  small_a<T>(shape, args.A),
                  {args.dropout, 1, kAllRanks, float(kept)},
                  parts,
                  plan.shrink,
                  in_band,
                  {}},
                 plan.rank_chunks, stream);
    expand<Math>(
        {shape, args.row_groups, tall(args.y_in, shape.out_dim, args.y), args.y, rows_aligned(args.y, shape.out_dim),
         args.bias, small_b<T>(shape, args.B), kNoMasks, float(args.scaling), plan.expand, out_band},
        z, stream);
  });
}

template <typename T, typename W>
void grouped_lora_backward(const GroupedLoraBackwardArgs<T, W>& args, Stream stream) {
  const GroupedLoraShape& shape = args.shape;
  const Plan plan = plan_for(shape, sizeof(T));
  const int64_t count = dz_parts(plan, shape, sizeof(T)), elements = shape.tokens * shape.rank;
  float* parts = static_cast<float*>(args.workspace);
  // Parts that are dz already need no sum.
  float* dz = count == 1 && args.dz_in == nullptr ? parts : parts + count * elements;
  const int rank = int(shape.rank);
  const LatentRows latent_z{args.z, rank, rank}, latent_dz{dz, rank, rank};
  const float scaling = float(args.scaling);
  const int in_band = band_of(shape.in_dim), out_band = band_of(shape.out_dim);
  const float kept = float(dropout_scale(dropout_threshold(args.dropout.p)));
  const RankMasks masks{args.dropout, 1, kAllRanks, kept}, scaled{{0, nullptr}, 1, kAllRanks, scaling};
  const SmallMatrix<T> a = small_a<T>(shape, args.A), b = small_b<T>(shape, args.B);
  with_math<T>(plan, [&](auto math) {
    using Math = decltype(math);
    const TallMatrix<T> x = tall(args.x, shape.in_dim, args.z), dy = tall(args.dy, shape.out_dim, args.z);
    const OuterJob<T> d_b{shape, args.row_groups, dy, scaled, 1, b, {args.dB}, parts, out_band};
    if constexpr (Math::kRank == 16 && (Math::kTensorCores || std::is_same_v<T, float>)) {
      if (plan.one_pass) sweep<Math>(d_b, latent_z, stream);
    }
    if (!plan.one_pass) {
      shrink<Math>({shape, args.row_groups, dy, b, scaled, parts, plan.shrink_dy, out_band, {}}, plan.rank_chunks,
                   stream);
    }
    if (dz != parts && elements > 0) {
      launch(sum_kernel, ceil_div(elements, kThreads), dim3(kThreads), 0, stream,
             SumOfParts{parts, count, shape.tokens, shape.rank, dz}, args.dz_in);
    }
    const OuterJob<T> d_a{shape, args.row_groups, x, masks, 1, a, {args.dA}, nullptr, in_band};
    const ExpandJob<T> dx{shape,
                          args.row_groups,
                          tall(args.dx_in, shape.in_dim, args.dx),
                          args.dx,
                          rows_aligned(args.dx, shape.in_dim),
                          nullptr,
                          a,
                          masks,
                          1,
                          plan.expand_dx,
                          in_band};
    using Outer = typename BackwardJob<Math, LatentRows>::Outer;
    backward<Math>(
        BackwardJob<Math, LatentRows>{{Outer(d_a, latent_dz), plan.one_pass ? Outer() : Outer(d_b, latent_z)},
                                      dx,
                                      latent_dz,
                                      args.dx ? int(row_tiles(shape.tokens, shape.groups)) : 0},
        stream);
  });
}

void group_rows(const int64_t* group, int64_t tokens, int64_t groups, int64_t* rows, int64_t* offsets, Stream stream) {
  if (groups == 0) return;
  launch(sort_kernel, groups, dim3(kThreads), 0, stream, group, tokens, groups, rows, offsets);
}

#define ALIGN_INSTANTIATE(T, W)                                                          \
  template void grouped_lora_forward<T, W>(const GroupedLoraForwardArgs<T, W>&, Stream); \
  template void grouped_lora_backward<T, W>(const GroupedLoraBackwardArgs<T, W>&, Stream);
ALIGN_INSTANTIATE(float, float)
ALIGN_INSTANTIATE(bfloat16, bfloat16)
ALIGN_INSTANTIATE(bfloat16, float)
ALIGN_INSTANTIATE(float16, float16)
ALIGN_INSTANTIATE(float16, float)
#undef ALIGN_INSTANTIATE

}  // namespace align::cuda
