#include "cpu/heads.h"

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/dropout.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"

namespace align::cpu {
namespace {

template <typename A>
HeadsScratch<A> carve(Arena& arena, const HeadsPlan& plan) {
  const HeadsShape& shape = plan.shape;
  const auto ranks = [](int64_t rank) { return round_up(rank, kRankAlign); };
  const int64_t in_columns = round_up(shape.in_dim, kColumnAlign), tokens = shape.tokens;
  const int64_t out_columns = round_up(plan.outputs(), kColumnAlign);
  const int64_t mixed = ranks(plan.columns() + shape.offset_rank);
  const int64_t logits = ranks(plan.routed ? plan.groups * shape.heads : 0);
  HeadsScratch<A> s;
  if (plan.dropout) s.keep = arena.take<uint8_t>(dropout_bits_bytes(plan.mask_elements()));
  s.terms = arena.take<RankTerm<A>>(plan.terms());
  s.latent = arena.take_small<A>(plan.parts() * tokens, ranks(plan.part_rank()));
  s.offset = arena.take_small<A>(tokens, ranks(shape.offset_rank));
  s.logits = arena.take_small<A>(tokens, logits);
  s.a = arena.take_small<A>(plan.part_matrices() * ranks(plan.part_rank()), in_columns);
  s.a0 = arena.take_small<A>(ranks(shape.offset_rank), in_columns);
  s.r = arena.take_small<A>(logits, in_columns);
  s.bt = arena.take_small<A>(plan.groups * mixed, out_columns);
  s.u = arena.take_small<A>(tokens, ranks(plan.columns()));
  s.mixed = arena.take_small<A>(tokens, mixed);
  if (plan.backward) {
    s.q = arena.take_small<A>(tokens, mixed);
    s.dbt = arena.take_small<A>(plan.groups * plan.columns(), out_columns);
  }
  return s;
}

// The terms' places and masks: the offset path shares the mask of site input, the router has none.
template <typename T>
void describe_terms(const Heads<T>& heads) {
  const HeadsPlan& plan = heads.plan;
  const auto& s = heads.scratch;
  const HeadsShape& shape = plan.shape;
  const bool masked = plan.masks_inputs(), shared = masked && shape.site == DropoutSite::kInput;
  RankTerm<Acc<T>>* term = s.terms;
  for (int64_t p = 0; p < plan.parts(); ++p) {
    const KeepBits keep{masked ? s.keep : nullptr, plan.parts(), p};
    const Small<Acc<T>> latent{s.latent.row(p * shape.tokens), s.latent.stride};
    const Small<Acc<T>> a{s.a.row(shape.own_A ? p * s.latent.stride : 0), s.a.stride};
    *term++ = {keep, latent, a, plan.part_rank(), masked ? heads.mask_scale : 1};
  }
  const KeepBits keep{shared ? s.keep : nullptr};
  if (shape.offset_rank > 0) *term++ = {keep, s.offset, s.a0, shape.offset_rank, shared ? heads.mask_scale : 1};
  if (plan.routed) *term++ = {{}, s.logits, s.r, plan.groups * shape.heads, 1};
}

// Columns [first, last) of every operand.
template <typename T>
void prepare_columns(const Heads<T>& heads, const T* R, int64_t first, int64_t last) {
  const HeadsPlan& plan = heads.plan;
  const auto& s = heads.scratch;
  const auto& [tokens, in_dim, out_dim, rank, count, offset_rank, own_A, site] = plan.shape;
  const int64_t part_rank = plan.part_rank();
  clear_columns(s.a, plan.part_matrices() * s.latent.stride, first, last);
  for (int64_t p = 0; p < plan.part_matrices(); ++p) {
    const Operand<T> a{heads.inputs.A + p * part_rank * in_dim, part_rank, in_dim, in_dim, 1};
    add_columns(a, {s.a.row(p * s.latent.stride), s.a.stride}, first, last);
  }
  clear_columns(s.a0, s.offset.stride, first, last);
  add_columns(Operand<T>{heads.inputs.A0, offset_rank, in_dim, in_dim, 1}, s.a0, first, last);
  clear_columns(s.r, s.logits.stride, first, last);
  if (plan.routed) add_columns(Operand<T>{R, plan.groups * count, in_dim, in_dim, 1}, s.r, first, last);
  clear_columns(s.bt, plan.groups * s.mixed.stride, first, last);
  const int64_t outputs = plan.outputs();
  for (int64_t g = 0; g < plan.groups; ++g) {
    for (int64_t i = 0; i < count; ++i) {
      const Operand<T> b{heads.inputs.B + (i * out_dim + g * outputs) * rank, rank, outputs, 1, rank};
      add_columns(b, {heads.bt(g).row(plan.summed() ? 0 : i * rank), s.bt.stride}, first, last);
    }
    const Operand<T> b0{heads.inputs.B0 + g * outputs * offset_rank, offset_rank, outputs, 1, offset_rank};
    add_columns(b0, {heads.bt(g).row(plan.columns()), s.bt.stride}, first, last);
  }
}

// target += scale * source, with the elements zeroed that bits from first on say are dropped (null: none).
template <typename A>
void add_masked(A* target, const A* source, int64_t count, A scale, const uint8_t* bits, int64_t first) {
  for (int64_t d = 0; d < count; ++d) {
    const uint64_t e = uint64_t(first + d);
    if (!bits || (bits[e / 8] >> (e % 8) & 1)) target[d] += scale * source[d];
  }
}

}  // namespace

int64_t HeadsPlan::mask_elements() const {
  switch (shape.site) {
    case DropoutSite::kNone:
      return 0;
    case DropoutSite::kInput:
      return shape.tokens * shape.in_dim;
    case DropoutSite::kLatent:
      return shape.tokens * shape.heads * shape.rank;
    case DropoutSite::kInputPerHead:
      return shape.tokens * shape.heads * shape.in_dim;
  }
  return 0;
}

int64_t heads_workspace(const HeadsPlan& plan) {
  Arena arena(nullptr);
  carve<double>(arena, plan);  // the widest accumulator
  return arena.bytes();
}

template <typename T>
Small<Acc<T>> Heads<T>::bt(int64_t group) const {
  return {scratch.bt.row(group * scratch.mixed.stride), scratch.bt.stride};
}

template <typename T>
Acc<T>* Heads<T>::latent(int64_t i, int64_t t) const {
  const bool apart = plan.parts() > 1;
  return scratch.latent.row(apart ? i * plan.shape.tokens + t : t) + (apart ? 0 : i * plan.shape.rank);
}

template <typename T>
Heads<T> make_heads(const HeadsPlan& plan, const HeadsInputs<T>& inputs, const T* R, void* workspace) {
  Arena arena(workspace);
  Heads<T> heads{plan, inputs, carve<Acc<T>>(arena, plan), 1};
  const DropoutArgs& dropout = inputs.dropout;
  if (plan.dropout) {
    heads.mask_scale = Acc<T>(draw_dropout(dropout.p, dropout.rng, plan.mask_elements(), heads.scratch.keep));
  }
  describe_terms(heads);
  const int64_t columns = std::max(heads.scratch.a.stride, heads.scratch.bt.stride);
  parallel_for(0, ceil_div(columns, kPrepareColumns), 4, [&](int64_t begin, int64_t end) {
    prepare_columns(heads, R, begin * kPrepareColumns, end * kPrepareColumns);
  });
  return heads;
}

template <typename T>
void shrink_rows(const Heads<T>& heads, Acc<T>* z, int64_t begin, int64_t end) {
  const HeadsPlan& plan = heads.plan;
  const auto& s = heads.scratch;
  const HeadsShape& shape = plan.shape;
  for (int64_t k = 0; k < plan.terms(); ++k) {
    const RankTerm<Acc<T>>& term = s.terms[k];
    rows_dot(RowsDot<T>{{nullptr, shape.in_dim}, heads.inputs.x, term.keep, term.b, term.g}, begin, end);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t j = 0; j < term.rank; ++j) term.g.row(t)[j] *= term.scale;
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t i = 0; i < shape.latents(); ++i) {
      std::copy_n(heads.latent(i, t), shape.rank, z + (t * shape.latents() + i) * shape.rank);
    }
  }
}

template <typename T>
void head_rows(const Heads<T>& heads, const Acc<T>* z, int64_t begin, int64_t end) {
  const HeadsPlan& plan = heads.plan;
  const int64_t rank = plan.shape.rank, latents = plan.shape.latents();
  const bool masked = plan.masks_latents();
  const uint8_t* bits = masked ? heads.scratch.keep : nullptr;
  for (int64_t t = begin; t < end; ++t) {
    Acc<T>* u = heads.scratch.u.row(t);
    std::fill_n(u, heads.scratch.u.stride, Acc<T>(0));
    for (int64_t i = 0; i < plan.heads(); ++i) {
      const Acc<T>* latent = z + (t * latents + (latents > 1 ? i : 0)) * rank;
      add_masked(u + i * rank, latent, rank, masked ? heads.mask_scale : Acc<T>(1), bits,
                 t * plan.columns() + i * rank);
    }
  }
}

template <typename T>
void expand_rows(const Heads<T>& heads, const HeadsForwardArgs<T>& args, int64_t group, HeadFactors<Acc<T>> v,
                 int64_t begin, int64_t end) {
  const HeadsPlan& plan = heads.plan;
  const auto& s = heads.scratch;
  const auto& [tokens, in_dim, out_dim, rank, count, offset_rank, own_A, site] = plan.shape;
  for (int64_t t = begin; t < end; ++t) {
    Acc<T>* mixed = s.mixed.row(t);
    for (int64_t i = 0; i < plan.heads(); ++i) {
      const Acc<T> factor = Acc<T>(heads.inputs.scaling) * (v.data ? v.row(t)[i] : 1);
      for (int64_t j = i * rank; j < (i + 1) * rank; ++j) mixed[j] = factor * s.u.row(t)[j];
    }
    for (int64_t j = 0; j < offset_rank; ++j) {
      mixed[plan.columns() + j] = Acc<T>(heads.inputs.offset_scaling) * s.offset.row(t)[j];
    }
  }
  const int64_t outputs = plan.outputs(), first = group * outputs;
  const RankTerm<Acc<T>> low_rank{{}, s.mixed, heads.bt(group), plan.columns() + offset_rank, 1};
  rank_add(RankAdd<T>{{nullptr, outputs, out_dim},
                      args.y_in + first,
                      args.y + first,
                      &low_rank,
                      1,
                      args.bias ? args.bias + first : nullptr},
           begin, end);
}

template <typename T>
void pull_rows(const Heads<T>& heads, const T* dy, int64_t group, HeadFactors<Acc<T>> v, int64_t begin, int64_t end) {
  const HeadsPlan& plan = heads.plan;
  const auto& s = heads.scratch;
  const int64_t rank = plan.shape.rank, outputs = plan.outputs();
  const RowOrder order{nullptr, outputs, plan.shape.out_dim};
  rows_dot(RowsDot<T>{order, dy + group * outputs, {}, heads.bt(group), s.q}, begin, end);
  for (int64_t t = begin; t < end; ++t) {
    const Acc<T>* q = s.q.row(t);
    Acc<T>* d_mixed = s.mixed.row(t);
    if (group == 0) std::fill_n(d_mixed, s.mixed.stride, Acc<T>(0));
    for (int64_t i = 0; i < plan.heads(); ++i) {
      const Acc<T> factor = Acc<T>(heads.inputs.scaling) * (v.data ? v.row(t)[i] : 1);
      for (int64_t j = i * rank; j < (i + 1) * rank; ++j) d_mixed[j] += factor * q[j];
    }
    for (int64_t j = plan.columns(); j < plan.columns() + plan.shape.offset_rank; ++j) {
      d_mixed[j] += Acc<T>(heads.inputs.offset_scaling) * q[j];
    }
  }
}

template <typename T>
void latent_gradient_rows(const Heads<T>& heads, const HeadsBackwardArgs<T>& args, int64_t begin, int64_t end) {
  const HeadsPlan& plan = heads.plan;
  const auto& s = heads.scratch;
  const HeadsShape& shape = plan.shape;
  const int64_t rank = shape.rank, latents = shape.latents();
  const bool masked = plan.masks_latents();
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t p = 0; p < plan.parts(); ++p) std::fill_n(s.terms[p].g.row(t), s.latent.stride, Acc<T>(0));
    for (int64_t i = 0; i < latents && args.dz_in; ++i) {
      std::copy_n(args.dz_in + (t * latents + i) * rank, rank, heads.latent(i, t));
    }
    for (int64_t i = 0; i < plan.heads(); ++i) {
      add_masked(heads.latent(latents > 1 ? i : 0, t), s.mixed.row(t) + i * rank, rank,
                 masked ? heads.mask_scale : Acc<T>(1), masked ? s.keep : nullptr, t * plan.columns() + i * rank);
    }
    std::copy_n(s.mixed.row(t) + plan.columns(), shape.offset_rank, s.offset.row(t));
  }
  if (args.dx) {
    rank_add(RankAdd<T>{{nullptr, shape.in_dim}, args.dx_in, args.dx, s.terms, plan.terms()}, begin, end);
  }
}

template <typename T>
void a_gradient(const Heads<T>& heads, Acc<T>* dA, Acc<T>* dR) {
  const HeadsPlan& plan = heads.plan;
  const auto& s = heads.scratch;
  const HeadsShape& shape = plan.shape;
  const int64_t size = plan.part_rank() * shape.in_dim;
  const auto add = [&](const RankTerm<Acc<T>>& term, Acc<T>* gradient, int64_t first, int64_t last) {
    const Small<Acc<T>> w{gradient, shape.in_dim};
    outer_add(OuterAdd<T>{{nullptr, shape.in_dim}, heads.inputs.x, term.keep, term.g, term.rank, term.scale, w}, 0,
              shape.tokens, first, last);
  };
  parallel_for(0, ceil_div(shape.in_dim, kColumnBlock), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumnBlock, last = std::min(end * kColumnBlock, shape.in_dim);
    clear_columns(Small<Acc<T>>{dA, shape.in_dim}, plan.part_matrices() * plan.part_rank(), first, last);
    for (int64_t p = 0; p < plan.parts(); ++p) add(s.terms[p], dA + (shape.own_A ? p * size : 0), first, last);
    if (!plan.routed) return;
    clear_columns(Small<Acc<T>>{dR, shape.in_dim}, plan.groups * shape.heads, first, last);
    add(s.terms[plan.terms() - 1], dR, first, last);
  });
}

template <typename T>
void b_gradient(const Heads<T>& heads, const T* dy, const Acc<T>* w, Acc<T>* dB) {
  const HeadsPlan& plan = heads.plan;
  const auto& s = heads.scratch;
  const int64_t tokens = plan.shape.tokens, out_dim = plan.shape.out_dim;
  const int64_t rank = plan.shape.rank, count = plan.shape.heads;
  const int64_t outputs = plan.outputs(), blocks = ceil_div(outputs, kColumnBlock);
  parallel_for(0, plan.groups * blocks, 1,
               [&, &plan = plan, &s = s, rank = rank, out_dim = out_dim, count = count](int64_t begin, int64_t end) {
                 for (int64_t block = begin; block < end; ++block) {
                   const int64_t group = block / blocks, first = block % blocks * kColumnBlock;
                   const int64_t last = std::min(first + kColumnBlock, outputs);
                   const Small<Acc<T>> dbt{s.dbt.row(group * plan.columns()), s.dbt.stride};
                   const HeadFactors<Acc<T>> v{w ? w + group * count : nullptr, plan.groups * count};
                   clear_columns(dbt, plan.columns(), first, last);
                   outer_add(OuterAdd<T>{{nullptr, outputs, out_dim},
                                         dy + group * outputs,
                                         {},
                                         s.u,
                                         plan.columns(),
                                         Acc<T>(heads.inputs.scaling),
                                         dbt,
                                         v,
                                         rank},
                             0, tokens, first, last);
                   for (int64_t i = 0; i < count; ++i) {
                     const int64_t row = plan.summed() ? 0 : i * rank;
                     for (int64_t c = first; c < last; ++c) {
                       Acc<T>* target = dB + (i * out_dim + group * outputs + c) * rank;
                       for (int64_t d = 0; d < rank; ++d) target[d] = dbt.row(row + d)[c];
                     }
                   }
                 }
               });
}

#define ALIGN_INSTANTIATE(T)                                                                                    \
  template struct Heads<T>;                                                                                     \
  template Heads<T> make_heads(const HeadsPlan&, const HeadsInputs<T>&, const T*, void*);                       \
  template void shrink_rows(const Heads<T>&, Acc<T>*, int64_t, int64_t);                                        \
  template void head_rows(const Heads<T>&, const Acc<T>*, int64_t, int64_t);                                    \
  template void expand_rows(const Heads<T>&, const HeadsForwardArgs<T>&, int64_t, HeadFactors<Acc<T>>, int64_t, \
                            int64_t);                                                                           \
  template void pull_rows(const Heads<T>&, const T*, int64_t, HeadFactors<Acc<T>>, int64_t, int64_t);           \
  template void latent_gradient_rows(const Heads<T>&, const HeadsBackwardArgs<T>&, int64_t, int64_t);           \
  template void a_gradient(const Heads<T>&, Acc<T>*, Acc<T>*);                                                  \
  template void b_gradient(const Heads<T>&, const T*, const Acc<T>*, Acc<T>*);
ALIGN_INSTANTIATE(float)
ALIGN_INSTANTIATE(double)
ALIGN_INSTANTIATE(bfloat16)
ALIGN_INSTANTIATE(float16)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
