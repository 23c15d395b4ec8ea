// The steps of a projection, which grouped_lora, dropout_sum and routed_lora put together: ops/heads.h on a segment of
// rows, with grouped_lora as one head.
//
// Rows are taken in blocks, and all steps of a block run one after the other while it is in cache: x, y and dy come
// from memory once. Blocks belong to chunks of rows that depend on the shapes alone. A chunk has scratch of its own
// and, backward, sums of its own for dA, dB and dR, which are added in the order of the chunks at the end: no result
// depends on how chunks are spread over threads.
//
// u holds the u_i of all heads side by side, so that the heads are one product. A group of outputs has a factor
// v[t,i] for each head (routing); without routing there is one group, all factors are 1, and where all u_i are one z
// the heads are summed first. Likewise the latents, the offset path and the router's logits lie side by side, those
// that share a mask in one term: a product of x with A, R and A0 one below the other.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "cpu/amx/amx.h"
#include "cpu/dropout.h"
#include "cpu/parallel.h"
#include "cpu/skinny.h"
#include "ops/heads.h"

namespace align::cpu {

// A place among the terms.
struct Place {
  int64_t term, column;
};

// What is computed, and the sizes that follow.
struct HeadsPlan {
  HeadsShape shape;
  bool dropout;
  bool backward;
  bool routed;
  int64_t groups;  // of outputs; 1 without routing

  bool masks_latents() const { return dropout && shape.site == DropoutSite::kLatent; }
  bool summed() const { return !routed && shape.latents() == 1 && !masks_latents(); }
  int64_t outputs() const { return shape.out_dim / groups; }  // of a group
  int64_t heads() const { return summed() ? 1 : shape.heads; }
  int64_t columns() const { return heads() * shape.rank; }         // of u
  int64_t mixed() const { return columns() + shape.offset_rank; }  // columns of what the groups' bt multiply
  bool many_ranks() const { return mixed() > kRankAlign; }         // worth products that want B itself too
  int64_t logits() const { return routed ? groups * shape.heads : 0; }

  // Products of x that make z: one, or one per mask.
  bool apart() const { return shape.site == DropoutSite::kInputPerHead; }
  int64_t parts() const { return apart() ? shape.heads : 1; }
  int64_t part_rank() const { return shape.latents() / parts() * shape.rank; }

  // A term holds, side by side, those of a part, the logits and the offset path that share a mask.
  bool masks_inputs() const { return dropout && (apart() || shape.site == DropoutSite::kInput); }
  bool offset_masked() const { return masks_inputs() && !apart(); }
  bool is_part(int64_t term) const { return term < parts(); }
  bool shares_a(int64_t term) const { return term > 0 && is_part(term) && !shape.A_per_head; }  // with the term before it
  int64_t terms() const;
  int64_t rank(int64_t term) const;
  int64_t trained(int64_t term) const { return rank(term) - (term == offset().term ? shape.offset_rank : 0); }
  int64_t a_row(int64_t term) const;   // where the term's rows of the operand a begin
  int64_t a_tile(int64_t term) const;  // and where its tiles do
  int64_t bt_tile(int64_t group) const;
  Place latent(int64_t i) const { return apart() ? Place{i, 0} : Place{0, i * shape.rank}; }
  Place router() const;
  Place offset() const;

  int64_t mask_row() const;  // elements of all masks of a row

  // About as many rows as a chunk has at least: backward its sums of dB should be much smaller than its rows of dy.
  int64_t chunk_rows() const { return backward ? std::max(4 * kRowBlock, 6 * mixed()) : kRowBlock; }
};

// Bytes, for so many rows at most and an accumulation type of acc_bytes.
int64_t heads_workspace(const HeadsPlan& plan, int64_t tokens, int64_t acc_bytes);

// A prepared projection: the small operands in the accumulation type, for rows [begin, end) of an order of rows.
template <typename T>
struct Heads {
  HeadsPlan plan;
  const T* x;
  Acc<T> scaling, offset_scaling, mask_scale;
  RowBlock rows;
  DropoutBits masks = {};
  Small<Acc<T>> a = {};   // [the terms' ranks, each padded; in_dim] A, R and A0, term after term
  Small<Acc<T>> bt = {};  // [groups * (mixed padded), outputs] transposes of B and B0, of each group
  Small<Acc<T>> b = {};   // backward, many ranks: [out_dim, mixed padded] B and B0
  // With AMX the tiles of each term of a and of each group's bt: forward dot and add tiles, backward the others.
  bool amx = use_amx<T>();
  bfloat16* a_tiles = nullptr;
  bfloat16* bt_tiles = nullptr;
  char* chunks = nullptr;  // their scratch

  Small<Acc<T>> bt_of(int64_t group) const { return {bt.row(group * round_up(plan.mixed(), kRankAlign)), bt.stride}; }
  Small<Acc<T>> b_of(int64_t group) const { return {b.row(group * plan.outputs()), b.stride}; }
  const bfloat16* bt_tiles_of(int64_t group) const { return amx ? bt_tiles + plan.bt_tile(group) : nullptr; }
};

// What a chunk of rows needs of its own.
template <typename A>
struct ChunkScratch {
  uint8_t* keep = nullptr;      // dropout bits of a block
  std::vector<Small<A>> g;      // of each term, [rows of a block, rank padded]: products of x, or their gradients
  Small<A> u;                   // [rows of a block, columns padded]
  Small<A> mixed;               // what bt is multiplied by, or its gradient [rows of a block, mixed padded]
  Small<A> q;                   // backward: dy bt' of one group, like mixed
  Small<A> weighted;            // backward, routed: v u of one group, like u
  bfloat16* factors = nullptr;  // AMX: left tiles of the factors at work
  Small<A> da;                  // backward: the gradient of a over the chunk, without dropout's scale
  Small<A> dbt;                 // backward: that of bt, without scaling [groups * columns, outputs]
};

// A block of rows at work.
template <typename T>
struct HeadsBlock {
  using A = Acc<T>;

  const Heads<T>& heads;
  const HeadsPlan& plan;
  ChunkScratch<A> scratch;
  std::vector<RankTerm<A>> terms;
  RowBlock rows;
  bool first_of_chunk;

  A* at(const Place& place, int64_t i) const { return scratch.g[place.term].row(i) + place.column; }

  // Forward: z from x; u from z; y of one group, whose heads have factors v[row] (null: 1), each row's stride apart.
  void shrink(A* z) const;
  void make_heads(const A* z) const;
  void expand(int64_t group, Small<const A> v, const T* y_in, const T* bias, T* y) const;

  // Backward, after make_heads: one group's share of the gradient of mixed, leaving its q, and of dB; the gradients of
  // latents and offset path; then, with those of the logits in their place, dx and the shares of dA and dR.
  void pull(const T* dy, int64_t group, Small<const A> v) const;
  void latent_gradient(const A* dz_in) const;
  void input_gradient(const T* dx_in, T* dx) const;
};

// Prepares the rows, on all threads; R is null unless routed.
template <typename T, typename W>
Heads<T> prepare_heads(const HeadsPlan& plan, const HeadsInputs<T, W>& inputs, const W* R, const RowBlock& rows,
                       void* workspace);

// Adds up the chunks' sums, on all threads; dR is null unless routed.
template <typename T>
void finish_gradients(const Heads<T>& heads, Acc<T>* dA, Acc<T>* dB, Acc<T>* dR);

// ---- Chunks

// Whole blocks in at most kMost chunks: enough for many threads, and a power of two, which threads share evenly.
struct Chunks {
  static constexpr uint64_t kMost = 32;

  int64_t rows, count;  // rows of each but the last

  Chunks(int64_t all, const HeadsPlan& plan)
      : rows(std::max(kRowBlock, round_up(ceil_div(all, most(all, plan)), kRowBlock))), count(ceil_div(all, rows)) {}

  // How many some of so many rows have at most.
  static int64_t most(int64_t all, const HeadsPlan& plan) {
    return std::min(kMost, std::bit_ceil(uint64_t(ceil_div(all, plan.chunk_rows()))));
  }
};

template <typename T>
HeadsBlock<T> begin_chunk(const Heads<T>& heads, int64_t chunk);
template <typename T>
void begin_block(HeadsBlock<T>& block, int64_t first, int64_t count, bool first_of_chunk);  // draws its masks

// Calls body(block) for all blocks of rows, on all threads.
template <typename T, typename Body>
void for_blocks(const Heads<T>& heads, const Body& body) {
  const Chunks chunks(heads.rows.count, heads.plan);
  parallel_for(0, chunks.count, 1, [&](int64_t first_chunk, int64_t last_chunk) {
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      HeadsBlock<T> block = begin_chunk(heads, chunk);
      const int64_t begin = chunk * chunks.rows, end = std::min(begin + chunks.rows, heads.rows.count);
      for (int64_t row = begin; row < end; row += kRowBlock) {
        begin_block(block, row, std::min(kRowBlock, end - row), row == begin);
        body(block);
      }
    }
  });
}

// ---- A projection without a router

template <typename T, typename W>
void project_forward(const Heads<T>& heads, const HeadsForwardArgs<T, W>& args) {
  for_blocks(heads, [&](const HeadsBlock<T>& block) {
    block.shrink(args.z);
    block.make_heads(args.z);
    block.expand(0, {}, args.y_in, args.bias, args.y);
  });
}

template <typename T, typename W>
void project_backward(const Heads<T>& heads, const HeadsBackwardArgs<T, W>& args) {
  for_blocks(heads, [&](const HeadsBlock<T>& block) {
    block.make_heads(args.z);
    block.pull(args.dy, 0, {});
    block.latent_gradient(args.dz_in);
    block.input_gradient(args.dx_in, args.dx);
  });
  finish_gradients<T>(heads, args.dA, args.dB, nullptr);
}

}  // namespace align::cpu
