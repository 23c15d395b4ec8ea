// The steps of a projection with several heads (ops/heads.h), which dropout_sum and routed_lora put together. Steps on
// rows take blocks of kRowBlock rows, and all steps of a block run one after the other while it is in cache; steps on
// columns keep every sum over rows in one thread. No result depends on how rows or columns are cut.
//
// u holds the u_i of all heads side by side, so that the heads are one product. A group of outputs has a factor
// v[t,i] for each head (routing); without routing there is one group, all factors are 1, and where all u_i are one z
// the heads are summed first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/skinny.h"
#include "ops/heads.h"

namespace align::cpu {

// What is computed, and the sizes that follow.
struct HeadsPlan {
  HeadsShape shape;
  bool dropout;
  bool backward;
  bool routed;
  int64_t groups;  // of outputs; 1 without routing

  bool masks_inputs() const {
    return dropout && (shape.site == DropoutSite::kInput || shape.site == DropoutSite::kInputPerHead);
  }
  bool masks_latents() const { return dropout && shape.site == DropoutSite::kLatent; }
  bool summed() const { return !routed && shape.latents() == 1 && !masks_latents(); }
  int64_t outputs() const { return shape.out_dim / groups; }  // of a group
  int64_t heads() const { return summed() ? 1 : shape.heads; }
  int64_t columns() const { return heads() * shape.rank; }  // of u
  // Products of x that make z: one, or one per mask.
  int64_t parts() const { return shape.site == DropoutSite::kInputPerHead ? shape.heads : 1; }
  int64_t part_rank() const { return shape.latents() / parts() * shape.rank; }
  int64_t part_matrices() const { return shape.own_A ? parts() : 1; }
  int64_t terms() const { return parts() + (shape.offset_rank > 0) + routed; }
  int64_t mask_elements() const;
};

int64_t heads_workspace(const HeadsPlan& plan);  // bytes

template <typename A>
struct HeadsScratch {
  uint8_t* keep = nullptr;  // dropout bits
  RankTerm<A>* terms;       // [terms] products of x: the parts of z, the offset path, the router; g in backward: their
                            // gradients
  Small<A> latent;          // g of the parts      [parts * tokens, part_rank padded]
  Small<A> offset;          // g of the offset     [tokens, offset_rank padded]
  Small<A> logits;          // g of the router     [tokens, groups * heads padded]
  Small<A> a, a0, r;        // b of the parts (one after the other), the offset, the router
  Small<A> bt;              // transposes of B and B0, of each group [groups * (columns + offset_rank padded), outputs]
  Small<A> u;               // [tokens, columns padded]
  Small<A> mixed;           // what bt is multiplied by, or its gradient [tokens, columns + offset_rank padded]
  Small<A> q;               // backward: dy bt' of one group, like mixed
  Small<A> dbt;             // backward: gradient of bt [groups * columns, outputs]
};

template <typename T>
struct Heads {
  HeadsPlan plan;
  HeadsInputs<T> inputs;
  HeadsScratch<Acc<T>> scratch;
  Acc<T> mask_scale;

  Small<Acc<T>> bt(int64_t group) const;
  Acc<T>* latent(int64_t i, int64_t t) const;  // latent i of row t
};

// The factors of the heads of one group, or null: 1.
template <typename A>
using HeadFactors = Small<const A>;

// Draws the masks and prepares the operands; R is null unless routed.
template <typename T>
Heads<T> make_heads(const HeadsPlan& plan, const HeadsInputs<T>& inputs, const T* R, void* workspace);

// ---- Forward, rows [begin, end)

// The latents, with x once for all terms, and z.
template <typename T>
void shrink_rows(const Heads<T>& heads, Acc<T>* z, int64_t begin, int64_t end);

// u from z.
template <typename T>
void head_rows(const Heads<T>& heads, const Acc<T>* z, int64_t begin, int64_t end);

// y of one group.
template <typename T>
void expand_rows(const Heads<T>& heads, const HeadsForwardArgs<T>& args, int64_t group, HeadFactors<Acc<T>> v,
                 int64_t begin, int64_t end);

// ---- Backward, rows [begin, end); head_rows first

// Adds one group's share of the gradient of mixed; leaves q of the group.
template <typename T>
void pull_rows(const Heads<T>& heads, const T* dy, int64_t group, HeadFactors<Acc<T>> v, int64_t begin, int64_t end);

// Gradients of the latents and the offset path, then, with that of the logits, dx.
template <typename T>
void latent_gradient_rows(const Heads<T>& heads, const HeadsBackwardArgs<T>& args, int64_t begin, int64_t end);

// ---- Backward, columns

// dA and dR (null unless routed) of all columns, on all threads.
template <typename T>
void a_gradient(const Heads<T>& heads, Acc<T>* dA, Acc<T>* dR);

// dB, on all threads; w holds the factors of all groups, [tokens, groups, heads], or is null.
template <typename T>
void b_gradient(const Heads<T>& heads, const T* dy, const Acc<T>* w, Acc<T>* dB);

// Calls body(begin, end) for blocks of rows, on all threads.
template <typename Body>
void for_row_blocks(int64_t tokens, const Body& body) {
  parallel_for(0, ceil_div(tokens, kRowBlock), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      body(block * kRowBlock, std::min((block + 1) * kRowBlock, tokens));
    }
  });
}

}  // namespace align::cpu
