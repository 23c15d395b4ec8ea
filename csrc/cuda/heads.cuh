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
// sibling_heads.cuh does the same for several layers with one x.
#pragma once

#include "cuda/projection.cuh"
#include "ops/routed_lora.h"

namespace align::cuda {

// Where a layer's columns lie in the rows of the result of shrink, and of dz.
struct HeadsColumns {
  int width;   // columns of a row
  int first;   // the first latent's, after which come the others and the offset path
  int block;   // columns of these, and what lies between them and the next ones
  int router;  // the first logit's
};

struct HeadsParams {
  int64_t tokens;
  int rank, heads, latents;  // a row has 1 latent or one for each head
  int stride;                // columns of a latent in the result of shrink: rank, or more if each head has a mask on x
  int offset_rank;
  int groups;  // groups of outputs of a router; 0: no router
  HeadsColumns columns;
  int top_k;
  float logit_scale;  // 1 / tau
  float scaling, offset_scaling;
  DropoutArgs masks;              // masks on the latents of the heads; p = 0: none
  int first_number, row_numbers;  // of these masks, as in DropoutArgs

  __host__ __device__ int z_width() const { return latents * rank; }
  // The first column of the offset path in the block.
  __host__ __device__ int offset_start() const { return latents * stride; }
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
  float* dz;           // [tokens, width]; of it the layer's columns are assigned, zero after the offset path
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

// The columns of a latent: if each head has a mask on x, they begin at multiples of kMaskedRanks.
inline int latent_stride(const HeadsShape& s) {
  return int(s.site == DropoutSite::kInputPerHead ? ceil_div(s.rank, kMaskedRanks) * kMaskedRanks : s.rank);
}

// The masks on x itself; p = 0: none.
inline DropoutArgs masks_of_x(const HeadsShape& s, const DropoutArgs& given) {
  return s.site == DropoutSite::kInputPerHead || s.site == DropoutSite::kInput ? given : DropoutArgs{0, nullptr};
}

inline float scale_of(const DropoutArgs& dropout) { return float(dropout_scale(dropout_threshold(dropout.p))); }

// What a layer does with its latents, once shrink has computed them.
template <typename T, typename TA>
struct HeadsLayer {
  HeadsParams params;
  AdapterMatrix<T> b;  // B and B0
  GroupedLoraShape shape;
  Plan plan;

  HeadsLayer() = default;
  HeadsLayer(const HeadsInputs<T, TA>& in, const Routing& routing, const HeadsColumns& columns) {
    const HeadsShape& s = in.shape;
    constexpr bool kFloat = std::is_same_v<TA, float>;
    const int ranks = int(s.heads * s.rank), more = int(s.offset_rank), groups = int(routing.groups);
    b = stack<T>(s.out_dim, {in.B, kFloat, ranks, layout_of_b(s.rank, s.out_dim), ranks * s.out_dim},
                 {in.B0, kFloat, more, layout_of_b(more, s.out_dim)});
    shape = {s.tokens, s.in_dim, s.out_dim, b.ranks, 1};
    plan = plan_of(b.ranks, groups);
    params = {.tokens = s.tokens,
              .rank = int(s.rank),
              .heads = int(s.heads),
              .latents = int(s.latents()),
              .stride = latent_stride(s),
              .offset_rank = more,
              .groups = groups,
              .columns = columns,
              .top_k = int(routing.top_k),
              .logit_scale = float(1 / routing.tau),
              .scaling = float(in.scaling),
              .offset_scaling = float(in.offset_scaling),
              .masks = s.site == DropoutSite::kLatent ? in.dropout : DropoutArgs{0, nullptr},
              .first_number = int(in.dropout.first),
              .row_numbers = in.dropout.row_numbers > 0 ? int(in.dropout.row_numbers) : ranks};
  }

  // How so many ranks are computed beside this layer's tokens and columns.
  Plan plan_of(int64_t ranks, int64_t groups) const {
    return align::cuda::plan(shape.tokens, shape.in_dim, shape.out_dim, ranks, 1, sizeof(T), current_device(),
                             std::max<int64_t>(groups, 1));
  }
  int64_t u_floats() const { return params.tokens * params.u_width(); }
  int64_t du_floats() const { return params.tokens * params.du_width(); }
  int64_t dy_partials() const { return params.output_groups() * plan.shrink_dy.splits * du_floats(); }
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
  // The gradient dB, not yet cut into chunks.
  OuterJob<T> d_b(const HeadsBackwardArgs<T, TA>& args) const {
    return {.shape = shape,
            .x = token_matrix(args.dy, shape.out_dim, params.output_groups()),
            .masks = kNoMasks,
            .m = b,
            .out = {args.dB},
            .output_groups = params.output_groups()};
  }
};

// z, w and y from the partials of shrink. u [tokens, du_width] is memory.
template <typename T, typename TA>
void expand_heads(const HeadsLayer<T, TA>& layer, const HeadsForwardArgs<T, TA>& args, float* w, const float* partials,
                  int64_t splits, float* u, Stream stream) {
  const HeadsParams& params = layer.params;
  combine_heads({.params = params, .partials = partials, .splits = splits, .z = args.z, .w = w, .u = u}, stream);
  const TokenMatrix<T> y = token_matrix<T>(args.y, layer.shape.out_dim, params.output_groups());
  with_math<T>(layer.plan, [&](auto math) {
    expand<decltype(math)>({.shape = layer.shape,
                            .in = token_matrix(args.y_in, layer.shape.out_dim, params.output_groups()),
                            .out = args.y,
                            .out_aligned = y.aligned,
                            .bias = args.bias,
                            .m = layer.b,
                            .masks = kNoMasks,
                            .scale = 1,
                            .cut = layer.plan.expand,
                            .output_groups = params.output_groups()},
                           layer.latents(u, params.du_width(), w), stream);
  });
}

// The arguments of a backward pass that only a router has.
struct RouterGradient {
  const float* w;
  const float* dw_in;
  float* dR;
};

// The layer's columns of dz, and u, from dy. partials [dy_partials] is memory.
template <typename T, typename TA>
void latent_gradients(const HeadsLayer<T, TA>& layer, const HeadsBackwardArgs<T, TA>& args,
                      const RouterGradient& gradient, float* partials, float* dz, float* u, Stream stream) {
  const HeadsParams& params = layer.params;
  with_math<T>(layer.plan, [&](auto math) {
    shrink<decltype(math)>({.shape = layer.shape,
                            .x = token_matrix(args.dy, layer.shape.out_dim, params.output_groups()),
                            .m = layer.b,
                            .masks = kNoMasks,
                            .partials = partials,
                            .cut = layer.plan.shrink_dy,
                            .output_groups = params.output_groups()},
                           layer.plan.rank_chunks, stream);
  });
  combine_heads_backward({.params = params,
                          .partials = partials,
                          .splits = layer.plan.shrink_dy.splits,
                          .w = gradient.w,
                          .z = args.z,
                          .dz_in = args.dz_in,
                          .dw_in = gradient.dw_in,
                          .u = u,
                          .dz = dz},
                         stream);
}

// ---- One layer

template <typename T, typename TA>
struct HeadsLaunch {
  AdapterMatrix<T> a;  // A, A0 and R
  HeadsLayer<T, TA> layer;
  GroupedLoraShape a_shape;  // a as a projection of one group
  Plan a_plan, both;
  RankMasks on_x;

  HeadsLaunch(const HeadsInputs<T, TA>& in, const Router<TA>& router) {
    const HeadsShape& s = in.shape;
    constexpr bool kFloat = std::is_same_v<TA, float>;
    const int stride = latent_stride(s), a_ranks = int(s.latents()) * stride, more = int(s.offset_rank);
    const int r_ranks = int(router.routing.groups * s.heads);
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
    const int64_t a_elements = (s.A_per_head ? s.heads : 1) * s.rank * s.in_dim;
    a = stack<T>(s.in_dim, {in.A, kFloat, a_ranks, of_a, a_elements},
                 {in.A0, kFloat, more, layout_of_a(more, s.in_dim)}, R, kMaskedRanks);
    const int logits = a.adapters[2].start;
    layer = HeadsLayer<T, TA>(in, router.routing,
                              {.width = a.ranks, .first = 0, .block = router ? logits : a.ranks, .router = logits});
    a_shape = layer.shape;
    a_shape.rank = a.ranks;
    const auto plan_rank = [&](int64_t rank) { return layer.plan_of(rank, router.routing.groups); };
    a_plan = plan_rank(a.ranks), both = plan_rank(std::max<int64_t>(a.ranks, layer.b.ranks));
    const DropoutArgs dropout = masks_of_x(s, in.dropout);
    on_x = kNoMasks;
    if (s.site == DropoutSite::kInputPerHead) {
      on_x = {dropout, int(s.heads), stride, scale_of(dropout)};
    } else if (dropout.p > 0) {
      on_x = {dropout, 1, router ? logits : kAllRanks, scale_of(dropout)};
    }
  }

  int64_t forward_floats() const { return a_plan.shrink.splits * layer.params.tokens * a.ranks + layer.du_floats(); }
  // The sums of chunks of rows, of dA, dR and dB.
  int64_t chunk_floats() const {
    return floats_of_sums(a_shape, on_x, a, 0) + floats_of_sums(a_shape, on_x, a, 2) +
           floats_of_sums(layer.shape, kNoMasks, layer.b, 0);
  }
  // What backward needs before these sums.
  int64_t latent_floats() const { return layer.dy_partials() + layer.params.tokens * a.ranks + layer.u_floats(); }
  int64_t backward_floats() const { return latent_floats() + chunk_floats(); }
};

template <typename T, typename TA>
void heads_forward(const HeadsForwardArgs<T, TA>& args, const Router<TA>& router, float* w, Stream stream) {
  const HeadsLaunch<T, TA> l(args.inputs, router);
  const HeadsShape& s = args.inputs.shape;
  const int64_t splits = l.a_plan.shrink.splits;
  float* partials = static_cast<float*>(args.workspace);
  with_math<T>(l.a_plan, [&](auto math) {
    shrink<decltype(math)>({.shape = l.a_shape,
                            .x = token_matrix(args.inputs.x, s.in_dim),
                            .m = l.a,
                            .masks = l.on_x,
                            .partials = partials,
                            .cut = l.a_plan.shrink},
                           l.a_plan.rank_chunks, stream);
  });
  expand_heads(l.layer, args, w, partials, splits, partials + splits * s.tokens * l.a.ranks, stream);
}

template <typename T, typename TA>
void heads_backward(const HeadsBackwardArgs<T, TA>& args, const Router<TA>& router, const RouterGradient& gradient,
                    Stream stream) {
  const HeadsLaunch<T, TA> l(args.inputs, router);
  const HeadsShape& s = args.inputs.shape;
  const HeadsParams& params = l.layer.params;
  float* partials = static_cast<float*>(args.workspace);
  float* dz = partials + l.layer.dy_partials();
  float* u = dz + s.tokens * l.a.ranks;
  latent_gradients(l.layer, args, gradient, partials, dz, u, stream);
  const int width = l.a.ranks;
  OuterJob<T> d_a{.shape = l.a_shape,
                  .x = token_matrix(args.inputs.x, s.in_dim),
                  .masks = l.on_x,
                  .adds_masks = !s.A_per_head,
                  .m = l.a,
                  .out = {args.dA, nullptr, gradient.dR}};
  OuterJob<T> d_b = l.layer.d_b(args);
  place_sums(d_b, place_sums(d_a, partials + l.latent_floats()));
  const ExpandJob<T> dx{.shape = l.a_shape,
                        .in = token_matrix(args.dx_in, s.in_dim),
                        .out = args.dx,
                        .out_aligned = rows_aligned(args.dx, s.in_dim),
                        .m = l.a,
                        .masks = l.on_x,
                        .scale = 1,
                        .cut = l.both.expand_dx};
  const LatentRows dz_rows{dz, width, width}, u_rows = l.layer.latents(u, params.u_width(), gradient.w);
  with_math<T>(l.both, [&](auto math) {
    using Job = BackwardJob<decltype(math), LatentRows>;
    using Outer = typename Job::Outer;
    backward(Job{.outer = {Outer(d_a, dz_rows), Outer(d_b, u_rows)},
                 .dx = dx,
                 .dz = dz_rows,
                 .row_tiles = args.dx ? int(row_tiles(s.tokens, 1)) : 0},
             stream);
  });
  sum_chunks({d_a, d_b}, stream);
}

}  // namespace align::cuda
