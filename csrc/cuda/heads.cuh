// The projections with several heads: dropout_sum and routed_lora, which differ by a router. A latent row of expand
// holds the latents of the heads, u_i = scaling * mask_i z, side by side, and then the latents of the offset path. The
// weights of a router multiply it when it is read, because each group of outputs has weights of its own.
//
// clang-format off
//   forward   base, shrink ([A; A0] xd and R x), combine_heads (z, w, u), expand ([B | B0])
//   backward  base, shrink ([B | B0]^T dy), combine_heads_backward (dz, the gradient of the logits, u), backward,
//             sum_chunks (with many rows)
// clang-format on
//
// All heads together take one pass over x and one over y, and their latents are padded together to a rank of 16, 32 or
// 64. With dropout on x, dR of a router takes one more pass over x, because the router sees x without dropout.
#pragma once

#include "cuda/projection.cuh"
#include "ops/routed_lora.h"

namespace align::cuda {

struct HeadsParams {
  int64_t tokens;
  int rank, heads, latents;  // a row has 1 latent or one for each head
  int stride;                // columns of a latent in the result of shrink: rank, or more if each head has a mask on x
  int offset_rank;
  int groups;  // groups of outputs of a router; 0: no router
  int router;  // first column of the logits
  int top_k;
  float logit_scale;  // 1 / tau
  float scaling, offset_scaling;
  DropoutArgs masks;  // masks on the latents of the heads; p = 0: none

  __host__ __device__ int z_width() const { return latents * rank; }
  // The result of shrink has the latents, the offset path and the logits.
  __host__ __device__ int offset_start() const { return latents * stride; }
  __host__ __device__ int width() const { return groups > 0 ? router + logits() : offset_start() + offset_rank; }
  // Columns of the latents of all heads, and of these with the offset path.
  __host__ __device__ int u_width() const { return heads * rank; }
  __host__ __device__ int du_width() const { return u_width() + offset_rank; }
  // The logits of all groups.
  __host__ __device__ int logits() const { return groups * heads; }
  __host__ __device__ int output_groups() const { return groups > 0 ? groups : 1; }
};

struct CombineHeadsJob {
  HeadsParams params;
  const float* partials;  // [splits, tokens, width] of [A; A0; R] x
  int64_t splits;
  float* z;  // [tokens, z_width], assigned
  float* w;  // [tokens, groups, heads], assigned
  float* u;  // [tokens, du_width], assigned
};

struct CombineHeadsBackwardJob {
  HeadsParams params;
  float*
      partials;  // [output_groups, splits, tokens, du_width] of [B | B0]^T dy; the first of each group is overwritten
  int64_t splits;
  const float* w;      // [tokens, groups, heads]
  const float* z;      // [tokens, z_width]
  const float* dz_in;  // [tokens, z_width], or null: zero
  const float* dw_in;  // [tokens, groups, heads], or null: zero
  float* u;            // [tokens, u_width], assigned
  float* dz;           // [tokens, width], assigned; zero between the offset path and the logits
};

// Defined in projection.cu.
void combine_heads(const CombineHeadsJob& job, Stream stream);
void combine_heads_backward(const CombineHeadsBackwardJob& job, Stream stream);

// ---- Launchers

// groups = 0 means that there is no router. (R may be null with a router: an empty matrix has no memory.)
template <typename TA>
struct Router {
  const TA* R;  // [groups * heads, in_dim]
  Routing routing;

  explicit operator bool() const { return routing.groups > 0; }
};

template <typename T, typename TA>
struct HeadsLaunch {
  using Inputs = HeadsInputs<T, TA>;
  HeadsParams params;
  AdapterMatrix<T> a, b, r;            // a: A, A0 and R; b: B and B0; r: R alone
  GroupedLoraShape a_shape, b_shape;   // a and b as projections of one group
  Plan a_plan, b_plan, both, of_mask;  // of_mask: the ranks of A that see one mask of x
  RankMasks on_x;

  HeadsLaunch(const Inputs& in, const Router<TA>& router) {
    const HeadsShape& s = in.shape;
    constexpr bool kFloat = std::is_same_v<TA, float>;
    const bool per_head = s.site == DropoutSite::kInputPerHead;
    const int stride = int(per_head ? ceil_div(s.rank, kMaskedRanks) * kMaskedRanks : s.rank);
    const int a_ranks = int(s.latents()) * stride, b_ranks = int(s.heads * s.rank);
    const int more = int(s.offset_rank), groups = int(router.routing.groups);
    const int r_ranks = groups * int(s.heads);
    const Adapter R{.data = router.R,
                    .is_float = kFloat,
                    .ranks = r_ranks,
                    .layout = layout_of_a(r_ranks, s.in_dim),
                    .group_stride = r_ranks * s.in_dim};
    const Layout of_a{.inner = std::max(stride, 1),
                      .stored = int(s.rank),
                      .rank_stride = s.in_dim,
                      .head_stride = s.A_per_head ? s.rank * s.in_dim : 0,
                      .col_stride = 1};
    const int64_t a_elements = (s.A_per_head ? s.heads : 1) * s.rank * s.in_dim, b_elements = b_ranks * s.out_dim;
    a = stack<T>(s.in_dim, {in.A, kFloat, a_ranks, of_a, a_elements},
                 {in.A0, kFloat, more, layout_of_a(more, s.in_dim)}, R, kMaskedRanks);
    b = stack<T>(s.out_dim, {in.B, kFloat, b_ranks, layout_of_b(s.rank, s.out_dim), b_elements},
                 {in.B0, kFloat, more, layout_of_b(more, s.out_dim)});
    r = stack<T>(s.in_dim, R);
    a_shape = b_shape = {s.tokens, s.in_dim, s.out_dim, 0, 1};
    a_shape.rank = a.ranks, b_shape.rank = b.ranks;
    const auto plan_rank = [&](int64_t rank) {
      return plan(s.tokens, s.in_dim, s.out_dim, rank, 1, sizeof(T), current_device(), std::max(groups, 1));
    };
    a_plan = plan_rank(a.ranks), b_plan = plan_rank(b.ranks), both = plan_rank(std::max(a.ranks, b.ranks));
    const DropoutArgs none = {0, nullptr};
    const DropoutArgs dropout = per_head || s.site == DropoutSite::kInput ? in.dropout : none;
    const float mask_scale = float(dropout_scale(dropout_threshold(dropout.p)));
    on_x = kNoMasks;
    if (per_head) {
      on_x = {dropout, int(s.heads), stride, mask_scale};
    } else if (dropout.p > 0) {
      on_x = {dropout, 1, router ? a.adapters[2].start : kAllRanks, mask_scale};
    }
    of_mask = plan_rank(std::min(on_x.ranks_each, a.ranks));
    params = {.tokens = s.tokens,
              .rank = int(s.rank),
              .heads = int(s.heads),
              .latents = int(s.latents()),
              .stride = stride,
              .offset_rank = more,
              .groups = groups,
              .router = a.adapters[2].start,
              .top_k = int(router.routing.top_k),
              .logit_scale = float(1 / router.routing.tau),
              .scaling = float(in.scaling),
              .offset_scaling = float(in.offset_scaling),
              .masks = s.site == DropoutSite::kLatent ? in.dropout : none};
  }

  // Whether dA and dR take a launch of their own: each mask of x has fewer ranks than the launch with dx would compute.
  bool separate_masks() const { return of_mask.padded_rank < both.padded_rank && on_x.count > 1; }
  int64_t forward_floats() const { return params.tokens * (a_plan.shrink.splits * params.width() + params.du_width()); }
  // Whether dR takes a pass of its own over x: it sees x without the masks that dA sees.
  bool separate_router() const { return params.groups > 0 && on_x.ranks_each < kAllRanks; }
  // The sums of chunks of rows, of dA, dR and dB.
  int64_t chunk_floats() const {
    const int64_t of_r =
        separate_router() ? floats_of_sums(a_shape, kNoMasks, r, 0) : floats_of_sums(a_shape, on_x, a, 2);
    return floats_of_sums(a_shape, on_x, a, 0) + of_r + floats_of_sums(b_shape, kNoMasks, b, 0);
  }
  int64_t dy_partials() const { return params.output_groups() * b_plan.shrink_dy.splits; }
  // What backward needs before these sums.
  int64_t latent_floats() const {
    return params.tokens * (dy_partials() * params.du_width() + params.width() + params.u_width());
  }
  int64_t backward_floats() const { return latent_floats() + chunk_floats(); }
  // The latents of the heads and, in the forward pass, of the offset path.
  LatentRows latents(const float* u, int width, const float* w) const {
    return {.latent = u,
            .width = width,
            .ranks = width,
            .weighted = w ? params.u_width() : 0,
            .w = w,
            .output_groups = params.groups,
            .heads = params.heads,
            .rank = params.rank};
  }
};

template <typename T, typename TA>
void heads_forward(const HeadsForwardArgs<T, TA>& args, const Router<TA>& router, float* w, Stream stream) {
  const HeadsLaunch<T, TA> l(args.inputs, router);
  const HeadsShape& s = args.inputs.shape;
  const int64_t splits = l.a_plan.shrink.splits;
  float* partials = static_cast<float*>(args.workspace);
  float* u = partials + splits * s.tokens * l.params.width();
  with_math<T>(l.a_plan, [&](auto math) {
    shrink<decltype(math)>({.shape = l.a_shape,
                            .x = token_matrix(args.inputs.x, s.in_dim),
                            .m = l.a,
                            .masks = l.on_x,
                            .partials = partials,
                            .cut = l.a_plan.shrink},
                           l.a_plan.rank_chunks, stream);
  });
  combine_heads({.params = l.params, .partials = partials, .splits = splits, .z = args.z, .w = w, .u = u}, stream);
  with_math<T>(l.b_plan, [&](auto math) {
    expand<decltype(math)>({.shape = l.b_shape,
                            .in = token_matrix(args.y_in, s.out_dim, l.params.output_groups()),
                            .out = args.y,
                            .out_aligned = token_matrix<T>(args.y, s.out_dim, l.params.output_groups()).aligned,
                            .bias = args.bias,
                            .m = l.b,
                            .masks = kNoMasks,
                            .scale = 1,
                            .cut = l.b_plan.expand,
                            .output_groups = l.params.output_groups()},
                           l.latents(u, l.params.du_width(), w), stream);
  });
}

// The arguments of a backward pass that only a router has.
struct RouterGradient {
  const float* w;
  const float* dw_in;
  float* dR;
};

template <typename T, typename TA>
void heads_backward(const HeadsBackwardArgs<T, TA>& args, const Router<TA>& router, const RouterGradient& gradient,
                    Stream stream) {
  const HeadsLaunch<T, TA> l(args.inputs, router);
  const HeadsShape& s = args.inputs.shape;
  float* partials = static_cast<float*>(args.workspace);
  float* dz = partials + l.dy_partials() * s.tokens * l.params.du_width();
  float* u = dz + s.tokens * l.params.width();
  const TokenMatrix<T> x = token_matrix(args.inputs.x, s.in_dim),
                       dy = token_matrix(args.dy, s.out_dim, l.params.output_groups());
  with_math<T>(l.b_plan, [&](auto math) {
    shrink<decltype(math)>({.shape = l.b_shape,
                            .x = dy,
                            .m = l.b,
                            .masks = kNoMasks,
                            .partials = partials,
                            .cut = l.b_plan.shrink_dy,
                            .output_groups = l.params.output_groups()},
                           l.b_plan.rank_chunks, stream);
  });
  combine_heads_backward({.params = l.params,
                          .partials = partials,
                          .splits = l.b_plan.shrink_dy.splits,
                          .w = gradient.w,
                          .z = args.z,
                          .dz_in = args.dz_in,
                          .dw_in = gradient.dw_in,
                          .u = u,
                          .dz = dz},
                         stream);
  const int width = l.params.width();
  const bool separate_router = l.separate_router(), separate_masks = l.separate_masks();
  OuterJob<T> d_a{.shape = l.a_shape,
                  .x = x,
                  .masks = l.on_x,
                  .summed_masks = s.A_per_head ? 1 : l.on_x.count,
                  .m = l.a,
                  .out = {args.dA, nullptr, separate_router ? nullptr : gradient.dR}};
  OuterJob<T> d_r = d_a;
  d_r.masks = kNoMasks, d_r.summed_masks = 1, d_r.m = l.r, d_r.out[0] = separate_router ? gradient.dR : nullptr,
  d_r.out[2] = nullptr;
  OuterJob<T> d_b{.shape = l.b_shape,
                  .x = dy,
                  .masks = kNoMasks,
                  .summed_masks = 1,
                  .m = l.b,
                  .out = {args.dB},
                  .output_groups = l.params.output_groups()};
  place_sums(d_b, place_sums(d_r, place_sums(d_a, partials + l.latent_floats())));
  const ExpandJob<T> dx{.shape = l.a_shape,
                        .in = token_matrix(args.dx_in, s.in_dim),
                        .out = args.dx,
                        .out_aligned = rows_aligned(args.dx, s.in_dim),
                        .m = l.a,
                        .masks = l.on_x,
                        .scale = 1,
                        .cut = l.both.expand_dx};
  const LatentRows dz_rows{dz, width, width}, logit_rows{dz + l.params.router, width, l.params.logits()};
  const LatentRows u_rows = l.latents(u, l.params.u_width(), gradient.w);
  const auto launch_backward = [&](const Plan& plan, bool of_x, bool of_dy_and_dx) {
    with_math<T>(plan, [&](auto math) {
      using Job = BackwardJob<decltype(math), LatentRows>;
      using Outer = typename Job::Outer;
      backward(Job{.outer = {of_x ? Outer(d_a, dz_rows) : Outer(),
                             of_x && separate_router ? Outer(d_r, logit_rows) : Outer(),
                             of_dy_and_dx ? Outer(d_b, u_rows) : Outer()},
                   .dx = dx,
                   .dz = dz_rows,
                   .row_tiles = of_dy_and_dx && args.dx ? int(row_tiles(s.tokens, 1)) : 0},
               stream);
    });
  };
  if (separate_masks) launch_backward(l.of_mask, true, false);
  launch_backward(l.both, !separate_masks, true);
  sum_chunks({d_a, d_r, d_b}, stream);
}

}  // namespace align::cuda
