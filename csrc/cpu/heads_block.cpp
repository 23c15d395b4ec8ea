// The steps of a block of rows (cpu/heads.h).
#include <algorithm>

#include "cpu/heads.h"

namespace align::cpu {
namespace {

// Masks what belongs to all heads' latents in the rows of a block, if they are masked.
template <typename T>
void mask_latents(const HeadsBlock<T>& block, const Small<Acc<T>>& of_heads) {
  if (!block.plan.masks_latents()) return;
  const int64_t elements = block.plan.mask_row();
  const KeepBits keep{block.scratch.keep, 0, elements, 0};
  drop_rows(of_heads.data, of_heads.stride, block.rows.count, elements, kept_row(keep.bytes, keep.begin(block.rows, 0)),
            block.heads.mask_scale);
}

}  // namespace

// ---- Forward

template <typename T>
void HeadsBlock<T>::shrink(A* z) const {
  const HeadsShape& shape = plan.shape;
  for (const RankTerm<A>& term : terms) {
    rows_dot(RowsDot<T>{rows, {heads.x, shape.in_dim}, term.keep, term.b, term.g, term.rank, term.tiles});
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
void HeadsBlock<T>::make_heads(const A* z) const {
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
void HeadsBlock<T>::expand(int64_t group, Small<const A> v, const T* y_in, const T* bias, T* y) const {
  const int64_t rank = plan.shape.rank, offset_rank = plan.shape.offset_rank;
  for (int64_t i = 0; i < rows.count; ++i) {
    A* mixed = scratch.mixed.row(i);
    const A* u = scratch.u.row(i);
    for (int64_t h = 0; h < plan.heads(); ++h) {
      const A factor = heads.scaling * (v.data ? v.row(rows.row(i))[h] : 1);
      for (int64_t j = h * rank; j < (h + 1) * rank; ++j) mixed[j] = factor * u[j];
    }
    const A* offset = offset_rank > 0 ? at(plan.offset(), i) : nullptr;
    for (int64_t j = 0; j < offset_rank; ++j) mixed[plan.columns() + j] = heads.offset_scaling * offset[j];
  }
  const int64_t outputs = plan.outputs(), first = group * outputs;
  const RankTerm<A> low_rank{{}, scratch.mixed, heads.bt_of(group), plan.mixed(), 1, heads.bt_tiles_of(group)};
  rank_add(RankAdd<T>{rows,
                      y_in + first,
                      {y + first, outputs, plan.shape.out_dim},
                      &low_rank,
                      1,
                      bias ? bias + first : nullptr,
                      scratch.factors});
}

// ---- Backward

template <typename T>
void HeadsBlock<T>::pull(const T* dy, int64_t group, Small<const A> v) const {
  const int64_t rank = plan.shape.rank, outputs = plan.outputs();
  const Tall<const T> dy_of_group{dy + group * outputs, outputs, plan.shape.out_dim};
  const Small<A> dbt{scratch.dbt.row(group * plan.columns()), scratch.dbt.stride};
  const Small<A> factors = v.data ? scratch.weighted : scratch.u;
  for (int64_t i = 0; v.data && i < rows.count; ++i) {
    for (int64_t h = 0; h < plan.heads(); ++h) {
      const A weight = v.row(rows.row(i))[h];
      for (int64_t j = h * rank; j < (h + 1) * rank; ++j) factors.row(i)[j] = weight * scratch.u.row(i)[j];
    }
  }
  if (plan.many_ranks() || heads.amx) {
    const Small<const A> b = heads.amx ? Small<const A>{} : heads.b_of(group);
    dot_outer(DotOuter<T>{rows, dy_of_group, b, scratch.q, plan.mixed(), factors, plan.columns(), dbt, first_of_chunk,
                          heads.bt_tiles_of(group), scratch.factors});
  } else {
    rows_dot(RowsDot<T>{rows, dy_of_group, {}, heads.bt_of(group), scratch.q, plan.mixed()});
    outer_add(OuterAdd<T>{rows, dy_of_group, {}, factors, plan.columns(), dbt, first_of_chunk});
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    const A* q = scratch.q.row(i);
    A* d_mixed = scratch.mixed.row(i);
    if (group == 0) std::fill_n(d_mixed, scratch.mixed.stride, A(0));
    for (int64_t h = 0; h < plan.heads(); ++h) {
      const A factor = heads.scaling * (v.data ? v.row(rows.row(i))[h] : 1);
      for (int64_t j = h * rank; j < (h + 1) * rank; ++j) d_mixed[j] += factor * q[j];
    }
    for (int64_t j = plan.columns(); j < plan.mixed(); ++j) d_mixed[j] += heads.offset_scaling * q[j];
  }
}

template <typename T>
void HeadsBlock<T>::latent_gradient(const A* dz_in) const {
  const int64_t rank = plan.shape.rank, latents = plan.shape.latents();
  mask_latents(*this, scratch.mixed);
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t l = 0; l < latents; ++l) {
      A* dz = at(plan.latent(l), i);
      std::fill_n(dz, rank, A(0));
      if (dz_in) std::copy_n(dz_in + (rows.row(i) * latents + l) * rank, rank, dz);
    }
    const A* d_mixed = scratch.mixed.row(i);
    for (int64_t h = 0; h < plan.heads(); ++h) {
      A* dz = at(plan.latent(latents > 1 ? h : 0), i);
      for (int64_t j = 0; j < rank; ++j) dz[j] += d_mixed[h * rank + j];
    }
    if (plan.shape.offset_rank > 0) {
      std::copy_n(d_mixed + plan.columns(), plan.shape.offset_rank, at(plan.offset(), i));
    }
  }
}

template <typename T>
void HeadsBlock<T>::input_gradient(const T* dx_in, T* dx) const {
  const int64_t in_dim = plan.shape.in_dim;
  if (dx) rank_add(RankAdd<T>{rows, dx_in, {dx, in_dim}, terms.data(), plan.terms(), nullptr, scratch.factors});
  for (int64_t k = 0; k < plan.terms(); ++k) {
    const Small<A> da{scratch.da.row(plan.a_row(k)), scratch.da.stride};
    outer_add(OuterAdd<T>{rows,
                          {heads.x, in_dim},
                          terms[k].keep,
                          terms[k].g,
                          plan.trained(k),
                          da,
                          first_of_chunk && !plan.shares_a(k),
                          heads.amx ? scratch.factors : nullptr});
  }
}

template struct HeadsBlock<float>;
template struct HeadsBlock<double>;
template struct HeadsBlock<bfloat16>;
template struct HeadsBlock<float16>;

}  // namespace align::cpu
