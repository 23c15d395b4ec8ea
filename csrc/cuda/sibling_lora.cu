// The layers' A lie one below the other in one adapter matrix, each from a multiple of kMaskedRanks on, so that one
// pass over x computes all latents, another one all dA, and dx is written once.
//
// clang-format off
//   forward   base, shrink (partials of all z), for each layer: expand (z, y)
//   backward  for each layer: sweep (dB, partials of dz) or shrink (partials of dz), and the sum of the partials;
//             for each layer without a sweep: backward (dB); backward (dA, dx; in two launches where each mask has
//             fewer ranks), sum_chunks; base
// clang-format on
#include "ops/sibling_lora.h"

#include "cuda/grouped_lora.cuh"

namespace align::cuda {
namespace {

// How the layers share x.
struct Shared {
  SiblingLoraShape shape;
  int stride;               // ranks from one layer's first to the next one's
  GroupedLoraShape of_x;    // the rank is that of all layers together
  Plan plan, plan_of_mask;  // of all ranks, and of those that see one mask

  Shared(const SiblingLoraShape& given, bool dropout, int64_t element_bytes) : shape(given), of_x(given.layers[0]) {
    int64_t most = 1;
    for (int i = 0; i < shape.count; ++i) most = std::max(most, shape.layers[i].rank);
    stride = int(ceil_div(most, kMaskedRanks)) * kMaskedRanks;
    of_x.rank = (shape.count - 1) * stride + shape.layers[shape.count - 1].rank;
    plan = plan_for(of_x, element_bytes);
    GroupedLoraShape of_mask = of_x;
    if (dropout) of_mask.rank = std::min<int64_t>(stride, of_x.rank);
    plan_of_mask = plan_for(of_mask, element_bytes);
  }

  RankMasks masks(const DropoutArgs& dropout) const {
    if (dropout.p == 0) return kNoMasks;
    const float scale = float(dropout_scale(dropout_threshold(dropout.p)));
    return {dropout, shape.count, stride, scale};
  }

  // The A of all layers, of args.layers.
  template <typename T, typename Args>
  AdapterMatrix<T> matrix(const Args& args) const {
    Adapter adapters[kMaxSiblings] = {};
    for (int i = 0; i < shape.count; ++i) adapters[i] = adapter_a<T>(shape.layers[i], args.layers[i].A);
    return stack<T>(of_x.in_dim, adapters[0], adapters[1], adapters[2], stride, stride);
  }

  Plan plan_of(int layer, int64_t element_bytes) const { return plan_for(shape.layers[layer], element_bytes); }

  // The floats of the partials of each layer's dz.
  int64_t partial_floats(int layer, int64_t element_bytes) const {
    const GroupedLoraShape& of = shape.layers[layer];
    return dz_partials(plan_of(layer, element_bytes), of, element_bytes) * of.tokens * of.rank;
  }
};

template <typename Args>
SiblingLoraShape shape_of(const Args& args) {
  SiblingLoraShape shape = {args.count, {}};
  for (int i = 0; i < args.count; ++i) shape.layers[i] = args.layers[i].shape;
  return shape;
}

}  // namespace

int64_t sibling_lora_forward_workspace(const SiblingLoraShape& shape, bool dropout, int64_t element_bytes) {
  const Shared shared(shape, dropout, element_bytes);
  return shared.plan.shrink.splits * shared.of_x.tokens * shared.of_x.rank * int64_t(sizeof(float));
}

int64_t sibling_lora_backward_workspace(const SiblingLoraShape& shape, bool dropout, int64_t element_bytes) {
  const Shared shared(shape, dropout, element_bytes);
  const GroupedLoraShape& x = shared.of_x;
  int64_t floats = x.tokens * x.rank;
  for (int i = 0; i < shape.count; ++i) {
    const GroupedLoraShape& layer = shape.layers[i];
    const int64_t ranks_of_a = dropout ? std::min<int64_t>(shared.stride, x.rank) : x.rank;
    floats +=
        shared.partial_floats(i, element_bytes) + layer.rank * (outer_sums(x.tokens, 1, ranks_of_a) * layer.in_dim +
                                                                outer_sums(x.tokens, 1, layer.rank) * layer.out_dim);
  }
  return floats * int64_t(sizeof(float));
}

template <typename T, typename TA>
void sibling_lora_forward(const SiblingLoraForwardArgs<T, TA>& args, Stream stream) {
  const auto& first = args.layers[0];
  const Shared shared(shape_of(args), first.dropout.p > 0, sizeof(T));
  const GroupedLoraShape& x = shared.of_x;
  float* partials = static_cast<float*>(args.workspace);
  with_math<T>(shared.plan, [&](auto math) {
    shrink<decltype(math)>({.shape = x,
                            .x = token_matrix(first.x, x.in_dim),
                            .m = shared.matrix<T>(args),
                            .masks = shared.masks(first.dropout),
                            .partials = partials,
                            .cut = shared.plan.shrink},
                           shared.plan.rank_chunks, stream);
  });
  for (int i = 0; i < args.count; ++i) {
    const auto& layer = args.layers[i];
    const SumOfPartials z{
        partials + i * shared.stride, shared.plan.shrink.splits, x.tokens, x.rank, layer.shape.rank, layer.z};
    expand_y(layer, shared.plan_of(i, sizeof(T)), z, stream);
  }
}

template <typename T, typename TA>
void sibling_lora_backward(const SiblingLoraBackwardArgs<T, TA>& args, Stream stream) {
  const auto& first = args.layers[0];
  const Shared shared(shape_of(args), first.dropout.p > 0, sizeof(T));
  const GroupedLoraShape& x = shared.of_x;
  const RankMasks masks = shared.masks(first.dropout);
  const int width = int(x.rank);
  float* dz = static_cast<float*>(args.workspace);
  float* floats = dz + x.tokens * width;
  OuterJob<T> d_a{.shape = x,
                  .x = token_matrix(first.x, x.in_dim),
                  .masks = masks,
                  .summed_masks = 1,
                  .m = shared.matrix<T>(args),
                  .out = {}};
  for (int i = 0; i < args.count; ++i) d_a.out[i] = args.layers[i].dA;
  floats = place_sums(d_a, floats);
  OuterJob<T> d_b[kMaxSiblings] = {};
  SumDzJob sums{.layers = {}, .dz_in = {}, .dz = dz, .width = width, .stride = shared.stride};
  for (int i = 0; i < args.count; ++i) {
    const auto& layer = args.layers[i];
    const Plan plan = shared.plan_of(i, sizeof(T));
    const int rank = int(layer.shape.rank);
    d_b[i] = d_b_of<T>(layer, floats);
    sums.layers[i] = {floats, dz_partials(plan, layer.shape, sizeof(T)), x.tokens, rank, rank, nullptr};
    sums.dz_in[i] = layer.dz_in;
    floats = place_sums(d_b[i], floats + shared.partial_floats(i, sizeof(T)));
    const LatentRows z{layer.z, rank, rank};
    pass_over_dy(d_b[i], z, plan, stream);
    if (plan.one_pass) continue;
    with_math<T>(plan, [&](auto math) {
      using Job = BackwardJob<decltype(math), LatentRows>;
      backward(Job{.outer = {typename Job::Outer(d_b[i], z)}, .dx = {}, .dz = {}, .row_tiles = 0}, stream);
    });
  }
  sum_dz(sums, stream);
  const LatentRows latent_dz{dz, width, width};
  const ExpandJob<T> dx{.shape = x,
                        .in = token_matrix(first.dx_in, x.in_dim),
                        .out = first.dx,
                        .out_aligned = rows_aligned(first.dx, x.in_dim),
                        .m = d_a.m,
                        .masks = masks,
                        .scale = 1,
                        .cut = shared.plan.expand_dx};
  const auto launch_backward = [&](const Plan& plan, bool of_d_a, bool of_dx) {
    with_math<T>(plan, [&](auto math) {
      using Job = BackwardJob<decltype(math), LatentRows>;
      using Outer = typename Job::Outer;
      backward(Job{.outer = {of_d_a ? Outer(d_a, latent_dz) : Outer()},
                   .dx = dx,
                   .dz = latent_dz,
                   .row_tiles = of_dx && first.dx ? int(row_tiles(x.tokens, 1)) : 0},
               stream);
    });
  };
  const bool separate = shared.plan_of_mask.padded_rank < shared.plan.padded_rank;
  if (separate) launch_backward(shared.plan_of_mask, true, false);
  launch_backward(shared.plan, !separate, true);
  sum_chunks({d_a, d_b[0], d_b[1], d_b[2]}, stream);
}

#define ALIGN_INSTANTIATE(T, TA)                                                           \
  template void sibling_lora_forward<T, TA>(const SiblingLoraForwardArgs<T, TA>&, Stream); \
  template void sibling_lora_backward<T, TA>(const SiblingLoraBackwardArgs<T, TA>&, Stream);
ALIGN_FOR_CUDA_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cuda
