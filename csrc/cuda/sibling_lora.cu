// Layers that are one LoRA each; those with heads, offsets or routers: sibling_heads.cuh.
//
// The layers' A lie one below the other in one adapter matrix, each from a multiple of kMaskedRanks on, so that one
// pass over x computes all latents, another one all dA, and dx is written once.
//
// clang-format off
//   forward   base, shrink (partials of all z), for each layer: expand (z, y)
//   backward  for each layer: sweep (dB, partials of dz) or shrink (partials of dz), and the sum of the partials;
//             for each layer without a sweep: backward (dB); backward (dA, dx), sum_chunks; base
// clang-format on
#include "ops/sibling_lora.h"

#include "cuda/grouped_lora.cuh"
#include "cuda/sibling_heads.cuh"

namespace align::cuda {
namespace {

// A layer as grouped_lora takes it.
template <typename T, typename TA>
GroupedLoraForwardArgs<T, TA> grouped(const RoutedLoraForwardArgs<T, TA>& layer) {
  const auto& [in, y_in, bias, z, y, workspace] = layer.projection;
  return {.shape = {in.shape.tokens, in.shape.in_dim, in.shape.out_dim, in.shape.rank, 1},
          .row_groups = {},
          .dropout = masks_of_x(in.shape, in.dropout),
          .scaling = in.scaling,
          .x = in.x,
          .A = in.A,
          .B = in.B,
          .y_in = y_in,
          .bias = bias,
          .z = z,
          .y = y,
          .workspace = workspace};
}
template <typename T, typename TA>
GroupedLoraBackwardArgs<T, TA> grouped(const RoutedLoraBackwardArgs<T, TA>& layer) {
  const auto& [in, z, dx_in, dy, dz_in, dx, dA, dB, workspace] = layer.projection;
  return {.shape = {in.shape.tokens, in.shape.in_dim, in.shape.out_dim, in.shape.rank, 1},
          .row_groups = {},
          .dropout = masks_of_x(in.shape, in.dropout),
          .scaling = in.scaling,
          .x = in.x,
          .z = z,
          .A = in.A,
          .B = in.B,
          .dx_in = dx_in,
          .dy = dy,
          .dz_in = dz_in,
          .dx = dx,
          .dA = dA,
          .dB = dB,
          .workspace = workspace};
}

// Whether each layer is one LoRA.
template <typename Args>
bool is_plain(const Args& args) {
  bool plain = true;
  for (int i = 0; i < args.count; ++i) {
    const HeadsShape& s = args.layers[i].projection.inputs.shape;
    plain = plain && s.heads == 1 && s.offset_rank == 0 && s.site != DropoutSite::kLatent && !s.A_per_head &&
            args.layers[i].routing.groups == 0;
  }
  return plain;
}

// How the layers share x.
template <typename Layer>
struct Shared {
  int count;
  Layer layers[kMaxSiblings];
  int stride;             // ranks from one layer's first to the next one's
  GroupedLoraShape of_x;  // the rank is that of all layers together
  Plan plan;              // of all ranks

  template <typename Args>
  Shared(const Args& args, int64_t element_bytes) : count(args.count) {
    int64_t most = 1;
    for (int i = 0; i < count; ++i) {
      layers[i] = grouped(args.layers[i]);
      most = std::max(most, layers[i].shape.rank);
    }
    of_x = layers[0].shape;
    stride = int(ceil_div(most, kMaskedRanks)) * kMaskedRanks;
    of_x.rank = (count - 1) * stride + layers[count - 1].shape.rank;
    plan = plan_for(of_x, element_bytes);
  }

  bool drops() const { return layers[0].dropout.p > 0; }
  RankMasks masks() const {
    return drops() ? RankMasks{layers[0].dropout, count, stride, scale_of(layers[0].dropout)} : kNoMasks;
  }

  // The A of all layers.
  template <typename T>
  AdapterMatrix<T> matrix() const {
    Adapter adapters[kMaxSiblings] = {};
    for (int i = 0; i < count; ++i) adapters[i] = adapter_a<T>(layers[i].shape, layers[i].A);
    return stack<T>(of_x.in_dim, adapters[0], adapters[1], adapters[2], stride, stride);
  }

  Plan plan_of(int layer, int64_t element_bytes) const { return plan_for(layers[layer].shape, element_bytes); }

  // The floats of the partials of each layer's dz.
  int64_t partial_floats(int layer, int64_t element_bytes) const {
    const GroupedLoraShape& of = layers[layer].shape;
    return dz_partials(plan_of(layer, element_bytes), of, element_bytes) * of.tokens * of.rank;
  }
};

template <typename T, typename TA>
int64_t plain_workspace(const SiblingLoraForwardArgs<T, TA>& args) {
  const Shared<GroupedLoraForwardArgs<T, TA>> shared(args, sizeof(T));
  return shared.plan.shrink.splits * shared.of_x.tokens * shared.of_x.rank * int64_t(sizeof(float));
}

template <typename T, typename TA>
int64_t plain_workspace(const SiblingLoraBackwardArgs<T, TA>& args) {
  const Shared<GroupedLoraBackwardArgs<T, TA>> shared(args, sizeof(T));
  const GroupedLoraShape& x = shared.of_x;
  int64_t floats = x.tokens * x.rank;
  for (int i = 0; i < args.count; ++i) {
    const GroupedLoraShape& layer = shared.layers[i].shape;
    const int64_t ranks_of_a = shared.drops() ? std::min<int64_t>(shared.stride, x.rank) : x.rank;
    floats += shared.partial_floats(i, sizeof(T)) + layer.rank * (outer_sums(x.tokens, 1, ranks_of_a) * layer.in_dim +
                                                                  outer_sums(x.tokens, 1, layer.rank) * layer.out_dim);
  }
  return floats * int64_t(sizeof(float));
}

template <typename T, typename TA>
void plain_forward(const SiblingLoraForwardArgs<T, TA>& args, Stream stream) {
  const Shared<GroupedLoraForwardArgs<T, TA>> shared(args, sizeof(T));
  const GroupedLoraShape& x = shared.of_x;
  float* partials = static_cast<float*>(args.workspace);
  with_math<T>(shared.plan, [&](auto math) {
    shrink<decltype(math)>({.shape = x,
                            .x = token_matrix(shared.layers[0].x, x.in_dim),
                            .m = shared.template matrix<T>(),
                            .masks = shared.masks(),
                            .partials = partials,
                            .cut = shared.plan.shrink},
                           shared.plan.rank_chunks, stream);
  });
  for (int i = 0; i < args.count; ++i) {
    const auto& layer = shared.layers[i];
    const SumOfPartials z{
        partials + i * shared.stride, shared.plan.shrink.splits, x.tokens, x.rank, layer.shape.rank, layer.z};
    expand_y(layer, shared.plan_of(i, sizeof(T)), z, stream);
  }
}

template <typename T, typename TA>
void plain_backward(const SiblingLoraBackwardArgs<T, TA>& args, Stream stream) {
  const Shared<GroupedLoraBackwardArgs<T, TA>> shared(args, sizeof(T));
  const auto& first = shared.layers[0];
  const GroupedLoraShape& x = shared.of_x;
  const RankMasks masks = shared.masks();
  const int width = int(x.rank);
  float* dz = static_cast<float*>(args.workspace);
  float* floats = dz + x.tokens * width;
  OuterJob<T> d_a{
      .shape = x, .x = token_matrix(first.x, x.in_dim), .masks = masks, .m = shared.template matrix<T>(), .out = {}};
  for (int i = 0; i < args.count; ++i) d_a.out[i] = shared.layers[i].dA;
  floats = place_sums(d_a, floats);
  OuterJob<T> d_b[kMaxSiblings] = {};
  SumDzJob sums{.layers = {}, .dz_in = {}, .dz = dz, .width = width, .stride = shared.stride};
  for (int i = 0; i < args.count; ++i) {
    const auto& layer = shared.layers[i];
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
  with_math<T>(shared.plan, [&](auto math) {
    using Job = BackwardJob<decltype(math), LatentRows>;
    backward(Job{.outer = {typename Job::Outer(d_a, latent_dz)},
                 .dx = dx,
                 .dz = latent_dz,
                 .row_tiles = first.dx ? int(row_tiles(x.tokens, 1)) : 0},
             stream);
  });
  sum_chunks({d_a, d_b[0], d_b[1], d_b[2]}, stream);
}

}  // namespace

template <typename T, typename TA>
int64_t sibling_lora_workspace(const SiblingLoraForwardArgs<T, TA>& args) {
  return is_plain(args) ? plain_workspace(args) : SiblingHeads<T, TA>(args).forward_bytes();
}

template <typename T, typename TA>
int64_t sibling_lora_workspace(const SiblingLoraBackwardArgs<T, TA>& args) {
  return is_plain(args) ? plain_workspace(args) : SiblingHeads<T, TA>(args).backward_bytes();
}

template <typename T, typename TA>
void sibling_lora_forward(const SiblingLoraForwardArgs<T, TA>& args, Stream stream) {
  is_plain(args) ? plain_forward(args, stream) : sibling_heads_forward(args, stream);
}

template <typename T, typename TA>
void sibling_lora_backward(const SiblingLoraBackwardArgs<T, TA>& args, Stream stream) {
  is_plain(args) ? plain_backward(args, stream) : sibling_heads_backward(args, stream);
}

#define ALIGN_INSTANTIATE(T, TA)                                                           \
  template int64_t sibling_lora_workspace(const SiblingLoraForwardArgs<T, TA>&);           \
  template int64_t sibling_lora_workspace(const SiblingLoraBackwardArgs<T, TA>&);          \
  template void sibling_lora_forward<T, TA>(const SiblingLoraForwardArgs<T, TA>&, Stream); \
  template void sibling_lora_backward<T, TA>(const SiblingLoraBackwardArgs<T, TA>&, Stream);
ALIGN_FOR_CUDA_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cuda
