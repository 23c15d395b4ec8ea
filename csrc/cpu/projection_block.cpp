// The steps of a block of rows (cpu/projection.h).
#include <algorithm>
#include <cstring>

#include "cpu/projection.h"
#include "cpu/tiles.h"

namespace align::cpu {
namespace {

// Calls body(rank), compiled for the widest vectors, with a constant if the rank is a usual one: its short loops then
// become vectors. body must be an ALIGN_INLINE_LAMBDA.
template <typename Body>
void with_rank(int64_t rank, const Body& body) {
  run_widest([&](auto) ALIGN_INLINE_LAMBDA {
    switch (rank) {
      case 8:
        return body(std::integral_constant<int64_t, 8>{});
      case 16:
        return body(std::integral_constant<int64_t, 16>{});
      default:
        return body(rank);
    }
  });
}

// std::copy_n, which GCC 12 makes a call of, however few the elements.
template <typename A>
ALIGN_INLINE void copy(const A* from, int64_t count, A* to) {
  if (count > 0) std::memcpy(to, from, count * sizeof(A));
}

// Applies the masks of the latents, if there are any, to a matrix that has the columns of all heads.
template <typename T>
void mask_latents(const ProjectionBlock<T>& block, const RowMajor<Acc<T>>& of_heads) {
  using A = Acc<T>;
  if (!block.plan.masks_latents()) return;
  const MaskBits mask = block.projection.mask_bits(block.scratch.mask_bits);
  dispatch<A>([&](auto width) ALIGN_INLINE_LAMBDA {
    constexpr int W = width(), kHalf = std::max(W / 2, 16);  // often eight ranks are left of whole vectors
    constexpr int64_t kLane = kLanes<A, W>, kHalfLane = kLanes<A, kHalf>;
    const A scale = block.projection.mask_scale;
    const int64_t columns = mask.row_elements;
    for (int64_t i = 0; i < block.rows.count; ++i) {
      const MaskRow kept = mask_row(mask.bytes, mask.begin(block.rows, i));
      A* row = of_heads.row(i);
      int64_t c = 0;
      for (; c + kLane <= columns; c += kLane) {
        store<W>(row + c, zero_dropped<W, A>(scale * load<W>(row + c), kept, c));
      }
      for (; c < columns; c += kHalfLane) {
        const int64_t count = std::min(kHalfLane, columns - c);
        const Vec<A, kHalf> rest = scale * load_first<kHalf>(row + c, count);
        store_first<kHalf>(row + c, zero_dropped<kHalf, A>(rest, kept, c), count);
      }
    }
  });
}

// to = scale w u, or with kAdds to += scale w u, for the rows of the block and the columns of all heads; without
// weights w is 1.
template <bool kAdds = false, typename T, typename A>
void weigh_heads(const ProjectionBlock<T>& block, const RowMajor<const A>& weights, A scale, const RowMajor<A>& u,
                 const RowMajor<A>& to) {
  const int64_t heads = block.plan.heads();
  with_rank(block.plan.shape.rank, [&](auto rank) ALIGN_INLINE_LAMBDA {
    for (int64_t i = 0; i < block.rows.count; ++i) {
      const A* w = weights.data ? weights.row(block.rows.row(i)) : nullptr;
      const A* __restrict from = u.row(i);
      A* __restrict row = to.row(i);
      for (int64_t h = 0; h < heads; ++h, from += rank, row += rank) {
        const A factor = scale * (w ? w[h] : 1);
        for (int64_t j = 0; j < rank; ++j) row[j] = kAdds ? row[j] + factor * from[j] : factor * from[j];
      }
    }
  });
}

}  // namespace

// ---- Forward

template <typename T>
void ProjectionBlock<T>::shrink(A* z) const {
  const HeadsShape& shape = plan.shape;
  for (const RankTerm<A>& term : terms) {
    rows_dot(RowsDot<T>{.rows = rows,
                        .x = {projection.x, shape.in_dim},
                        .mask = term.mask,
                        .a = term.b,
                        .out = term.g,
                        .rank = term.rank,
                        .tiles = term.tiles});
    for (int64_t i = 0; i < rows.count && term.scale != 1; ++i) {
      for (int64_t j = 0; j < term.rank; ++j) term.g.row(i)[j] *= term.scale;
    }
  }
  with_rank(shape.rank, [&](auto rank) ALIGN_INLINE_LAMBDA {
    for (int64_t i = 0; i < rows.count; ++i) {
      A* row = z + rows.row(i) * shape.latents() * rank;
      for (int64_t l = 0; l < shape.latents(); ++l) copy(at(plan.latent(l), i), rank, row + l * rank);
    }
  });
}

template <typename T>
void ProjectionBlock<T>::make_u(const A* z) const {
  const int64_t latents = plan.shape.latents(), heads = plan.heads();
  with_rank(plan.shape.rank, [&](auto rank) ALIGN_INLINE_LAMBDA {
    for (int64_t i = 0; i < rows.count; ++i) {
      A* u = scratch.u.row(i);
      const A* row = z + rows.row(i) * latents * rank;
      const int64_t step = latents > 1 ? rank : 0;
      for (int64_t h = 0; h < heads; ++h) copy(row + h * step, rank, u + h * rank);
    }
  });
  mask_latents(*this, scratch.u);
}

template <typename T>
void ProjectionBlock<T>::expand(int64_t group, RowMajor<const A> weights, const T* y_in, const T* bias, T* y) const {
  const int64_t columns = plan.columns(), offset_rank = plan.shape.offset_rank;
  weigh_heads(*this, weights, projection.scaling, scratch.u, scratch.combined);
  for (int64_t i = 0; offset_rank > 0 && i < rows.count; ++i) {
    const A* offset = at(plan.offset(), i);
    for (int64_t j = 0; j < offset_rank; ++j) {
      scratch.combined.row(i)[columns + j] = projection.offset_scaling * offset[j];
    }
  }
  const int64_t outputs = plan.outputs(), first = group * outputs;
  const RankTerm<A> low_rank{.g = scratch.combined,
                             .b = projection.bt_of(group),
                             .rank = plan.combined(),
                             .scale = 1,
                             .tiles = projection.bt_tiles_of(group)};
  rank_add(RankAdd<T>{.rows = rows,
                      .in = y_in + first,
                      .out = {y + first, outputs, plan.shape.out_dim},
                      .terms = &low_rank,
                      .count = 1,
                      .bias = bias ? bias + first : nullptr,
                      .factors = scratch.factors});
}

// ---- Backward

template <typename T>
void ProjectionBlock<T>::expand_backward(const T* dy, int64_t group, RowMajor<const A> weights) const {
  const int64_t outputs = plan.outputs();
  const TokenMatrix<const T> dy_of_group{dy + group * outputs, outputs, plan.shape.out_dim};
  const RowMajor<A> dbt{scratch.dbt.row(group * plan.columns()), scratch.dbt.stride};
  const RowMajor<A> factors = weights.data ? scratch.weighted : scratch.u;
  if (weights.data) weigh_heads(*this, weights, A(1), scratch.u, factors);
  if (projection.dots_and_outer()) {
    const RowMajor<const A> b = projection.packs_b() ? projection.b_of(group) : RowMajor<A>{};
    dot_outer(DotOuter<T>{.rows = rows,
                          .x = dy_of_group,
                          .bt = b,
                          .out = scratch.q,
                          .rank = plan.combined(),
                          .g = factors,
                          .outer_rank = plan.columns(),
                          .outer = dbt,
                          .first = first_of_chunk,
                          .tiles = projection.bt_tiles_of(group),
                          .factors = factors_of_unit()});
  } else {
    rows_dot(RowsDot<T>{
        .rows = rows, .x = dy_of_group, .a = projection.bt_of(group), .out = scratch.q, .rank = plan.combined()});
    outer_add(OuterAdd<T>{
        .rows = rows, .x = dy_of_group, .g = factors, .rank = plan.columns(), .outer = dbt, .first = first_of_chunk});
  }
  if (group == 0) {
    weigh_heads(*this, weights, projection.scaling, scratch.q, scratch.combined);
  } else {
    weigh_heads</*kAdds=*/true>(*this, weights, projection.scaling, scratch.q, scratch.combined);
  }
  for (int64_t i = 0; plan.shape.offset_rank > 0 && i < rows.count; ++i) {
    A* d_combined = scratch.combined.row(i);
    for (int64_t j = plan.columns(); j < plan.combined(); ++j) {
      d_combined[j] = (group == 0 ? 0 : d_combined[j]) + projection.offset_scaling * scratch.q.row(i)[j];
    }
  }
}

template <typename T>
void ProjectionBlock<T>::make_u_backward(const A* dz_in) const {
  const int64_t latents = plan.shape.latents(), heads = plan.heads();
  mask_latents(*this, scratch.combined);
  with_rank(plan.shape.rank, [&](auto rank) ALIGN_INLINE_LAMBDA {
    for (int64_t i = 0; i < rows.count; ++i) {
      const A* d_combined = scratch.combined.row(i);
      for (int64_t l = 0; l < latents; ++l) {
        A* dz = at(plan.latent(l), i);
        if (dz_in) {
          copy(dz_in + (rows.row(i) * latents + l) * rank, rank, dz);
        } else {
          std::fill_n(dz, int64_t(rank), A(0));
        }
      }
      for (int64_t h = 0; h < heads; ++h) {
        A* dz = at(plan.latent(latents > 1 ? h : 0), i);
        for (int64_t j = 0; j < rank; ++j) dz[j] += d_combined[h * rank + j];
      }
      if (plan.shape.offset_rank > 0) {
        std::copy_n(d_combined + plan.columns(), plan.shape.offset_rank, at(plan.offset(), i));
      }
    }
  });
}

template <typename T>
void ProjectionBlock<T>::shrink_backward(const T* dx_in, T* dx) const {
  const int64_t in_dim = plan.shape.in_dim;
  if (dx) {
    rank_add(RankAdd<T>{.rows = rows,
                        .in = dx_in,
                        .out = {dx, in_dim},
                        .terms = terms.data(),
                        .count = plan.terms(),
                        .factors = scratch.factors});
  }
  for (int64_t k = 0; k < plan.terms(); ++k) {
    const RowMajor<A> da{scratch.da.row(plan.a_row(k)), scratch.da.stride};
    outer_add(OuterAdd<T>{.rows = rows,
                          .x = {projection.x, in_dim},
                          .mask = terms[k].mask,
                          .g = terms[k].g,
                          .rank = plan.trained_rank(k),
                          .outer = da,
                          .first = first_of_chunk && !plan.shares_a(k),
                          .factors = factors_of_unit()});
  }
}

#define ALIGN_INSTANTIATE(T) template struct ProjectionBlock<T>;
ALIGN_FOR_CPU_TYPES(ALIGN_INSTANTIATE)

}  // namespace align::cpu
