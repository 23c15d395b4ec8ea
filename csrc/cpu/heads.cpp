#include "cpu/heads.h"

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/operands.h"

namespace align::cpu {
namespace {

int64_t padded(int64_t rank) { return round_up(rank, kRankAlign); }

int64_t a_rows(const HeadsPlan& plan) { return plan.a_row(plan.terms()); }

// ---- Workspace: the operands of all chunks, then the chunks' scratch

// Workspaces are of an accumulation type: float has room for the tiles of bfloat16.
template <typename A>
bool has_tiles() {
  return std::is_same_v<A, float> && use_amx<bfloat16>();
}

template <typename T>
void carve_operands(Arena& arena, Heads<T>& heads) {
  const HeadsPlan& plan = heads.plan;
  heads.a = arena.take_small<Acc<T>>(a_rows(plan), round_up(plan.shape.in_dim, kColumnAlign));
  heads.bt = arena.take_small<Acc<T>>(plan.groups * padded(plan.mixed()), round_up(plan.outputs(), kColumnAlign));
  if (has_tiles<Acc<T>>()) {
    heads.a_tiles = arena.take<bfloat16>(plan.a_tile(plan.terms()));
    heads.bt_tiles = arena.take<bfloat16>(plan.bt_tile(plan.groups));
  }
  if (!plan.backward || !plan.many_ranks()) return;
  heads.b = arena.take_small<Acc<T>>(plan.shape.out_dim, round_up(plan.mixed(), kColumnAlign));
}

template <typename A>
ChunkScratch<A> carve_chunk(Arena& arena, const HeadsPlan& plan) {
  const auto of_block = [&](int64_t rank) { return arena.take_small<A>(kRowBlock, round_up(rank, kColumnAlign)); };
  ChunkScratch<A> s;
  if (plan.dropout) s.keep = arena.take<uint8_t>(kRowBlock * DropoutBits::bytes(plan.mask_row()));
  for (int64_t k = 0; k < plan.terms(); ++k) s.g.push_back(of_block(plan.rank(k)));
  s.u = of_block(plan.columns());
  s.mixed = of_block(plan.mixed());
  if (has_tiles<A>()) {
    int64_t of_terms = 0;
    for (int64_t k = 0; k < plan.terms(); ++k) of_terms += factor_tiles(plan.rank(k));
    s.factors = arena.take<bfloat16>(std::max(of_terms, factor_tiles(plan.mixed())));
  }
  if (!plan.backward) return s;
  s.q = of_block(plan.mixed());
  s.weighted = of_block(plan.routed ? plan.columns() : 0);
  s.da = arena.take_small<A>(a_rows(plan), round_up(plan.shape.in_dim, kColumnAlign));
  s.dbt = arena.take_small<A>(plan.groups * plan.columns(), round_up(plan.outputs(), kColumnAlign));
  return s;
}

template <typename A>
int64_t chunk_bytes(const HeadsPlan& plan) {
  Arena arena(nullptr);
  carve_chunk<A>(arena, plan);
  return arena.bytes();
}

// ---- Operands

template <typename T>
Operand<T> rows_of(const T* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns, 1};
}
template <typename T>
Operand<T> transpose_of(const T* data, int64_t rows, int64_t columns) {
  return {data, columns, rows, 1, columns};
}

// Columns [first, last) of a and bt.
template <typename T, typename W>
void prepare_columns(const Heads<T>& heads, const HeadsInputs<T, W>& in, const W* R, int64_t first, int64_t last) {
  const HeadsPlan& plan = heads.plan;
  const auto& [tokens, in_dim, out_dim, rank, count, offset_rank, A_per_head, site] = plan.shape;
  const auto add_a = [&](const Operand<W>& operand, const Place& place) {
    add_columns<T>(operand, {heads.a.row(plan.a_row(place.term) + place.column), heads.a.stride}, first, last);
  };
  clear_columns(heads.a, a_rows(plan), first, last);
  const int64_t matrices = A_per_head ? plan.shape.heads : 1;
  for (int64_t i = 0; i < matrices; ++i) add_a(rows_of(in.A + i * rank * in_dim, rank, in_dim), plan.latent(i));
  if (plan.routed) add_a(rows_of(R, plan.logits(), in_dim), plan.router());
  if (offset_rank > 0) add_a(rows_of(in.A0, offset_rank, in_dim), plan.offset());

  const int64_t outputs = plan.outputs();
  clear_columns(heads.bt, plan.groups * padded(plan.mixed()), first, last);
  for (int64_t g = 0; g < plan.groups; ++g) {
    const Small<Acc<T>> bt = heads.bt_of(g);
    for (int64_t i = 0; i < count; ++i) {
      const W* b = in.B + (i * out_dim + g * outputs) * rank;
      add_columns<T>(transpose_of(b, outputs, rank), {bt.row(plan.summed() ? 0 : i * rank), bt.stride}, first, last);
    }
    const Operand<W> b0 = transpose_of(in.B0 + g * outputs * offset_rank, outputs, offset_rank);
    add_columns<T>(b0, {bt.row(plan.columns()), bt.stride}, first, last);
    if (!heads.b.data || heads.amx) continue;
    const Small<Acc<T>> b = heads.b_of(g);
    for (int64_t c = first; c < std::min(last, outputs); ++c) {
      for (int64_t j = 0; j < plan.mixed(); ++j) b.row(c)[j] = bt.row(j)[c];
      std::fill(b.row(c) + plan.mixed(), b.row(c + 1), Acc<T>(0));
    }
  }
}

// Columns [first, last) of the tiles, after prepare_columns.
template <typename T>
void prepare_tiles(const Heads<T>& heads, int64_t first, int64_t last) {
  const HeadsPlan& plan = heads.plan;
  const auto pack = [&](const Small<const float>& small, int64_t rank, int64_t columns, bool dot, bfloat16* tiles) {
    (dot ? pack_dot_tiles : pack_add_tiles)(small, rank, first, std::min(last, columns), tiles);
  };
  for (int64_t k = 0; k < plan.terms(); ++k) {
    if (plan.shares_a(k)) continue;
    const Small<const float> a{heads.a.row(plan.a_row(k)), heads.a.stride};
    pack(a, plan.rank(k), plan.shape.in_dim, !plan.backward, heads.a_tiles + plan.a_tile(k));
  }
  for (int64_t g = 0; g < plan.groups; ++g) {
    pack(heads.bt_of(g), plan.mixed(), plan.outputs(), plan.backward, heads.bt_tiles + plan.bt_tile(g));
  }
}

template <typename T>
ChunkScratch<Acc<T>> scratch_of(const Heads<T>& heads, int64_t chunk) {
  Arena arena(heads.chunks + chunk * chunk_bytes<Acc<T>>(heads.plan));
  return carve_chunk<Acc<T>>(arena, heads.plan);
}

}  // namespace

// ---- Plan

int64_t HeadsPlan::terms() const {
  return parts() + (apart() ? logits() + shape.offset_rank > 0 : offset_masked() && routed);
}

Place HeadsPlan::router() const {
  if (apart()) return {parts(), 0};
  return offset_masked() ? Place{1, 0} : Place{0, part_rank()};
}

Place HeadsPlan::offset() const {
  if (apart()) return {parts(), logits()};
  return {0, part_rank() + (offset_masked() ? 0 : logits())};
}

int64_t HeadsPlan::rank(int64_t term) const {
  return (is_part(term) ? part_rank() : 0) + (term == router().term ? logits() : 0) +
         (term == offset().term ? shape.offset_rank : 0);
}

// Where a term's share of a begins, if that of a term k takes size(k).
template <typename Size>
static int64_t begin_of(const HeadsPlan& plan, int64_t term, const Size& size) {
  int64_t begin = 0;
  for (int64_t k = 0; k < term; ++k) begin += plan.shares_a(k + 1) ? 0 : size(k);
  return begin;
}

int64_t HeadsPlan::a_row(int64_t term) const {
  return begin_of(*this, term, [&](int64_t k) { return padded(rank(k)); });
}

int64_t HeadsPlan::a_tile(int64_t term) const {
  return begin_of(*this, term, [&](int64_t k) {
    return backward ? add_tiles(rank(k), shape.in_dim) : dot_tiles(rank(k), shape.in_dim);
  });
}

int64_t HeadsPlan::bt_tile(int64_t group) const {
  return group * (backward ? dot_tiles(mixed(), outputs()) : add_tiles(mixed(), outputs()));
}

int64_t HeadsPlan::mask_row() const {
  switch (shape.site) {
    case DropoutSite::kNone:
      return 0;
    case DropoutSite::kInput:
      return shape.in_dim;
    case DropoutSite::kLatent:
      return shape.heads * shape.rank;
    case DropoutSite::kInputPerHead:
      return shape.heads * shape.in_dim;
  }
  return 0;
}

int64_t heads_workspace(const HeadsPlan& plan, int64_t tokens, int64_t acc_bytes) {
  const auto bytes = [&](auto zero) {
    using A = decltype(zero);
    Heads<A> heads{plan, nullptr, 1, 1, 1, {}};
    Arena arena(nullptr);
    carve_operands(arena, heads);
    return arena.bytes() + Chunks::most(tokens, plan) * chunk_bytes<A>(plan);
  };
  return acc_bytes == sizeof(double) ? bytes(0.0) : bytes(0.0f);
}

template <typename T, typename W>
Heads<T> prepare_heads(const HeadsPlan& plan, const HeadsInputs<T, W>& inputs, const W* R, const RowBlock& rows,
                       void* workspace) {
  using A = Acc<T>;
  Heads<T> heads{plan, inputs.x, A(inputs.scaling), A(inputs.offset_scaling), 1, rows};
  Arena arena(workspace);
  carve_operands(arena, heads);
  heads.chunks = static_cast<char*>(workspace) + arena.bytes();
  if (plan.dropout) {
    const uint32_t threshold = dropout_threshold(inputs.dropout.p);
    heads.masks = DropoutBits(inputs.dropout.rng[0], inputs.dropout.rng[1], threshold);
    heads.mask_scale = A(dropout_scale(threshold));
  }
  parallel_for(0, ceil_div(std::max(heads.a.stride, heads.bt.stride), kPrepareColumns), 4,
               [&](int64_t begin, int64_t end) {
                 prepare_columns(heads, inputs, R, begin * kPrepareColumns, end * kPrepareColumns);
                 if constexpr (kForAmx<T>) {
                   if (heads.amx) prepare_tiles(heads, begin * kPrepareColumns, end * kPrepareColumns);
                 }
               });
  return heads;
}

// ---- Chunks

template <typename T>
HeadsBlock<T> begin_chunk(const Heads<T>& heads, int64_t chunk) {
  const HeadsPlan& plan = heads.plan;
  HeadsBlock<T> block{heads, plan, scratch_of(heads, chunk), {}, heads.rows, false};
  const ChunkScratch<Acc<T>>& s = block.scratch;
  for (int64_t k = 0; k < plan.terms(); ++k) {
    const bool masked = plan.masks_inputs() && plan.is_part(k);
    const int64_t elements = plan.mask_row();
    const KeepBits keep{masked ? s.keep : nullptr, DropoutBits::bytes(elements), elements, k * plan.shape.in_dim};
    const Small<Acc<T>> a{heads.a.row(plan.a_row(k)), heads.a.stride};
    const bfloat16* tiles = heads.amx ? heads.a_tiles + plan.a_tile(k) : nullptr;
    block.terms.push_back({keep, s.g[k], a, plan.rank(k), masked ? heads.mask_scale : 1, tiles});
  }
  return block;
}

template <typename T>
void begin_block(HeadsBlock<T>& block, int64_t first, int64_t count, bool first_of_chunk) {
  const RowBlock& all = block.heads.rows;
  block.first_of_chunk = first_of_chunk;
  block.rows = {all.order, all.first + first, count, all.end};
  if (!block.plan.dropout) return;
  const int64_t elements = block.plan.mask_row();
  const DropoutBits& masks = block.heads.masks;
  if (!all.order) return masks.draw(block.rows.first * elements, count * elements, block.scratch.keep);
  for (int64_t i = 0; i < count; ++i) {
    masks.draw(block.rows.row(i) * elements, elements, block.scratch.keep + i * DropoutBits::bytes(elements));
  }
}

// ---- The end of a backward

template <typename T>
void finish_gradients(const Heads<T>& heads, Acc<T>* dA, Acc<T>* dB, Acc<T>* dR) {
  using A = Acc<T>;
  constexpr int64_t kColumns = 4 * kColumnAlign;
  const HeadsPlan& plan = heads.plan;
  const int64_t rank = plan.shape.rank, in_dim = plan.shape.in_dim, out_dim = plan.shape.out_dim;
  const int64_t outputs = plan.outputs();
  std::vector<ChunkScratch<A>> chunks;
  for (int64_t k = 0; k < Chunks(heads.rows.count, plan).count; ++k) chunks.push_back(scratch_of(heads, k));

  // target = scale times the sum over the chunks of a row; source(chunk) is where it begins.
  const auto add_chunks = [&](A scale, int64_t columns, A* target, const auto& source) {
    const A* parts[Chunks::kMost];
    for (size_t k = 0; k < chunks.size(); ++k) parts[k] = source(chunks[k]);
    if (chunks.empty()) return std::fill_n(target, columns, A(0)), void();
    add_up<A>(parts, int64_t(chunks.size()), scale, columns, target);
  };
  const auto add_a = [&](const Place& place, int64_t rows, A scale, A* target, int64_t first) {
    for (int64_t j = 0; j < rows; ++j) {
      const int64_t row = plan.a_row(place.term) + place.column + j;
      add_chunks(scale, std::min(kColumns, in_dim - first), target + j * in_dim + first,
                 [&](const auto& chunk) { return chunk.da.row(row) + first; });
    }
  };
  const auto add_b = [&](int64_t group, int64_t first) {
    const int64_t columns = std::min(kColumns, outputs - first);
    std::vector<A> dbt(rank * columns);
    for (int64_t h = 0; h < plan.shape.heads; ++h) {
      for (int64_t j = 0; j < rank; ++j) {
        const int64_t row = group * plan.columns() + (plan.summed() ? 0 : h * rank) + j;
        add_chunks(heads.scaling, columns, &dbt[j * columns],
                   [&](const auto& chunk) { return chunk.dbt.row(row) + first; });
      }
      A* target = dB + (h * out_dim + group * outputs + first) * rank;
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t j = 0; j < rank; ++j) *target++ = dbt[j * columns + c];
      }
    }
  };
  const A mask_scale = plan.masks_inputs() ? heads.mask_scale : A(1);
  const int64_t a_blocks = ceil_div(in_dim, kColumns), b_blocks = ceil_div(outputs, kColumns);
  parallel_for(0, a_blocks + plan.groups * b_blocks, 4, [&](int64_t begin, int64_t end) {
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

#define ALIGN_INSTANTIATE(T)                                         \
  template HeadsBlock<T> begin_chunk(const Heads<T>&, int64_t);      \
  template void begin_block(HeadsBlock<T>&, int64_t, int64_t, bool); \
  template void finish_gradients(const Heads<T>&, Acc<T>*, Acc<T>*, Acc<T>*);
ALIGN_INSTANTIATE(float)
ALIGN_INSTANTIATE(double)
ALIGN_INSTANTIATE(bfloat16)
ALIGN_INSTANTIATE(float16)
#undef ALIGN_INSTANTIATE

#define ALIGN_INSTANTIATE(T, W) \
  template Heads<T> prepare_heads(const HeadsPlan&, const HeadsInputs<T, W>&, const W*, const RowBlock&, void*);
ALIGN_EACH_TYPE_AND_ADAPTER(ALIGN_INSTANTIATE)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
