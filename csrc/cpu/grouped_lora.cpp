// Forward: dropout bits, then per group one region over blocks of rows that shrinks and expands a block while it is
// in cache. Backward: per group one region over blocks of rows (dz, then dx) and one over blocks of columns (dA, dB),
// where every sum over rows stays in one thread. No result depends on how the regions are cut.
#include "ops/grouped_lora.h"

#include <algorithm>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/dropout.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"
#include "cpu/skinny.h"

namespace align::cpu {
namespace {

template <typename A>
struct Scratch {
  uint8_t* keep = nullptr;  // dropout bits
  Small<A> a;               // A of one group      [rank padded, in_dim]
  Small<A> bt;              // B^T of one group    [rank, out_dim]
  Small<A> latent;          // z or dz, group order [tokens, rank padded]
  Small<A> z;               // backward: z, group order [tokens, rank padded]
  Small<A> dbt;             // backward: dB^T of one group [rank, out_dim]
};

template <typename A>
Scratch<A> carve(Arena& arena, const GroupedLoraShape& shape, bool dropout, bool backward) {
  const int64_t rank = round_up(shape.rank, kRankAlign);
  const auto matrix = [&](int64_t rows, int64_t columns) { return arena.take_small<A>(rows, columns); };
  Scratch<A> s;
  if (dropout) s.keep = arena.take<uint8_t>(dropout_bits_bytes(shape.tokens * shape.in_dim));
  s.a = matrix(rank, round_up(shape.in_dim, kColumnAlign));
  s.bt = matrix(rank, round_up(shape.out_dim, kColumnAlign));
  s.latent = matrix(shape.tokens, rank);
  if (backward) {
    s.z = matrix(shape.tokens, rank);
    s.dbt = matrix(rank, round_up(shape.out_dim, kColumnAlign));
  }
  return s;
}

int64_t workspace_bytes(const GroupedLoraShape& shape, bool dropout, bool backward) {
  Arena arena(nullptr);
  carve<double>(arena, shape, dropout, backward);  // the widest accumulator
  return arena.bytes();
}

template <typename T>
void prepare_group(const GroupedLoraShape& shape, const T* A, const T* B, const Scratch<Acc<T>>& s, int64_t k) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = shape;
  const Operand<T> a{A + k * rank * in_dim, rank, in_dim, in_dim, 1};
  const Operand<T> bt{B + k * out_dim * rank, rank, out_dim, 1, rank};
  const int64_t padded = round_up(rank, kRankAlign);
  parallel_for(0, ceil_div(std::max(s.a.stride, s.bt.stride), kPrepareColumns), 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPrepareColumns, last = end * kPrepareColumns;
    clear_columns(s.a, padded, first, last);
    clear_columns(s.bt, padded, first, last);
    add_columns(a, s.a, first, last);
    add_columns(bt, s.bt, first, last);
  });
}

// ---- Forward

template <typename T>
struct ForwardJob {
  const GroupedLoraForwardArgs<T>& args;
  const Scratch<Acc<T>>& scratch;
  Acc<T> dropout_scale;
  int64_t begin, end;  // rows of the group
};

template <typename T>
void forward_rows(const ForwardJob<T>& job, int64_t first_block, int64_t last_block) {
  const auto& args = job.args;
  const auto& s = job.scratch;
  const int64_t rank = args.shape.rank;
  const RowOrder x{args.row_groups.rows, args.shape.in_dim};
  const RowOrder y{args.row_groups.rows, args.shape.out_dim};
  const RowOrder z{args.row_groups.rows, rank};
  const RowsDot<T> shrink{x, args.x, {s.keep}, s.a, s.latent};
  const RankTerm<Acc<T>> low_rank{{}, s.latent, s.bt, rank, Acc<T>(args.scaling)};
  const RankAdd<T> expand{y, args.y_in, args.y, &low_rank, 1, args.bias};
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = job.begin + block * kRowBlock, end = std::min(begin + kRowBlock, job.end);
    rows_dot(shrink, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      Acc<T>* latent = s.latent.row(i);
      Acc<T>* saved = args.z + z.first_element(i);
      for (int64_t j = 0; j < rank; ++j) saved[j] = latent[j] *= job.dropout_scale;
    }
    rank_add(expand, begin, end);
  }
}

// ---- Backward

template <typename T>
struct BackwardJob {
  const GroupedLoraBackwardArgs<T>& args;
  const Scratch<Acc<T>>& scratch;
  Acc<T> dropout_scale;
  int64_t begin, end;  // rows of the group
  Acc<T>* dA;          // of the group
  Acc<T>* dB;
};

// dz and a copy of z, both in group order; then dx.
template <typename T>
void backward_rows(const BackwardJob<T>& job, int64_t first_block, int64_t last_block) {
  const auto& args = job.args;
  const auto& s = job.scratch;
  const int64_t rank = args.shape.rank;
  const RowOrder y{args.row_groups.rows, args.shape.out_dim};
  const RowOrder x{args.row_groups.rows, args.shape.in_dim};
  const RowOrder z{args.row_groups.rows, rank};
  const RowsDot<T> shrink{y, args.dy, {}, s.bt, s.latent};
  const RankTerm<Acc<T>> low_rank{{s.keep}, s.latent, s.a, rank, job.dropout_scale};
  const RankAdd<T> expand{x, args.dx_in, args.dx, &low_rank, 1};
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = job.begin + block * kRowBlock, end = std::min(begin + kRowBlock, job.end);
    rows_dot(shrink, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = z.first_element(i);
      Acc<T>* dz = s.latent.row(i);
      for (int64_t j = 0; j < rank; ++j) dz[j] *= Acc<T>(args.scaling);
      for (int64_t j = 0; j < rank && args.dz_in; ++j) dz[j] += args.dz_in[e + j];
      std::copy_n(args.z + e, rank, s.z.row(i));
      std::fill(s.z.row(i) + rank, s.z.row(i + 1), Acc<T>(0));
    }
    if (args.dx) rank_add(expand, begin, end);
  }
}

// Columns [first, last) of op.w = scale g^T x over the rows of the group.
template <typename T>
void outer(const BackwardJob<T>& job, const OuterAdd<T>& op, int64_t first, int64_t last) {
  for (int64_t j = 0; j < op.rank; ++j) std::fill(op.w.row(j) + first, op.w.row(j) + last, Acc<T>(0));
  outer_add(op, job.begin, job.end, first, last);
}

// dA of blocks [first_block, last_block) of 64 columns.
template <typename T>
void backward_a(const BackwardJob<T>& job, int64_t first_block, int64_t last_block) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = job.args.shape;
  const auto& s = job.scratch;
  const RowOrder x{job.args.row_groups.rows, in_dim};
  const OuterAdd<T> op{x, job.args.x, {s.keep}, s.latent, rank, job.dropout_scale, {job.dA, in_dim}};
  outer(job, op, first_block * kColumnBlock, std::min(last_block * kColumnBlock, in_dim));
}

// dB of blocks [first_block, last_block) of 64 output columns, by way of its transpose.
template <typename T>
void backward_b(const BackwardJob<T>& job, int64_t first_block, int64_t last_block) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = job.args.shape;
  const auto& s = job.scratch;
  const RowOrder y{job.args.row_groups.rows, out_dim};
  const OuterAdd<T> op{y, job.args.dy, {}, s.z, rank, Acc<T>(job.args.scaling), s.dbt};
  const int64_t first = first_block * kColumnBlock, last = std::min(last_block * kColumnBlock, out_dim);
  outer(job, op, first, last);
  for (int64_t c = first; c < last; ++c) {
    for (int64_t j = 0; j < rank; ++j) job.dB[c * rank + j] = s.dbt.row(j)[c];
  }
}

}  // namespace

int64_t grouped_lora_forward_workspace(const GroupedLoraShape& shape, bool dropout) {
  return workspace_bytes(shape, dropout, /*backward=*/false);
}

int64_t grouped_lora_backward_workspace(const GroupedLoraShape& shape, bool dropout) {
  return workspace_bytes(shape, dropout, /*backward=*/true);
}

template <typename T>
void grouped_lora_forward(const GroupedLoraForwardArgs<T>& args) {
  const GroupedLoraShape& shape = args.shape;
  Arena arena(args.workspace);
  const auto scratch = carve<Acc<T>>(arena, shape, args.dropout.p > 0, /*backward=*/false);
  const auto scale = Acc<T>(draw_dropout(args.dropout.p, args.dropout.rng, shape.tokens * shape.in_dim, scratch.keep));
  for (int64_t k = 0; k < shape.groups; ++k) {
    const ForwardJob<T> job{args, scratch, scale, args.row_groups.offsets[k], args.row_groups.offsets[k + 1]};
    if (job.begin == job.end) continue;
    prepare_group(shape, args.A, args.B, scratch, k);
    parallel_for(0, ceil_div(job.end - job.begin, kRowBlock), 1,
                 [&job](int64_t begin, int64_t end) { forward_rows(job, begin, end); });
  }
}

template <typename T>
void grouped_lora_backward(const GroupedLoraBackwardArgs<T>& args) {
  const GroupedLoraShape& shape = args.shape;
  Arena arena(args.workspace);
  const auto scratch = carve<Acc<T>>(arena, shape, args.dropout.p > 0, /*backward=*/true);
  const auto scale = Acc<T>(draw_dropout(args.dropout.p, args.dropout.rng, shape.tokens * shape.in_dim, scratch.keep));
  for (int64_t k = 0; k < shape.groups; ++k) {
    const BackwardJob<T> job{args,
                             scratch,
                             scale,
                             args.row_groups.offsets[k],
                             args.row_groups.offsets[k + 1],
                             args.dA + k * shape.rank * shape.in_dim,
                             args.dB + k * shape.out_dim * shape.rank};
    if (job.begin < job.end) prepare_group(shape, args.A, args.B, scratch, k);
    parallel_for(0, ceil_div(job.end - job.begin, kRowBlock), 1,
                 [&job](int64_t begin, int64_t end) { backward_rows(job, begin, end); });
    parallel_for(0, ceil_div(shape.in_dim, kColumnBlock), 1,
                 [&job](int64_t begin, int64_t end) { backward_a(job, begin, end); });
    parallel_for(0, ceil_div(shape.out_dim, kColumnBlock), 1,
                 [&job](int64_t begin, int64_t end) { backward_b(job, begin, end); });
  }
}

void group_rows(const int64_t* group, int64_t tokens, int64_t groups, int64_t* rows, int64_t* offsets) {
  std::fill_n(offsets, groups + 1, int64_t(0));
  for (int64_t t = 0; t < tokens; ++t) ++offsets[group[t] + 1];
  for (int64_t k = 0; k < groups; ++k) offsets[k + 1] += offsets[k];
  for (int64_t t = 0; t < tokens; ++t) rows[offsets[group[t]]++] = t;
  // Filling moved every offset to the end of its group, the beginning of the next.
  for (int64_t k = groups; k > 0; --k) offsets[k] = offsets[k - 1];
  offsets[0] = 0;
}

#define ALIGN_INSTANTIATE(T)                                               \
  template void grouped_lora_forward<T>(const GroupedLoraForwardArgs<T>&); \
  template void grouped_lora_backward<T>(const GroupedLoraBackwardArgs<T>&);
ALIGN_INSTANTIATE(float)
ALIGN_INSTANTIATE(double)
ALIGN_INSTANTIATE(bfloat16)
ALIGN_INSTANTIATE(float16)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
