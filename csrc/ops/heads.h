// The projection of dropout_sum and routed_lora: N heads B_i, on one latent or on one latent for each head.
//
// clang-format off
//   site            xd         z                      u_i
//   none            x          A x                    z
//   input           x * mask   A (x * mask)           z
//   latent          x          A x                    z * mask_i
//   input_per_head  x          z_i = A (x * mask_i)   z_i
// clang-format on
//
// With A_per_head each head has its own matrix A_i instead of A. Then z_i = A_i xd for every site, and site latent
// masks z_i. Masks hold 1/(1-p) or 0 (philox.h). The number of an element for dropout is t*in_dim + c for site input,
// (t*heads + i)*rank + d for latent, and (t*heads + i)*in_dim + c for input_per_head.
//
// The frozen offset path, with A0 and B0, adds offset_scaling * B0 A0 xd, with xd from the table. If masks belong to
// the heads, xd is x itself, because the offset path then stands for a part of the base weight.
#pragma once

#include <cstdint>

#include "ops/dtype.h"
#include "ops/philox.h"

namespace align {

enum class DropoutSite : int64_t { kNone, kInput, kLatent, kInputPerHead };

struct HeadsShape {
  int64_t tokens;
  int64_t in_dim;
  int64_t out_dim;
  int64_t rank;
  int64_t heads;        // at least 1; every other size may be 0
  int64_t offset_rank;  // 0: no offset path
  bool A_per_head;
  DropoutSite site;

  // The number of latents of a row: 1 or heads.
  int64_t latents() const { return A_per_head || site == DropoutSite::kInputPerHead ? heads : 1; }
  // The elements of all masks of a row.
  int64_t mask_elements() const {
    const int64_t by_site[] = {0, in_dim, heads * rank, heads * in_dim};
    return by_site[int64_t(site)];
  }
};

template <typename T, typename TA = T>  // TA: type of the adapters, T or float
struct HeadsInputs {
  HeadsShape shape;
  DropoutArgs dropout;
  double scaling;         // multiplies the heads
  double offset_scaling;  // multiplies the offset path
  const T* x;             // [tokens, in_dim]
  const TA* A;            // [rank, in_dim], or [heads, rank, in_dim] with A_per_head
  const TA* B;            // [heads, out_dim, rank]
  const TA* A0;           // [offset_rank, in_dim], or null
  const TA* B0;           // [out_dim, offset_rank], or null
};

template <typename T, typename TA = T>
struct HeadsForwardArgs {
  HeadsInputs<T, TA> inputs;
  const T* y_in;  // [tokens, out_dim], is added to the low-rank term; may be y itself
  const T* bias;  // [out_dim], is added too, or null: zero
  // outputs
  Acc<T>* z;  // [tokens, latents, rank], assigned
  T* y;       // [tokens, out_dim], assigned y_in + bias + low rank, one rounding
  void* workspace;
};

template <typename T, typename TA = T>
struct HeadsBackwardArgs {
  HeadsInputs<T, TA> inputs;
  const Acc<T>* z;  // [tokens, latents, rank] of the forward
  const T* dx_in;   // [tokens, in_dim], is added to dx; may be dx itself, or null: zero
  // grad outputs
  const T* dy;          // [tokens, out_dim]
  const Acc<T>* dz_in;  // [tokens, latents, rank], or null: zero
  // grad inputs
  T* dx;       // [tokens, in_dim], assigned dx_in + low rank, or null: not wanted
  Acc<T>* dA;  // like A, assigned
  Acc<T>* dB;  // [heads, out_dim, rank], assigned
  void* workspace;
};

}  // namespace align
