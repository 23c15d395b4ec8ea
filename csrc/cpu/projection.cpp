#include "cpu/projection.h"

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/operands.h"

namespace align::cpu {
namespace {

int64_t padded(int64_t rank) { return round_up(rank, kRankAlign); }

int64_t a_rows(const ProjectionPlan& plan) { return plan.a_row(plan.terms()); }

// ---- Workspace: the packed adapters, then as many pieces of scratch as there are chunks

// A workspace is measured for an accumulation type: that of float has room for the tiles of bfloat16.
template <typename A>
bool has_tiles() {
  return std::is_same_v<A, float> && unit_for<bfloat16>() != Bf16Unit::kNone;
}

template <typename T>
void carve_operands(Arena& arena, PackedProjection<T>& projection) {
  const ProjectionPlan& plan = projection.plan;
  projection.a = arena.allocate_rows<Acc<T>>(a_rows(plan), round_up(plan.shape.in_dim, kColumnAlign));
  Arena of_b = arena;
  projection.bt =
      arena.allocate_rows<Acc<T>>(plan.groups * padded(plan.combined()), round_up(plan.outputs(), kColumnAlign));
  if (plan.backward && plan.many_ranks()) {
    projection.b = of_b.allocate_rows<Acc<T>>(plan.shape.out_dim, round_up(plan.combined(), kColumnAlign));
    arena.extend(of_b);
  }
  if (has_tiles<Acc<T>>()) {
    projection.a_tiles = arena.allocate<bfloat16>(plan.a_tile(plan.terms()));
    projection.bt_tiles = arena.allocate<bfloat16>(plan.bt_tile(plan.groups));
  }
}

template <typename A>
ChunkScratch<A> carve_chunk(Arena& arena, const ProjectionPlan& plan) {
  const auto of_block = [&](int64_t rank) { return arena.allocate_rows<A>(kRowBlock, round_up(rank, kColumnAlign)); };
  ChunkScratch<A> s;
  if (plan.dropout) s.mask_bits = arena.allocate<uint8_t>(kRowBlock * DropoutBits::bytes(plan.shape.mask_elements()));
  for (int64_t k = 0; k < plan.terms(); ++k) s.g.push_back(of_block(plan.rank(k)));
  s.u = of_block(plan.columns());
  s.combined = of_block(plan.combined());
  if (has_tiles<A>()) {
    int64_t of_terms = 0;
    for (int64_t k = 0; k < plan.terms(); ++k) of_terms += factor_tiles(plan.rank(k));
    s.factors = arena.allocate<bfloat16>(std::max(of_terms, factor_tiles(plan.combined())));
  }
  if (!plan.backward) return s;
  s.q = of_block(plan.combined());
  s.weighted = of_block(plan.routed ? plan.columns() : 0);
  s.da = arena.allocate_rows<A>(a_rows(plan), round_up(plan.shape.in_dim, kColumnAlign));
  s.dbt = arena.allocate_rows<A>(plan.groups * plan.columns(), round_up(plan.outputs(), kColumnAlign));
  return s;
}

template <typename A>
int64_t chunk_bytes(const ProjectionPlan& plan) {
  Arena arena(nullptr);
  carve_chunk<A>(arena, plan);
  return arena.bytes();
}

// ---- Packing

// Packs columns [first, last) of a, and of bt or, where dot_outer takes it, as many rows of b.
template <typename T, typename TA>
void pack_columns(const PackedProjection<T>& projection, const HeadsInputs<T, TA>& in, const TA* R, int64_t first,
                  int64_t last) {
  const ProjectionPlan& plan = projection.plan;
  const auto& [tokens, in_dim, out_dim, rank, count, offset_rank, A_per_head, site] = plan.shape;
  const auto add_a = [&](const TA* data, int64_t rows, const TermColumn& at) {
    const RowMajor<Acc<T>> target{projection.a.row(plan.a_row(at.term) + at.column), projection.a.stride};
    add_columns<T>(Operand<TA>{data, rows, in_dim}, target, 0, rows, first, last);
  };
  clear_columns(projection.a, a_rows(plan), first, last);
  const int64_t matrices = A_per_head ? plan.shape.heads : 1;
  for (int64_t i = 0; i < matrices; ++i) add_a(in.A + i * rank * in_dim, rank, plan.latent(i));
  if (plan.routed) add_a(R, plan.logits(), plan.router());
  if (offset_rank > 0) add_a(in.A0, offset_rank, plan.offset());

  const int64_t outputs = plan.outputs();
  const bool by_rows = projection.packs_b();
  if (!by_rows) clear_columns(projection.bt, plan.groups * padded(plan.combined()), first, last);
  for (int64_t g = 0; g < plan.groups; ++g) {
    const RowMajor<Acc<T>> b = by_rows ? projection.b_of(g) : RowMajor<Acc<T>>{}, bt = projection.bt_of(g);
    if (by_rows) std::fill(b.row(std::min(first, outputs)), b.row(std::min(last, outputs)), Acc<T>(0));
    const auto add_b = [&](const TA* data, int64_t ranks, int64_t column) {
      const Operand<TA> operand{data + g * outputs * ranks, outputs, ranks};
      if (by_rows) {
        add_columns<T>(operand, {b.data + column, b.stride}, first, last, 0, ranks);
      } else {
        add_transpose<T>(operand, {bt.row(column), bt.stride}, first, last);
      }
    };
    for (int64_t i = 0; i < count; ++i) add_b(in.B + i * out_dim * rank, rank, plan.summed() ? 0 : i * rank);
    if (offset_rank > 0) add_b(in.B0, offset_rank, plan.columns());
  }
}

// Packs columns [first, last) of the tiles, after pack_columns.
template <typename T>
void pack_tiles(const PackedProjection<T>& projection, int64_t first, int64_t last) {
  const ProjectionPlan& plan = projection.plan;
  const auto pack = [&](const RowMajor<const float>& matrix, int64_t rank, int64_t columns, bool dot, bfloat16* tiles) {
    if (dot) return pack_dot_tiles(matrix, rank, columns, first, std::min(last, columns), tiles);
    pack_add_tiles(matrix, rank, first, std::min(last, columns), tiles);
  };
  for (int64_t k = 0; k < plan.terms(); ++k) {
    if (plan.shares_a(k)) continue;
    const RowMajor<const float> a{projection.a.row(plan.a_row(k)), projection.a.stride};
    pack(a, plan.rank(k), plan.shape.in_dim, !plan.backward, projection.a_tiles + plan.a_tile(k));
  }
  for (int64_t g = 0; g < plan.groups; ++g) {
    pack(projection.bt_of(g), plan.combined(), plan.outputs(), plan.backward, projection.bt_tiles + plan.bt_tile(g));
  }
}

template <typename T>
ChunkScratch<Acc<T>> scratch_of(const PackedProjection<T>& projection, int64_t number) {
  Arena arena(projection.chunks + number * chunk_bytes<Acc<T>>(projection.plan));
  return carve_chunk<Acc<T>>(arena, projection.plan);
}

}  // namespace

// ---- Plan

int64_t ProjectionPlan::terms() const {
  return z_terms() + (mask_per_head() ? logits() + shape.offset_rank > 0 : offset_masked() && routed);
}

TermColumn ProjectionPlan::router() const {
  if (mask_per_head()) return {z_terms(), 0};
  return offset_masked() ? TermColumn{1, 0} : TermColumn{0, z_term_rank()};
}

TermColumn ProjectionPlan::offset() const {
  if (mask_per_head()) return {z_terms(), logits()};
  return {0, z_term_rank() + (offset_masked() ? 0 : logits())};
}

int64_t ProjectionPlan::rank(int64_t term) const {
  return (makes_z(term) ? z_term_rank() : 0) + (term == router().term ? logits() : 0) +
         (term == offset().term ? shape.offset_rank : 0);
}

// Where a term begins, if each term k before it takes size(k); terms with the same A take it once.
template <typename Size>
static int64_t begin_of(const ProjectionPlan& plan, int64_t term, const Size& size) {
  int64_t begin = 0;
  for (int64_t k = 0; k < term; ++k) begin += plan.shares_a(k + 1) ? 0 : size(k);
  return begin;
}

int64_t ProjectionPlan::a_row(int64_t term) const {
  return begin_of(*this, term, [&](int64_t k) { return padded(rank(k)); });
}

int64_t ProjectionPlan::a_tile(int64_t term) const {
  return begin_of(*this, term, [&](int64_t k) {
    return backward ? add_tiles(rank(k), shape.in_dim) : dot_tiles(rank(k), shape.in_dim);
  });
}

int64_t ProjectionPlan::bt_tile(int64_t group) const {
  return group * (backward ? dot_tiles(combined(), outputs()) : add_tiles(combined(), outputs()));
}

int64_t projection_workspace(const ProjectionPlan& plan, int64_t tokens, int64_t acc_bytes) {
  const auto bytes = [&](auto zero) {
    using A = decltype(zero);
    PackedProjection<A> projection{.plan = plan};
    Arena arena(nullptr);
    carve_operands(arena, projection);
    return arena.bytes() + Chunks::most(tokens, plan) * chunk_bytes<A>(plan);
  };
  return acc_bytes == sizeof(double) ? bytes(0.0) : bytes(0.0f);
}

template <typename T, typename TA>
PackedProjection<T> pack_projection(const ProjectionPlan& plan, const HeadsInputs<T, TA>& inputs, const TA* R,
                                    const RowBlock& rows, void* workspace) {
  using A = Acc<T>;
  PackedProjection<T> projection{.plan = plan,
                                 .x = inputs.x,
                                 .scaling = A(inputs.scaling),
                                 .offset_scaling = A(inputs.offset_scaling),
                                 .rows = rows};
  Arena arena(workspace);
  carve_operands(arena, projection);
  projection.chunks = static_cast<char*>(workspace) + arena.bytes();
  if (plan.dropout) {
    const uint32_t threshold = dropout_threshold(inputs.dropout.p);
    projection.dropout = inputs.dropout;
    projection.masks = DropoutBits(inputs.dropout.rng[0], inputs.dropout.rng[1], threshold);
    projection.mask_scale = A(dropout_scale(threshold));
  }
  parallel_for(0, ceil_div(std::max(projection.a.stride, projection.bt.stride), kPackColumns), 2,
               [&](int64_t begin, int64_t end) {
                 pack_columns(projection, inputs, R, begin * kPackColumns, end * kPackColumns);
                 if constexpr (kForUnits<T>) {
                   if (projection.has_unit()) pack_tiles(projection, begin * kPackColumns, end * kPackColumns);
                 }
               });
  return projection;
}

// ---- Chunks

template <typename T>
MaskBits PackedProjection<T>::mask_bits(const uint8_t* bytes) const {
  const int64_t elements = plan.shape.mask_elements();
  return {.bytes = bytes,
          .row_bytes = DropoutBits::bytes(elements),
          .row_elements = elements,
          .row_numbers = dropout.row_numbers > 0 ? dropout.row_numbers : elements,
          .first_number = dropout.first};
}

template <typename T>
ProjectionBlock<T> begin_blocks(const PackedProjection<T>& projection, int64_t scratch) {
  const ProjectionPlan& plan = projection.plan;
  ProjectionBlock<T> block{projection, plan, scratch_of(projection, scratch), {}, projection.rows, false};
  const ChunkScratch<Acc<T>>& s = block.scratch;
  for (int64_t k = 0; k < plan.terms(); ++k) {
    const bool masked = plan.masks_inputs() && plan.makes_z(k);
    MaskBits mask = projection.mask_bits(masked ? s.mask_bits : nullptr);
    mask.first = k * plan.shape.in_dim;
    const RowMajor<Acc<T>> a{projection.a.row(plan.a_row(k)), projection.a.stride};
    const bfloat16* tiles = projection.has_unit() ? projection.a_tiles + plan.a_tile(k) : nullptr;
    block.terms.push_back({.mask = mask,
                           .g = s.g[k],
                           .b = a,
                           .rank = plan.rank(k),
                           .scale = masked ? projection.mask_scale : 1,
                           .tiles = tiles});
  }
  return block;
}

template <typename T>
void begin_chunk(ProjectionBlock<T>& block, int64_t chunk) {
  const ChunkScratch<Acc<T>> of_chunk = scratch_of(block.projection, chunk);
  block.scratch.da = of_chunk.da;
  block.scratch.dbt = of_chunk.dbt;
}

template <typename T>
void begin_block(ProjectionBlock<T>& block, int64_t first, int64_t count, bool first_of_chunk) {
  const RowBlock& all = block.projection.rows;
  block.first_of_chunk = first_of_chunk;
  block.rows = {all.order, all.first + first, count, all.end};
  if (!block.plan.dropout) return;
  const int64_t elements = block.plan.shape.mask_elements();
  uint8_t* const bytes = block.scratch.mask_bits;
  const DropoutBits& masks = block.projection.masks;
  const MaskBits bits = block.projection.mask_bits(bytes);
  if (!bits.one_by_one(all)) return masks.draw(bits.number(block.rows.first), count * elements, bytes);
  for (int64_t i = 0; i < count; ++i) {
    masks.draw(bits.number(block.rows.row(i)), elements, bytes + i * bits.row_bytes);
  }
}

// ---- The end of a backward pass

template <typename T>
void finish_gradients(const PackedProjection<T>& projection, Acc<T>* dA, Acc<T>* dB, Acc<T>* dR) {
  using A = Acc<T>;
  constexpr int64_t kColumns = 8 * kColumnAlign;
  const ProjectionPlan& plan = projection.plan;
  const int64_t rank = plan.shape.rank, in_dim = plan.shape.in_dim, out_dim = plan.shape.out_dim;
  const int64_t outputs = plan.outputs();
  std::vector<ChunkScratch<A>> chunks;
  for (int64_t k = 0; k < Chunks(projection.rows.count, plan).count; ++k) chunks.push_back(scratch_of(projection, k));

  // target = scale times the sum over all chunks of some rows of one of their matrices, from a row and column on.
  const auto add_chunks = [&](A scale, auto matrix, int64_t row, int64_t first, int64_t rows, int64_t columns,
                              const RowMajor<A>& target) {
    RowMajor<const A> partials[Chunks::kMost];
    for (size_t k = 0; k < chunks.size(); ++k) {
      const RowMajor<A>& of_chunk = chunks[k].*matrix;
      partials[k] = {of_chunk.row(row) + first, of_chunk.stride};
    }
    for (int64_t j = 0; chunks.empty() && j < rows; ++j) std::fill_n(target.row(j), columns, A(0));
    if (!chunks.empty()) add_up<A>(partials, int64_t(chunks.size()), scale, rows, columns, target);
  };
  const auto add_a = [&](const TermColumn& at, int64_t rows, A scale, A* target, int64_t first) {
    add_chunks(scale, &ChunkScratch<A>::da, plan.a_row(at.term) + at.column, first, rows,
               std::min(kColumns, in_dim - first), {target + first, in_dim});
  };
  const auto add_b = [&](int64_t group, int64_t first) {
    const int64_t columns = std::min(kColumns, outputs - first);
    std::vector<A> dbt(rank * columns);
    for (int64_t h = 0; h < plan.shape.heads; ++h) {
      add_chunks(projection.scaling, &ChunkScratch<A>::dbt, group * plan.columns() + (plan.summed() ? 0 : h * rank),
                 first, rank, columns, {dbt.data(), columns});
      const RowMajor<A> target{dB + (h * out_dim + group * outputs + first) * rank, rank};
      std::fill_n(target.data, columns * rank, A(0));
      add_transpose<A>(Operand<A>{dbt.data(), rank, columns}, target, 0, rank);
    }
  };
  const A mask_scale = plan.masks_inputs() ? projection.mask_scale : A(1);
  const int64_t a_blocks = ceil_div(in_dim, kColumns), b_blocks = ceil_div(outputs, kColumns);
  parallel_for(0, a_blocks + plan.groups * b_blocks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      if (block >= a_blocks) {
        add_b((block - a_blocks) / b_blocks, (block - a_blocks) % b_blocks * kColumns);
        continue;
      }
      for (int64_t i = 0; i < (plan.shape.A_per_head ? plan.shape.heads : 1); ++i) {
        add_a(plan.latent(i), rank, mask_scale, dA + i * rank * in_dim, block * kColumns);
      }
      if (plan.routed) add_a(plan.router(), plan.logits(), 1, dR, block * kColumns);
    }
  });
}

#define ALIGN_INSTANTIATE(T)                                                     \
  template MaskBits PackedProjection<T>::mask_bits(const uint8_t*) const;        \
  template ProjectionBlock<T> begin_blocks(const PackedProjection<T>&, int64_t); \
  template void begin_chunk(ProjectionBlock<T>&, int64_t);                       \
  template void begin_block(ProjectionBlock<T>&, int64_t, int64_t, bool);        \
  template void finish_gradients(const PackedProjection<T>&, Acc<T>*, Acc<T>*, Acc<T>*);
ALIGN_FOR_CPU_TYPES(ALIGN_INSTANTIATE)
#undef ALIGN_INSTANTIATE

#define ALIGN_INSTANTIATE(T, TA)                                                                            \
  template PackedProjection<T> pack_projection(const ProjectionPlan&, const HeadsInputs<T, TA>&, const TA*, \
                                               const RowBlock&, void*);
ALIGN_FOR_CPU_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cpu
