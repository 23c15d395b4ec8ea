// Grouped LoRA has one head: the latent rows of expand are z or dz as shrink has computed them.
//
//   forward   base, shrink (z), expand (y)
//   backward  base, sweep (dB, partials of dz) or shrink (partials of dz), sum of the partials, backward (dA, dx, dB),
//             sum_chunks (dA and dB of groups of many rows)
//
// A row tile belongs to one group, and uses its A and B.
#include "cuda/grouped_lora.cuh"

namespace align::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) sum_dz_kernel(SumDzJob job) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = e / job.width;
  if (row >= job.layers[0].tokens) return;
  const int column = int(e % job.width), layer = column / job.stride, j = column % job.stride;
  const SumOfPartials& partials = job.layers[layer];
  const float* dz_in = job.dz_in[layer];
  const float total = partials(row, j);
  job.dz[e] = dz_in && j < partials.rank ? total + dz_in[row * partials.rank + j] : total;
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

void sum_dz(const SumDzJob& job, Stream stream) {
  const int64_t elements = job.layers[0].tokens * job.width;
  if (elements > 0) launch(sum_dz_kernel, ceil_div(elements, kThreads), dim3(kThreads), 0, stream, job);
}

template <typename T, typename TA>
void grouped_lora_forward(const GroupedLoraForwardArgs<T, TA>& args, Stream stream) {
  const GroupedLoraShape& shape = args.shape;
  const Plan plan = plan_for(shape, sizeof(T));
  const bool is_split = plan.shrink.splits > 1;
  float* partials = is_split ? static_cast<float*>(args.workspace) : args.z;
  const float mask_scale = float(dropout_scale(dropout_threshold(args.dropout.p)));
  with_math<T>(plan, [&](auto math) {
    shrink<decltype(math)>({.shape = shape,
                            .groups = args.row_groups,
                            .x = token_matrix(args.x, shape.in_dim),
                            .m = stack<T>(shape.in_dim, adapter_a<T>(shape, args.A)),
                            .masks = {args.dropout, 1, kAllRanks, mask_scale},
                            .partials = partials,
                            .cut = plan.shrink},
                           plan.rank_chunks, stream);
  });
  expand_y(args, plan,
           {partials, plan.shrink.splits, shape.tokens, shape.rank, shape.rank, is_split ? args.z : nullptr}, stream);
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
  const float mask_scale = float(dropout_scale(dropout_threshold(args.dropout.p)));
  const RankMasks masks{args.dropout, 1, kAllRanks, mask_scale};
  const AdapterMatrix<T> a = stack<T>(shape.in_dim, adapter_a<T>(shape, args.A));
  OuterJob<T> d_a{.shape = shape,
                  .groups = args.row_groups,
                  .x = token_matrix(args.x, shape.in_dim),
                  .masks = masks,
                  .m = a,
                  .out = {args.dA}};
  OuterJob<T> d_b = d_b_of<T>(args, partials);
  place_sums(d_b, place_sums(d_a, partials + (count + 1) * elements));
  pass_over_dy(d_b, latent_z, plan, stream);
  if (dz != partials && elements > 0) {
    sum_dz({{{partials, count, shape.tokens, rank, rank, nullptr}}, {args.dz_in}, dz, rank, rank}, stream);
  }
  with_math<T>(plan, [&](auto math) {
    using Job = BackwardJob<decltype(math), LatentRows>;
    using Outer = typename Job::Outer;
    const ExpandJob<T> dx{.shape = shape,
                          .groups = args.row_groups,
                          .in = token_matrix(args.dx_in, shape.in_dim),
                          .out = args.dx,
                          .out_aligned = rows_aligned(args.dx, shape.in_dim),
                          .m = a,
                          .masks = masks,
                          .scale = 1,
                          .cut = plan.expand_dx};
    backward(Job{.outer = {Outer(d_a, latent_dz), plan.one_pass ? Outer() : Outer(d_b, latent_z)},
                 .dx = dx,
                 .dz = latent_dz,
                 .row_tiles = args.dx ? int(row_tiles(shape.tokens, shape.groups)) : 0},
             stream);
  });
  sum_chunks({d_a, d_b}, stream);
}

void group_rows(const int64_t* group, int64_t tokens, int64_t groups, int64_t* rows, int64_t* offsets, Stream stream) {
  if (groups == 0) return;
  launch(sort_kernel, groups, dim3(kThreads), 0, stream, group, tokens, groups, rows, offsets);
}

#define ALIGN_INSTANTIATE(T, TA)                                                           \
  template void grouped_lora_forward<T, TA>(const GroupedLoraForwardArgs<T, TA>&, Stream); \
  template void grouped_lora_backward<T, TA>(const GroupedLoraBackwardArgs<T, TA>&, Stream);
ALIGN_FOR_CUDA_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)
#undef ALIGN_INSTANTIATE

#define ALIGN_INSTANTIATE(...) \
  template void expand<__VA_ARGS__>(const ExpandJob<__VA_ARGS__::Element>&, const SumOfPartials&, Stream);
ALIGN_FOR_EACH_MATH(ALIGN_INSTANTIATE)
#undef ALIGN_INSTANTIATE
#define ALIGN_INSTANTIATE(...) \
  template void sweep<__VA_ARGS__>(const OuterJob<__VA_ARGS__::Element>&, const LatentRows&, Stream);
ALIGN_FOR_EACH_MATH_OF_THE_SWEEP(ALIGN_INSTANTIATE)

}  // namespace align::cuda
