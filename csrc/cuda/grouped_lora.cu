// Grouped LoRA has one head: the latent rows of expand are z or dz as shrink has computed them.
//
//   forward   base, shrink (z), expand (y)
//   backward  base, sweep (dB, partials of dz) or shrink (partials of dz), sum of the partials, backward (dA, dx, dB),
//             sum_chunks (dA and dB of groups of many rows)
//
// A row tile belongs to one group, and uses its A and B.
#include "ops/grouped_lora.h"

#include "cuda/projection.cuh"

namespace align::cuda {
namespace {

// Latent rows that are given as partials, one for each split, which are added in order.
struct SumOfPartials {
  const float* partials;  // [count, tokens, rank]
  int64_t count, tokens, rank;
  float* sum;  // [tokens, rank], written by save; or null

  __device__ float operator()(int64_t row, int64_t j, int = 0) const {
    return j < rank ? sum_of_partials(partials, count, tokens * rank, row * rank + j) : 0;
  }

  // Writes the sums of rows first .. first + rows - 1 of a tile.
  __device__ void save(const RowTile& tile, int first, int rows, int thread, int threads) const {
    if (sum == nullptr) return;
    for (int64_t i = thread; i < rows * rank; i += threads) {
      const int at = first + int(i / rank);
      if (at < tile.count) sum[tile.row(at) * rank + i % rank] = (*this)(tile.row(at), i % rank);
    }
  }
};

// sum[e] = the partials of e, added in order, + more[e].
__global__ void __launch_bounds__(kThreads) sum_kernel(SumOfPartials partials, const float* more) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= partials.tokens * partials.rank) return;
  const float total = partials(e / partials.rank, e % partials.rank);
  partials.sum[e] = more ? total + more[e] : total;
}

// ---- Rows in group order. One block for each group: it counts the rows of the groups before its own, then writes the
// numbers of its own rows in order, 256 at a time. The ballots of its warp and of the warps before give a row's
// position.
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
    int64_t target = next + __popc(vote & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) target += votes[turn][w];
      next += votes[turn][w];
    }
    if (here) rows[target] = t;
  }
}

// ---- Launchers

template <typename T, typename TA>
AdapterMatrix<T> matrix_of_a(const GroupedLoraShape& shape, const TA* A) {
  const Layout layout = layout_of_a(shape.rank, shape.in_dim);
  return stack<T>(shape.in_dim, {A, std::is_same_v<TA, float>, int(shape.rank), layout, shape.rank * shape.in_dim});
}
template <typename T, typename TA>
AdapterMatrix<T> matrix_of_b(const GroupedLoraShape& shape, const TA* B) {
  const Layout layout = layout_of_b(shape.rank, shape.out_dim);
  return stack<T>(shape.out_dim, {B, std::is_same_v<TA, float>, int(shape.rank), layout, shape.rank * shape.out_dim});
}

Plan plan_for(const GroupedLoraShape& shape, int64_t element_bytes) {
  return plan(shape.tokens, shape.in_dim, shape.out_dim, shape.rank, shape.groups, element_bytes, current_device());
}

// How many partials dz has: one for each block of columns of the sweep, or for each split of shrink.
int64_t dz_partials(const Plan& plan, const GroupedLoraShape& shape, int64_t element_bytes) {
  return plan.one_pass ? sweep_blocks(shape.out_dim, element_bytes) : plan.shrink_dy.splits;
}

// The floats of the sums of chunks of rows, of dA and of dB.
int64_t chunk_floats(const GroupedLoraShape& shape) {
  return outer_sums(shape.tokens, shape.groups, shape.rank) * shape.rank * (shape.in_dim + shape.out_dim);
}

int64_t latent_bytes(const GroupedLoraShape& shape) { return shape.tokens * shape.rank * int64_t(sizeof(float)); }

}  // namespace

int64_t grouped_lora_forward_workspace(const GroupedLoraShape& shape, int64_t element_bytes) {
  const Plan plan = plan_for(shape, element_bytes);
  return plan.shrink.splits > 1 ? plan.shrink.splits * latent_bytes(shape) : 0;
}

int64_t grouped_lora_backward_workspace(const GroupedLoraShape& shape, int64_t element_bytes) {
  return (dz_partials(plan_for(shape, element_bytes), shape, element_bytes) + 1) * latent_bytes(shape) +
         chunk_floats(shape) * int64_t(sizeof(float));
}

template <typename T, typename TA>
void grouped_lora_forward(const GroupedLoraForwardArgs<T, TA>& args, Stream stream) {
  const GroupedLoraShape& shape = args.shape;
  const Plan plan = plan_for(shape, sizeof(T));
  const bool is_split = plan.shrink.splits > 1;
  float* partials = is_split ? static_cast<float*>(args.workspace) : args.z;
  const SumOfPartials z{partials, plan.shrink.splits, shape.tokens, shape.rank, is_split ? args.z : nullptr};
  const double mask_scale = dropout_scale(dropout_threshold(args.dropout.p));
  with_math<T>(plan, [&](auto math) {
    using Math = decltype(math);
    shrink<Math>({.shape = shape,
                  .groups = args.row_groups,
                  .x = token_matrix(args.x, shape.in_dim),
                  .m = matrix_of_a<T>(shape, args.A),
                  .masks = {args.dropout, 1, kAllRanks, float(mask_scale)},
                  .partials = partials,
                  .cut = plan.shrink},
                 plan.rank_chunks, stream);
    expand<Math>({.shape = shape,
                  .groups = args.row_groups,
                  .in = token_matrix(args.y_in, shape.out_dim),
                  .out = args.y,
                  .out_aligned = rows_aligned(args.y, shape.out_dim),
                  .bias = args.bias,
                  .m = matrix_of_b<T>(shape, args.B),
                  .masks = kNoMasks,
                  .scale = float(args.scaling),
                  .cut = plan.expand},
                 z, stream);
  });
}

template <typename T, typename TA>
void grouped_lora_backward(const GroupedLoraBackwardArgs<T, TA>& args, Stream stream) {
  const GroupedLoraShape& shape = args.shape;
  const Plan plan = plan_for(shape, sizeof(T));
  const int64_t count = dz_partials(plan, shape, sizeof(T)), elements = shape.tokens * shape.rank;
  float* partials = static_cast<float*>(args.workspace);
  // A single partial is dz itself if nothing is added to it.
  float* dz = count == 1 && args.dz_in == nullptr ? partials : partials + count * elements;
  const int rank = int(shape.rank);
  const LatentRows latent_z{args.z, rank, rank}, latent_dz{dz, rank, rank};
  const float scaling = float(args.scaling);
  const float mask_scale = float(dropout_scale(dropout_threshold(args.dropout.p)));
  const RankMasks masks{args.dropout, 1, kAllRanks, mask_scale}, scaled{{0, nullptr}, 1, kAllRanks, scaling};
  const AdapterMatrix<T> a = matrix_of_a<T>(shape, args.A), b = matrix_of_b<T>(shape, args.B);
  with_math<T>(plan, [&](auto math) {
    using Math = decltype(math);
    const TokenMatrix<T> x = token_matrix(args.x, shape.in_dim), dy = token_matrix(args.dy, shape.out_dim);
    OuterJob<T> d_b{.shape = shape,
                    .groups = args.row_groups,
                    .x = dy,
                    .masks = scaled,
                    .summed_masks = 1,
                    .m = b,
                    .out = {args.dB},
                    .partials = partials};
    OuterJob<T> d_a{
        .shape = shape, .groups = args.row_groups, .x = x, .masks = masks, .summed_masks = 1, .m = a, .out = {args.dA}};
    place_sums(d_b, place_sums(d_a, partials + (count + 1) * elements));
    if constexpr (Math::kRank == 16 && (Math::kTensorCores || std::is_same_v<T, float>)) {
      if (plan.one_pass) sweep<Math>(d_b, latent_z, stream);
    }
    if (!plan.one_pass) {
      shrink<Math>({.shape = shape,
                    .groups = args.row_groups,
                    .x = dy,
                    .m = b,
                    .masks = scaled,
                    .partials = partials,
                    .cut = plan.shrink_dy},
                   plan.rank_chunks, stream);
    }
    if (dz != partials && elements > 0) {
      launch(sum_kernel, ceil_div(elements, kThreads), dim3(kThreads), 0, stream,
             SumOfPartials{partials, count, shape.tokens, shape.rank, dz}, args.dz_in);
    }
    const ExpandJob<T> dx{.shape = shape,
                          .groups = args.row_groups,
                          .in = token_matrix(args.dx_in, shape.in_dim),
                          .out = args.dx,
                          .out_aligned = rows_aligned(args.dx, shape.in_dim),
                          .m = a,
                          .masks = masks,
                          .scale = 1,
                          .cut = plan.expand_dx};
    using Outer = typename BackwardJob<Math, LatentRows>::Outer;
    backward<Math>(
        BackwardJob<Math, LatentRows>{.outer = {Outer(d_a, latent_dz), plan.one_pass ? Outer() : Outer(d_b, latent_z)},
                                      .dx = dx,
                                      .dz = latent_dz,
                                      .row_tiles = args.dx ? int(row_tiles(shape.tokens, shape.groups)) : 0},
        stream);
    sum_chunks({d_a, d_b}, stream);
  });
}

void group_rows(const int64_t* group, int64_t tokens, int64_t groups, int64_t* rows, int64_t* offsets, Stream stream) {
  if (groups == 0) return;
  launch(sort_kernel, groups, dim3(kThreads), 0, stream, group, tokens, groups, rows, offsets);
}

#define ALIGN_INSTANTIATE(T, TA)                                                           \
  template void grouped_lora_forward<T, TA>(const GroupedLoraForwardArgs<T, TA>&, Stream); \
  template void grouped_lora_backward<T, TA>(const GroupedLoraBackwardArgs<T, TA>&, Stream);
ALIGN_FOR_CUDA_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cuda
