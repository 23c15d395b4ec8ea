// The steps of a projection (ops/heads.h), from which grouped_lora, dropout_sum and routed_lora are made. grouped_lora
// is a projection with one head for the rows of each group.
//
// Rows are processed in blocks. All steps of a block run one after the other while it is in cache, so that x, y and dy
// are read from memory once. Blocks belong to chunks of rows, which depend on the shapes alone. In the backward pass
// each chunk has its own sums for dA, dB and dR, which are added in the order of the chunks at the end, so that no
// result depends on how threads share the chunks.
//
// u holds the u_i of all heads side by side, so that all heads are one product. With routing each group of outputs has
// a weight w[t,i] for each head. Without routing there is one group, all weights are 1, and if all u_i are the same z
// the matrices B_i are summed first. In the same way the latents, the logits of the router and the offset path lie side
// by side: those that see the same mask form one term, a product of x with A, R and A0 one below the other.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <vector>

#include "cpu/bf16/units.h"
#include "cpu/dropout.h"
#include "cpu/parallel.h"
#include "cpu/skinny.h"
#include "ops/heads.h"

namespace align::cpu {

// A column of a term.
struct TermColumn {
  int64_t term, column;
};

// The kind of a projection, and the sizes that follow from it.
struct ProjectionPlan {
  HeadsShape shape;
  bool dropout;
  bool backward;
  bool routed;
  int64_t groups;  // groups of outputs; 1 without routing

  bool masks_latents() const { return dropout && shape.site == DropoutSite::kLatent; }
  bool summed() const { return !routed && shape.latents() == 1 && !masks_latents(); }
  int64_t outputs() const { return shape.out_dim / groups; }  // outputs of a group
  int64_t heads() const { return summed() ? 1 : shape.heads; }
  int64_t columns() const { return heads() * shape.rank; }            // columns of u
  int64_t combined() const { return columns() + shape.offset_rank; }  // columns of u and the offset path
  bool many_ranks() const { return combined() > kRankAlign; }         // then dot_outer is faster on vectors
  int64_t logits() const { return routed ? groups * shape.heads : 0; }

  // The terms that make z: one, or one for each mask.
  bool mask_per_head() const { return shape.site == DropoutSite::kInputPerHead; }
  int64_t z_terms() const { return mask_per_head() ? shape.heads : 1; }
  int64_t z_term_rank() const { return shape.latents() / z_terms() * shape.rank; }

  // A term holds, side by side, those latents, logits and latents of the offset path that see the same mask.
  bool masks_inputs() const { return dropout && (mask_per_head() || shape.site == DropoutSite::kInput); }
  bool offset_masked() const { return masks_inputs() && !mask_per_head(); }
  bool makes_z(int64_t term) const { return term < z_terms(); }
  // Whether a term has the same A as the term before it.
  bool shares_a(int64_t term) const { return term > 0 && makes_z(term) && !shape.A_per_head; }
  int64_t terms() const;
  int64_t rank(int64_t term) const;
  int64_t trained_rank(int64_t term) const { return rank(term) - (term == offset().term ? shape.offset_rank : 0); }
  int64_t a_row(int64_t term) const;   // the first row of a term in the operand a
  int64_t a_tile(int64_t term) const;  // the first tile of a term
  int64_t bt_tile(int64_t group) const;
  TermColumn latent(int64_t i) const { return mask_per_head() ? TermColumn{i, 0} : TermColumn{0, i * shape.rank}; }
  TermColumn router() const;
  TermColumn offset() const;

  // The least number of rows of a chunk, roughly. In the backward pass the sums of dB should be much smaller than the
  // rows of dy of the chunk.
  int64_t chunk_rows() const { return backward ? std::max(4 * kRowBlock, 6 * combined()) : kRowBlock; }
};

// The bytes of a workspace for at most `tokens` rows and an accumulation type of acc_bytes.
int64_t projection_workspace(const ProjectionPlan& plan, int64_t tokens, int64_t acc_bytes);

// A projection whose adapters are packed: converted to the accumulation type and put together as the products take
// them.
template <typename T>
struct PackedProjection {
  ProjectionPlan plan;
  const T* x = nullptr;
  Acc<T> scaling = 1, offset_scaling = 1, mask_scale = 1;
  RowBlock rows = {};
  DropoutBits masks = {};
  DropoutArgs dropout = {};
  RowMajor<Acc<T>> a = {};   // [padded ranks of all terms, in_dim]: A, R and A0, term after term
  RowMajor<Acc<T>> bt = {};  // [groups * padded combined, outputs]: transposes of B and B0, group after group
  RowMajor<Acc<T>> b = {};   // in the memory of bt: [out_dim, padded combined], B and B0
  // With a bfloat16 unit the tiles of each term of a, and of bt of each group: dot tiles and add tiles in the forward
  // pass, add tiles and dot tiles in the backward pass.
  Bf16Unit unit = unit_for<T>();
  bfloat16* a_tiles = nullptr;
  bfloat16* bt_tiles = nullptr;
  char* chunks = nullptr;  // the scratch

  RowMajor<Acc<T>> bt_of(int64_t group) const {
    return {bt.row(group * round_up(plan.combined(), kRankAlign)), bt.stride};
  }
  RowMajor<Acc<T>> b_of(int64_t group) const { return {b.row(group * plan.outputs()), b.stride}; }
  MaskBits mask_bits(const uint8_t* bytes) const;  // the bits of all masks of a row
  bool has_unit() const { return unit != Bf16Unit::kNone; }
  const bfloat16* bt_tiles_of(int64_t group) const { return has_unit() ? bt_tiles + plan.bt_tile(group) : nullptr; }
  // Whether b is packed, and not bt.
  bool packs_b() const { return plan.backward && plan.many_ranks() && !has_unit(); }
  // Whether dz and dB are made in one pass over dy.
  bool dots_and_outer() const { return has_unit() || packs_b(); }
};

// The sums of a chunk of rows, and what the blocks of all chunks of a thread use one after the other.
template <typename A>
struct ChunkScratch {
  uint8_t* mask_bits = nullptr;  // the dropout bits of a block
  std::vector<RowMajor<A>> g;    // for each term [rows of a block, padded rank]: products of x, or their gradients
  RowMajor<A> u;                 // [rows of a block, padded columns]
  RowMajor<A> combined;          // [rows of a block, padded combined]: the factor of bt, or its gradient
  RowMajor<A> q;                 // backward: dy bt^T of one group, of the shape of combined
  RowMajor<A> weighted;          // backward with routing: w u of one group, of the shape of u
  bfloat16* factors = nullptr;   // bfloat16 units: left tiles of the factors in use
  RowMajor<A> da = {};           // backward: the gradient of a over the chunk, without the scale of dropout
  RowMajor<A> dbt = {};          // backward: the gradient of bt without scaling, [groups * columns, outputs]
};

// A block of rows, and the steps that process it.
template <typename T>
struct ProjectionBlock {
  using A = Acc<T>;

  const PackedProjection<T>& projection;
  const ProjectionPlan& plan;
  ChunkScratch<A> scratch;
  std::vector<RankTerm<A>> terms;
  RowBlock rows;
  bool first_of_chunk;

  A* at(const TermColumn& column, int64_t i) const { return scratch.g[column.term].row(i) + column.column; }
  bfloat16* factors_of_unit() const { return projection.has_unit() ? scratch.factors : nullptr; }

  // Forward: shrink computes z from x, make_u computes u from z, and expand computes y of one group, whose heads have
  // the weights weights.row(row)[head]; null means that all weights are 1.
  void shrink(A* z) const;
  void make_u(const A* z) const;
  void expand(int64_t group, RowMajor<const A> weights, const T* y_in, const T* bias, T* y) const;

  // Backward, after make_u: expand_backward adds one group to the gradient of combined and to dB, and leaves its q;
  // make_u_backward computes the gradients of the latents and of the offset path; shrink_backward, once the gradients
  // of the logits are in their columns, computes dx and adds to dA and dR.
  void expand_backward(const T* dy, int64_t group, RowMajor<const A> weights) const;
  void make_u_backward(const A* dz_in) const;
  void shrink_backward(const T* dx_in, T* dx) const;
};

// Packs the adapters, on all threads; R is null without routing.
template <typename T, typename TA>
PackedProjection<T> pack_projection(const ProjectionPlan& plan, const HeadsInputs<T, TA>& inputs, const TA* R,
                                    const RowBlock& rows, void* workspace);

// Adds the sums of all chunks, on all threads; dR is null without routing.
template <typename T>
void finish_gradients(const PackedProjection<T>& projection, Acc<T>* dA, Acc<T>* dB, Acc<T>* dR);

// ---- Chunks

// Cuts the rows into at most kMost chunks of whole blocks: enough chunks for many threads, and about a power of two, so
// that threads get equally many. Few rows make kFew chunks as long as the sums of a chunk are not much larger than it.
struct Chunks {
  static constexpr uint64_t kMost = 32;
  static constexpr int64_t kFew = 4;

  int64_t rows, count;  // rows of each chunk but the last, and the number of chunks

  Chunks(int64_t all, const ProjectionPlan& plan)
      : rows(std::max(kRowBlock, round_up(ceil_div(all, most(all, plan)), kRowBlock))), count(ceil_div(all, rows)) {}

  // An upper bound of the number of chunks of so many rows.
  static int64_t most(int64_t all, const ProjectionPlan& plan) {
    const int64_t few = std::min(kFew, ceil_div(all, std::max(kRowBlock, 2 * plan.combined())));
    return std::min(kMost, std::bit_ceil(uint64_t(std::max(few, ceil_div(all, plan.chunk_rows())))));
  }
};

template <typename T>
ProjectionBlock<T> begin_blocks(const PackedProjection<T>& projection, int64_t scratch);  // in the scratch of a number
template <typename T>
void begin_chunk(ProjectionBlock<T>& block, int64_t chunk);  // takes its sums
template <typename T>
void begin_block(ProjectionBlock<T>& block, int64_t first, int64_t count, bool first_of_chunk);  // draws its masks

// Calls body(block) for all blocks of rows, on all threads. Each takes the next chunk that none has taken, since
// threads that share their processor with others are not equally fast.
template <typename T, typename Body>
void for_blocks(const PackedProjection<T>& projection, const Body& body) {
  const Chunks chunks(projection.rows.count, projection.plan);
  std::atomic<int64_t> scratch = 0, next = 0;
  parallel_for(0, chunks.count, 1, [&](int64_t, int64_t) {
    ProjectionBlock<T> block = begin_blocks(projection, scratch++);
    for (int64_t chunk = next++; chunk < chunks.count; chunk = next++) {
      begin_chunk(block, chunk);
      const int64_t begin = chunk * chunks.rows, end = std::min(begin + chunks.rows, projection.rows.count);
      for (int64_t row = begin; row < end; row += kRowBlock) {
        begin_block(block, row, std::min(kRowBlock, end - row), row == begin);
        body(block);
      }
    }
  });
}

// ---- A projection without a router

template <typename T, typename TA>
void project_forward(const PackedProjection<T>& projection, const HeadsForwardArgs<T, TA>& args) {
  for_blocks(projection, [&](const ProjectionBlock<T>& block) {
    block.shrink(args.z);
    block.make_u(args.z);
    block.expand(0, {}, args.y_in, args.bias, args.y);
  });
}

template <typename T, typename TA>
void project_backward(const PackedProjection<T>& projection, const HeadsBackwardArgs<T, TA>& args) {
  for_blocks(projection, [&](const ProjectionBlock<T>& block) {
    block.make_u(args.z);
    block.expand_backward(args.dy, 0, {});
    block.make_u_backward(args.dz_in);
    block.shrink_backward(args.dx_in, args.dx);
  });
  finish_gradients<T>(projection, args.dA, args.dB, nullptr);
}

}  // namespace align::cpu
