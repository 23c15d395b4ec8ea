// The projections with several heads, dropout_sum and routed_lora, which differ by a router. The latent rows of expand
// are those of the heads, u_i = scaling * mask_i z, side by side, and those of the offset path after them; a router's
// weights multiply them where they are used, since each of its groups of outputs (a band of columns) has its own.
//
//   forward   base, shrink ([A; A0] xd and R x), mix (z, w, u), expand ([B | B0])
//   backward  base, mix (u) with a router, shrink ([B | B0]^T dy), unmix (dz, the logits' gradient, u), backward
//
// All heads cost one pass over x and one over y; their latents are padded to a rank of 16, 32 or 64 together. With
// dropout on x a router's dR takes a pass over x of its own, for it stands on x as it is.
#pragma once

#include "cuda/projection.cuh"
#include "ops/routed_lora.h"

namespace align::cuda {

struct Heads {
  int64_t tokens;
  int rank, heads, latents;  // latents of a row: 1 or heads
  int stride;                // columns of shrink's result for a latent: rank, or more where x has a mask for each
  int offset_rank;
  int groups;  // of a router's outputs; 0: no router
  int router;  // first column of the logits
  int group;   // outputs of a group, or all
  int top_k;
  float logit_scale;  // 1 / tau
  float scaling, offset_scaling;
  DropoutArgs masks;  // of the heads' latents; p = 0: none

  __host__ __device__ int z_width() const { return latents * rank; }
  // Columns of shrink's result: latents, the offset path, the logits.
  __host__ __device__ int offset_start() const { return latents * stride; }
  __host__ __device__ int width() const { return groups > 0 ? router + logits() : offset_start() + offset_rank; }
  // Columns of the heads' latents, and of all latents.
  __host__ __device__ int u_width() const { return heads * rank; }
  __host__ __device__ int du_width() const { return u_width() + offset_rank; }
  // Of all groups together.
  __host__ __device__ int logits() const { return groups * heads; }
};

struct MixJob {
  Heads heads;
  const float*
      parts;  // [slabs, tokens, width] of [A; A0; R] x; or null: z is given, only the heads' latents are wanted
  int64_t slabs;
  float* z;  // [tokens, z_width], assigned
  float* w;  // [tokens, groups, heads], assigned
  float* u;  // [tokens, du_width, or u_width with parts null], assigned
};

struct UnmixJob {
  Heads heads;
  const float* parts;  // [slabs, tokens, du_width] of [B | B0]^T dy, weighted by the router
  Cut cut;             // dy's
  Weighing weighing;   // of a router
  int64_t rank_chunks;
  const float* z;      // [tokens, z_width]
  const float* dz_in;  // [tokens, z_width], or null: zero
  const float* dw_in;  // [tokens, groups, heads], or null: zero
  float* u;            // [tokens, u_width], assigned unless there is a router
  float* dz;           // [tokens, width], assigned; zero between offset path and logits
};

// projection.cu
void mix(const MixJob& job, Stream stream);
void unmix(const UnmixJob& job, int64_t tile_cols, Stream stream);

// ---- Launchers

// No router: groups 0. (R may be null where there is one, for an empty matrix has no memory.)
template <typename W>
struct Router {
  const W* R;  // [groups * heads, in_dim]
  Routing routing;

  explicit operator bool() const { return routing.groups > 0; }
};

constexpr int kMaskedRanks = 8;  // ranks that see one mask of x begin at multiples of it

template <typename T, typename W>
struct HeadsLaunch {
  using Inputs = HeadsInputs<T, W>;
  Heads heads;
  SmallMatrix<T> a, b, r;             // A, A0 and R; B and B0; R alone
  GroupedLoraShape a_shape, b_shape;  // of them as projections
  Plan a_plan, b_plan, both;
  RankMasks on_x;

  HeadsLaunch(const Inputs& in, const Router<W>& router) {
    const HeadsShape& s = in.shape;
    constexpr bool kFloat = std::is_same_v<W, float>;
    const bool per_head = s.site == DropoutSite::kInputPerHead;
    const int stride = int(per_head ? ceil_div(s.rank, kMaskedRanks) * kMaskedRanks : s.rank);
    const int a_ranks = int(s.latents()) * stride, b_ranks = int(s.heads * s.rank);
    const int more = int(s.offset_rank), groups = int(router.routing.groups);
    const int r_ranks = groups * int(s.heads);
    const Adapter R{router.R, kFloat, r_ranks, layout_of_a(r_ranks, s.in_dim), 0, 0};
    const Layout of_a{std::max(stride, 1), int(s.rank), s.in_dim, s.own_A ? s.rank * s.in_dim : 0, 1};
    a = stack<T>(s.in_dim, {in.A, kFloat, a_ranks, of_a, 0, 0},
                 {in.A0, kFloat, more, layout_of_a(more, s.in_dim), 0, 0}, R, kMaskedRanks);
    b = stack<T>(s.out_dim, {in.B, kFloat, b_ranks, layout_of_b(s.rank, s.out_dim), 0, 0},
                 {in.B0, kFloat, more, layout_of_b(more, s.out_dim), 0, 0});
    r = stack<T>(s.in_dim, R);
    a_shape = b_shape = {s.tokens, s.in_dim, s.out_dim, 0, 1};
    a_shape.rank = a.ranks, b_shape.rank = b.ranks;
    const auto plan_rank = [&](int64_t rank) {
      return plan(s.tokens, s.in_dim, s.out_dim, rank, 1, sizeof(T), current_device());
    };
    a_plan = plan_rank(a.ranks), b_plan = plan_rank(b.ranks), both = plan_rank(std::max(a.ranks, b.ranks));
    const DropoutArgs none = {0, nullptr};
    const DropoutArgs dropout = per_head || s.site == DropoutSite::kInput ? in.dropout : none;
    const float kept = float(dropout_scale(dropout_threshold(dropout.p)));
    on_x = kNoMasks;
    if (per_head) {
      on_x = {dropout, int(s.heads), stride, kept};
    } else if (dropout.p > 0) {
      on_x = {dropout, 1, router ? a.adapters[2].start : kAllRanks, kept};
    }
    heads = {s.tokens,
             int(s.rank),
             int(s.heads),
             int(s.latents()),
             stride,
             more,
             groups,
             a.adapters[2].start,
             int(groups > 0 ? s.out_dim / groups : s.out_dim),
             int(router.routing.top_k),
             float(1 / router.routing.tau),
             float(in.scaling),
             float(in.offset_scaling),
             s.site == DropoutSite::kLatent ? in.dropout : none};
  }

  int in_band() const { return band_of(a.cols); }
  int out_band() const { return band_of(heads.group); }
  int64_t forward_floats() const { return heads.tokens * (a_plan.shrink.slabs * heads.width() + heads.du_width()); }
  // Of a router, for the shrink of dy.
  int64_t segment_floats() const {
    if (heads.groups == 0) return 0;
    return b_plan.rank_chunks * weighing().segments_of_chunk(b_plan.shrink_dy.slabs) * heads.tokens * heads.heads;
  }
  int64_t backward_floats() const {
    return heads.tokens * (b_plan.shrink_dy.slabs * heads.du_width() + heads.width() + heads.u_width()) +
           segment_floats();
  }
  Weighing weighing(const float* w = nullptr, const float* u = nullptr, float* segments = nullptr) const {
    return {heads.groups, heads.heads, heads.rank, w, u, segments};
  }
  // The heads' latents and, in the forward pass, those of the offset path.
  LatentRows latents(const float* u, int width, const float* w) const {
    return {u, width, width, w ? heads.u_width() : 0, w, heads.groups, heads.heads, heads.rank};
  }
};

template <typename T, typename W>
void heads_forward(const HeadsForwardArgs<T, W>& args, const Router<W>& router, float* w, Stream stream) {
  const HeadsLaunch<T, W> l(args.inputs, router);
  const HeadsShape& s = args.inputs.shape;
  const int64_t slabs = l.a_plan.shrink.slabs;
  float* parts = static_cast<float*>(args.workspace);
  float* u = parts + slabs * s.tokens * l.heads.width();
  with_math<T>(l.a_plan, [&](auto math) {
    const TallMatrix<T> x = tall(args.inputs.x, s.in_dim, args.z);
    shrink<decltype(math)>({l.a_shape, {}, x, l.a, l.on_x, parts, l.a_plan.shrink, l.in_band(), {}},
                           l.a_plan.rank_chunks, stream);
  });
  mix({l.heads, parts, slabs, args.z, w, u}, stream);
  with_math<T>(l.b_plan, [&](auto math) {
    expand<decltype(math)>({l.b_shape,
                            {},
                            tall(args.y_in, s.out_dim, args.y, l.out_band()),
                            args.y,
                            tall<T>(args.y, s.out_dim, nullptr, l.out_band()).aligned,
                            args.bias,
                            l.b,
                            kNoMasks,
                            1,
                            l.b_plan.expand,
                            l.out_band()},
                           l.latents(u, l.heads.du_width(), w), stream);
  });
}

// What a router adds to the backward pass.
struct RouterGradient {
  const float* w;
  const float* dw_in;
  float* dR;
};

template <typename T, typename W>
void heads_backward(const HeadsBackwardArgs<T, W>& args, const Router<W>& router, const RouterGradient& gradient,
                    Stream stream) {
  const HeadsLaunch<T, W> l(args.inputs, router);
  const HeadsShape& s = args.inputs.shape;
  float* parts = static_cast<float*>(args.workspace);
  float* dz = parts + l.b_plan.shrink_dy.slabs * s.tokens * l.heads.du_width();
  float* u = dz + s.tokens * l.heads.width();
  const Weighing weighing = l.weighing(gradient.w, u, u + s.tokens * l.heads.u_width());
  const TallMatrix<T> x = tall(args.inputs.x, s.in_dim, args.z), dy = tall(args.dy, s.out_dim, args.z, l.out_band());
  if (gradient.w) mix({l.heads, nullptr, 0, const_cast<float*>(args.z), nullptr, u}, stream);
  with_math<T>(l.b_plan, [&](auto math) {
    shrink<decltype(math)>({l.b_shape, {}, dy, l.b, kNoMasks, parts, l.b_plan.shrink_dy, l.out_band(), weighing},
                           l.b_plan.rank_chunks, stream);
  });
  unmix({l.heads, parts, l.b_plan.shrink_dy, weighing, l.b_plan.rank_chunks, args.z, args.dz_in, gradient.dw_in, u, dz},
        kTileCols<T>, stream);
  with_math<T>(l.both, [&](auto math) {
    using Math = decltype(math);
    const int width = l.heads.width();
    const bool apart = router && l.on_x.per < kAllRanks;  // dA stands on dropped x, dR on x
    const int summed = s.own_A ? 1 : l.on_x.streams;
    const OuterJob<T> d_a{
        l.a_shape, {}, x, l.on_x, summed, l.a, {args.dA, nullptr, apart ? nullptr : gradient.dR}, nullptr, l.in_band()};
    const OuterJob<T> d_r{l.a_shape, {}, x, kNoMasks, 1, l.r, {gradient.dR}, nullptr, l.in_band()};
    const OuterJob<T> d_b{l.b_shape, {}, dy, kNoMasks, 1, l.b, {args.dB}, nullptr, l.out_band()};
    const ExpandJob<T> dx{l.a_shape,
                          {},
                          tall(args.dx_in, s.in_dim, args.dx),
                          args.dx,
                          rows_aligned(args.dx, s.in_dim),
                          nullptr,
                          l.a,
                          l.on_x,
                          1,
                          l.both.expand_dx,
                          l.in_band()};
    const LatentRows dz_rows{dz, width, width}, logit_rows{dz + l.heads.router, width, l.heads.logits()};
    const LatentRows u_rows = l.latents(u, l.heads.u_width(), gradient.w);
    using Outer = typename BackwardJob<Math, LatentRows>::Outer;
    backward<Math>(BackwardJob<Math, LatentRows>{{Outer(d_a, dz_rows), apart ? Outer(d_r, logit_rows) : Outer(),
                                                  Outer(d_b, u_rows)},
                                                 dx,
                                                 dz_rows,
                                                 args.dx ? int(row_tiles(s.tokens, 1)) : 0},
                   stream);
  });
}

}  // namespace align::cuda
