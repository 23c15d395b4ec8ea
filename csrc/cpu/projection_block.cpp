// The steps of a block of rows (cpu/projection.h).
#include <algorithm>

#include "cpu/projection.h"

namespace align::cpu {
namespace {

// Applies the masks of the latents, if there are any, to a matrix that has the columns of all heads.
template <typename T>
void mask_latents(const ProjectionBlock<T>& block, const RowMajor<Acc<T>>& of_heads) {
  if (!block.plan.masks_latents()) return;
  const MaskBits mask = block.projection.mask_bits(block.scratch.mask_bits);
  for (int64_t i = 0; i < block.rows.count; ++i) {
    drop_row(of_heads.row(i), mask.row_elements, mask_row(mask.bytes, mask.begin(block.rows, i)),
             block.projection.mask_scale);
  }
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
  for (int64_t i = 0; i < rows.count; ++i) {
    A* row = z + rows.row(i) * shape.latents() * shape.rank;
    for (int64_t l = 0; l < shape.latents(); ++l) std::copy_n(at(plan.latent(l), i), shape.rank, row + l * shape.rank);
  }
}

template <typename T>
void ProjectionBlock<T>::make_u(const A* z) const {
  const int64_t rank = plan.shape.rank, latents = plan.shape.latents();
  for (int64_t i = 0; i < rows.count; ++i) {
    A* u = scratch.u.row(i);
    const A* row = z + rows.row(i) * latents * rank;
    for (int64_t h = 0; h < plan.heads(); ++h) std::copy_n(row + (latents > 1 ? h * rank : 0), rank, u + h * rank);
    std::fill(u + plan.columns(), scratch.u.row(i + 1), A(0));
  }
  mask_latents(*this, scratch.u);
}

template <typename T>
void ProjectionBlock<T>::expand(int64_t group, RowMajor<const A> weights, const T* y_in, const T* bias, T* y) const {
  const int64_t rank = plan.shape.rank, offset_rank = plan.shape.offset_rank;
  for (int64_t i = 0; i < rows.count; ++i) {
    A* combined = scratch.combined.row(i);
    const A* u = scratch.u.row(i);
    for (int64_t h = 0; h < plan.heads(); ++h) {
      const A factor = projection.scaling * (weights.data ? weights.row(rows.row(i))[h] : 1);
      for (int64_t j = h * rank; j < (h + 1) * rank; ++j) combined[j] = factor * u[j];
    }
    const A* offset = offset_rank > 0 ? at(plan.offset(), i) : nullptr;
    for (int64_t j = 0; j < offset_rank; ++j) combined[plan.columns() + j] = projection.offset_scaling * offset[j];
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
  const int64_t rank = plan.shape.rank, outputs = plan.outputs();
  const TokenMatrix<const T> dy_of_group{dy + group * outputs, outputs, plan.shape.out_dim};
  const RowMajor<A> dbt{scratch.dbt.row(group * plan.columns()), scratch.dbt.stride};
  const RowMajor<A> factors = weights.data ? scratch.weighted : scratch.u;
  for (int64_t i = 0; weights.data && i < rows.count; ++i) {
    for (int64_t h = 0; h < plan.heads(); ++h) {
      const A weight = weights.row(rows.row(i))[h];
      for (int64_t j = h * rank; j < (h + 1) * rank; ++j) factors.row(i)[j] = weight * scratch.u.row(i)[j];
    }
  }
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
    rows_dot(RowsDot<T>{.rows = rows,
                        .x = dy_of_group,
                        .a = projection.bt_of(group),
                        .out = scratch.q,
                        .rank = plan.combined(),
                        .tiles = projection.bt_tiles_of(group)});
    outer_add(OuterAdd<T>{.rows = rows,
                          .x = dy_of_group,
                          .g = factors,
                          .rank = plan.columns(),
                          .outer = dbt,
                          .first = first_of_chunk,
                          .factors = factors_of_unit()});
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    const A* q = scratch.q.row(i);
    A* d_combined = scratch.combined.row(i);
    if (group == 0) std::fill_n(d_combined, scratch.combined.stride, A(0));
    for (int64_t h = 0; h < plan.heads(); ++h) {
      const A factor = projection.scaling * (weights.data ? weights.row(rows.row(i))[h] : 1);
      for (int64_t j = h * rank; j < (h + 1) * rank; ++j) d_combined[j] += factor * q[j];
    }
    for (int64_t j = plan.columns(); j < plan.combined(); ++j) d_combined[j] += projection.offset_scaling * q[j];
  }
}

template <typename T>
void ProjectionBlock<T>::make_u_backward(const A* dz_in) const {
  const int64_t rank = plan.shape.rank, latents = plan.shape.latents();
  mask_latents(*this, scratch.combined);
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t l = 0; l < latents; ++l) {
      A* dz = at(plan.latent(l), i);
      std::fill_n(dz, rank, A(0));
      if (dz_in) std::copy_n(dz_in + (rows.row(i) * latents + l) * rank, rank, dz);
    }
    const A* d_combined = scratch.combined.row(i);
    for (int64_t h = 0; h < plan.heads(); ++h) {
      A* dz = at(plan.latent(latents > 1 ? h : 0), i);
      for (int64_t j = 0; j < rank; ++j) dz[j] += d_combined[h * rank + j];
    }
    if (plan.shape.offset_rank > 0) {
      std::copy_n(d_combined + plan.columns(), plan.shape.offset_rank, at(plan.offset(), i));
    }
  }
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
