// The projections with several heads, dropout_sum and routed_lora, which differ by a router. The latent rows of expand
// are those of the heads, scaling * w_i mask_i z, side by side, and those of the offset path after them.
//
//   forward   base, shrink ([A; A0] xd and R x), expand ([B | B0])
//   backward  base, shrink ([B | B0]^T dy), unmix (the heads' latents again, dz, the logits' gradient), backward
//
// All heads cost one pass over x and one over y; their latents are padded to a rank of 16, 32 or 64 together. With
// dropout on x a router's dR takes a pass over x of its own, for it stands on x as it is.
#pragma once

#include "cuda/projection.cuh"
#include "ops/heads.h"

namespace align::cuda {

struct Heads {
  int64_t tokens;
  int rank, heads, latents;  // latents of a row: 1 or heads
  int offset_rank;
  int router;  // first column of the logits, a multiple of 16, or 0: no router
  int top_k;
  float logit_scale;  // 1 / tau
  float scaling, offset_scaling;
  DropoutArgs masks;  // of the heads' latents; p = 0: none

  // Columns of shrink's result: z, the offset path, the logits.
  __host__ __device__ int z_width() const { return latents * rank; }
  __host__ __device__ int width() const { return router > 0 ? router + heads : z_width() + offset_rank; }
  // Columns of the heads' latents, and of all latents.
  __host__ __device__ int u_width() const { return heads * rank; }
  __host__ __device__ int du_width() const { return u_width() + offset_rank; }
  // Column of z that column i * rank + d of the heads' latents is made of.
  __device__ int z_column(int column) const { return latents == 1 ? column % rank : column; }
};

// Mask of column i * rank + d of a row's latents.
__device__ inline float latent_mask(const Heads& heads, const Dropout& masks, int64_t row, int column) {
  if (masks.threshold == 0) return 1;
  return keep_bits(masks, row * heads.u_width() + column, 1) & 1u ? masks.scale() : 0.f;
}

// The latent rows of expand, from what shrink left.
struct HeadMix {
  Heads heads;
  const float* parts;  // [slabs, tokens, width]
  int64_t slabs;
  float* z;  // [tokens, z_width], assigned by save
  float* w;  // [tokens, heads], assigned by save, or null

  __device__ float sum(int64_t row, int column) const {
    return sum_of_parts(parts, slabs, heads.tokens * heads.width(), row * heads.width() + column);
  }
  __device__ float logit(int64_t row, int i) const { return __fmul_rn(heads.logit_scale, sum(row, heads.router + i)); }

  // Whether head i is among the top_k; ties go to the lowest.
  __device__ bool chosen(int64_t row, int i, float mine) const {
    if (heads.top_k == heads.heads) return true;
    int before = 0;
#pragma unroll 1
    for (int j = 0; j < heads.heads; ++j) {
      const float other = logit(row, j);
      before += other > mine || (other == mine && j < i);
    }
    return before < heads.top_k;
  }
  __device__ float weight(int64_t row, int i) const {
    if (heads.router == 0) return 1;
    const float mine = logit(row, i);
    if (!chosen(row, i, mine)) return 0;
    float total = 0;  // of exp(l_j - l_i) over the chosen, with no term above 1 but those that outweigh i
#pragma unroll 1
    for (int j = 0; j < heads.heads; ++j) {
      const float other = logit(row, j);
      if (chosen(row, j, other)) total += expf(other - mine);
    }
    return 1 / total;
  }

  __device__ float operator()(int64_t row, int column) const {
    const int offset = column - heads.u_width();
    if (offset >= heads.offset_rank) return 0;
    if (offset >= 0) return heads.offset_scaling * sum(row, heads.z_width() + offset);
    const float mask = latent_mask(heads, Dropout(heads.masks), row, column);
    return heads.scaling * weight(row, column / heads.rank) * mask * sum(row, heads.z_column(column));
  }

  // Rows first .. first + rows of a tile.
  __device__ void save(const RowTile& tile, int first, int rows, int thread, int threads) const {
    const int columns = heads.z_width() + (w ? heads.heads : 0);
    for (int i = thread; i < rows * columns; i += threads) {
      const int at = first + i / columns, column = i % columns, head = column - heads.z_width();
      if (at >= tile.count) continue;
      const int64_t row = tile.row(at);
      if (head < 0) {
        z[row * heads.z_width() + column] = sum(row, column);
      } else {
        w[row * heads.heads + head] = weight(row, head);
      }
    }
  }
};

struct UnmixJob {
  Heads heads;
  const float* parts;  // [slabs, tokens, du_width] of [B | B0]^T dy
  int64_t slabs;
  const float* z;      // [tokens, z_width]
  const float* w;      // [tokens, heads], or null: 1
  const float* dz_in;  // [tokens, z_width], or null: zero
  const float* dw_in;  // [tokens, heads], or null: zero
  float* u;            // [tokens, u_width], assigned w_i mask_i z
  float* dz;           // [tokens, width], assigned; zero between offset path and logits
};

// projection.cu
void unmix(const UnmixJob& job, Stream stream);

#define ALIGN_COMPILED_ELSEWHERE(...) \
  extern template void expand<__VA_ARGS__>(const ExpandJob<__VA_ARGS__::Element>&, const HeadMix&, Stream);
ALIGN_FOR_EACH_MATH(ALIGN_COMPILED_ELSEWHERE)
#undef ALIGN_COMPILED_ELSEWHERE

// ---- Launchers

// R null: no router.
template <typename W>
struct Router {
  const W* R;  // [heads, in_dim]
  int64_t top_k;
  double tau;
};

template <typename T, typename W>
struct HeadsLaunch {
  using Inputs = HeadsInputs<T, W>;
  Heads heads;
  SmallMatrix<T> a, b, r;             // A, A0 and R; B and B0; R alone
  GroupedLoraShape a_shape, b_shape;  // of them as projections
  Plan a_plan, b_plan, both;
  DropoutArgs on_x;
  float kept;
  int masked;

  HeadsLaunch(const Inputs& in, const Router<W>& router) {
    const HeadsShape& s = in.shape;
    constexpr bool kFloat = std::is_same_v<W, float>;
    const int a_ranks = int(s.own_A ? s.heads * s.rank : s.rank), b_ranks = int(s.heads * s.rank);
    const int more = int(s.offset_rank), r_ranks = router.R ? int(s.heads) : 0;
    const Adapter R{router.R, kFloat, r_ranks, layout_of_a(r_ranks, s.in_dim), 0, 0};
    a = stack<T>(s.in_dim, {in.A, kFloat, a_ranks, layout_of_a(a_ranks, s.in_dim), 0, 0},
                 {in.A0, kFloat, more, layout_of_a(more, s.in_dim), 0, 0}, R, 16);
    b = stack<T>(s.out_dim, {in.B, kFloat, b_ranks, layout_of_b(s.rank, s.out_dim), 0, 0},
                 {in.B0, kFloat, more, layout_of_b(more, s.out_dim), 0, 0});
    r = stack<T>(s.in_dim, R);
    a_shape = b_shape = {s.tokens, s.in_dim, s.out_dim, 0, 1};
    a_shape.rank = a.ranks, b_shape.rank = b.ranks;
    const auto plan_rank = [&](int64_t rank) {
      return plan(s.tokens, s.in_dim, s.out_dim, rank, 1, sizeof(T), current_device());
    };
    a_plan = plan_rank(a.ranks), b_plan = plan_rank(b.ranks), both = plan_rank(std::max(a.ranks, b.ranks));
    const double p = in.dropout.p;
    on_x = {s.site == DropoutSite::kInput ? p : 0, in.dropout.rng};
    kept = float(dropout_scale(dropout_threshold(on_x.p)));
    masked = router.R ? a.adapters[2].start : kAllRanks;
    heads = {s.tokens,
             int(s.rank),
             int(s.heads),
             int(s.latents()),
             more,
             router.R ? a.adapters[2].start : 0,
             int(router.top_k),
             float(1 / router.tau),
             float(in.scaling),
             float(in.offset_scaling),
             {s.site == DropoutSite::kLatent ? p : 0, in.dropout.rng}};
  }

  int64_t forward_floats() const { return a_plan.shrink.slabs * heads.tokens * heads.width(); }
  int64_t backward_floats() const {
    return heads.tokens * (b_plan.shrink_dy.slabs * heads.du_width() + heads.width() + heads.u_width());
  }
};

template <typename T, typename W>
void heads_forward(const HeadsForwardArgs<T, W>& args, const Router<W>& router, float* w, Stream stream) {
  const HeadsLaunch<T, W> l(args.inputs, router);
  const HeadsShape& s = args.inputs.shape;
  float* parts = static_cast<float*>(args.workspace);
  const int64_t slabs = l.a_plan.shrink.slabs;
  with_math<T>(l.a_plan, [&](auto math) {
    shrink<decltype(math)>(
        {l.a_shape, {}, tall(args.inputs.x, s.in_dim, args.z), l.a, l.on_x, l.masked, l.kept, parts, l.a_plan.shrink},
        l.a_plan.rank_chunks, stream);
  });
  with_math<T>(l.b_plan, [&](auto math) {
    const TallMatrix<T> y_in = tall(args.y_in, s.out_dim, args.y);
    expand<decltype(math)>({l.b_shape,
                            {},
                            y_in,
                            args.y,
                            rows_aligned(args.y, s.out_dim),
                            args.bias,
                            l.b,
                            {0, nullptr},
                            0,
                            1,
                            1,
                            l.b_plan.expand},
                           HeadMix{l.heads, parts, slabs, args.z, w}, stream);
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
  const int64_t slabs = l.b_plan.shrink_dy.slabs;
  float* parts = static_cast<float*>(args.workspace);
  float* dz = parts + slabs * s.tokens * l.heads.du_width();
  float* u = dz + s.tokens * l.heads.width();
  const TallMatrix<T> x = tall(args.inputs.x, s.in_dim, args.z), dy = tall(args.dy, s.out_dim, args.z);
  const DropoutArgs none = {0, nullptr};
  with_math<T>(l.b_plan, [&](auto math) {
    shrink<decltype(math)>({l.b_shape, {}, dy, l.b, none, kAllRanks, 1, parts, l.b_plan.shrink_dy},
                           l.b_plan.rank_chunks, stream);
  });
  unmix({l.heads, parts, slabs, args.z, gradient.w, args.dz_in, gradient.dw_in, u, dz}, stream);
  with_math<T>(l.both, [&](auto math) {
    using Math = decltype(math);
    const int64_t width = l.heads.width();
    const int in_blocks = int(outer_blocks(s.in_dim, sizeof(T))), out_blocks = int(outer_blocks(s.out_dim, sizeof(T)));
    const bool apart = router.R && l.on_x.p > 0;  // dA stands on dropped x, dR on x
    const OuterJob<T> d_a{l.a_shape, {}, x, l.on_x, l.kept, l.a, {args.dA, nullptr, apart ? nullptr : gradient.dR},
                          nullptr};
    const OuterJob<T> d_r{l.a_shape, {}, x, none, 1, l.r, {gradient.dR}, nullptr};
    const OuterJob<T> d_b{l.b_shape, {}, dy, none, l.heads.scaling, l.b, {args.dB}, nullptr};
    const ExpandJob<T> dx{l.a_shape,
                          {},
                          tall(args.dx_in, s.in_dim, args.dx),
                          args.dx,
                          rows_aligned(args.dx, s.in_dim),
                          nullptr,
                          l.a,
                          l.on_x,
                          l.masked,
                          l.kept,
                          1,
                          l.both.expand_dx};
    const LatentRows dz_rows{dz, width, width}, logit_rows{dz + l.heads.router, width, s.heads};
    backward<Math>(BackwardJob<Math, LatentRows>{{{d_a, dz_rows, in_blocks},
                                                  {d_r, logit_rows, apart ? in_blocks : 0},
                                                  {d_b, {u, l.heads.u_width(), l.heads.u_width()}, out_blocks}},
                                                 dx,
                                                 dz_rows,
                                                 args.dx ? int(row_tiles(s.tokens, 1)) : 0,
                                                 1,
                                                 int(l.both.rank_chunks)},
                   stream);
  });
}

}  // namespace align::cuda
