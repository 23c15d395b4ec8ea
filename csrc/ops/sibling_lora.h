// Sibling LoRA: the low-rank paths of up to kMaxSiblings layers that see the same x (q, k, v; gate, up). Each is the
// projection of dropout_sum or, with a router, of routed_lora; one head without an offset path is LoRA.
//
//   z_i, w_i, y_i of layer i as in dropout_sum.h or routed_lora.h: up to site latent, with masks of its own
//
// The masks of a token follow one another: with E_i elements in all masks of a row of layer i (n for site input,
// heads * rank for latent) and E their sum over the layers, element e of row t has the number t * E + E_1 + ... +
// E_{i-1} + e. Site input_per_head is not among them: its masks on x are as many as there are heads.
//
// Backward: dz_i, dA_i, dB_i and dR_i as there, and
//   dx    += sum_i (A_i^T dz_i + offset_i) * mask_i + R_i^T dl_i
//
// On CUDA x is read once in each direction for each 64 ranks (A, A0 and R of all layers together, A and A0 of a layer
// padded to a multiple of 8), and dx is written once, however many layers there are; with dropout on x, dA reads x for
// each mask, in blocks that run side by side, and dR once more. Bytes moved (lower bound): forward x + sum_i (2 y_i +
// z_i + w_i), backward x + 2 dx + sum_i (g_i + z_i + w_i).
#pragma once

#include <algorithm>

#include "ops/routed_lora.h"

namespace align {

constexpr int kMaxSiblings = 3;

// The arguments of each layer, as in routed_lora, or of dropout_sum, its projection alone, where its routing has no
// groups: the same tokens, in_dim, x [tokens, in_dim], site and p in all, and one rng for all masks. Their workspaces
// are not used.
template <typename T, typename TA = T>
struct SiblingLoraForwardArgs {
  int count;
  RoutedLoraForwardArgs<T, TA> layers[kMaxSiblings];
  void* workspace;
};

// dx and dx_in of the first layer are those of all.
template <typename T, typename TA = T>
struct SiblingLoraBackwardArgs {
  int count;
  RoutedLoraBackwardArgs<T, TA> layers[kMaxSiblings];
  void* workspace;
};

// The dropout arguments of layer i, whose masks follow those of the layers before.
template <typename Args>
DropoutArgs dropout_of(const Args& args, int i) {
  DropoutArgs dropout = args.layers[i].projection.inputs.dropout;
  dropout.first = dropout.row_numbers = 0;
  for (int k = 0; k < args.count; ++k) {
    const int64_t elements = args.layers[k].projection.inputs.shape.mask_elements();
    dropout.row_numbers += elements;
    if (k < i) dropout.first += elements;
  }
  return dropout;
}

namespace cpu {  // T: float, double, bfloat16, float16; TA: T, or float for 16-bit T
template <typename T, typename TA>
int64_t sibling_lora_workspace(const SiblingLoraForwardArgs<T, TA>& args);  // bytes
template <typename T, typename TA>
int64_t sibling_lora_workspace(const SiblingLoraBackwardArgs<T, TA>& args);  // bytes
template <typename T, typename TA>
void sibling_lora_forward(const SiblingLoraForwardArgs<T, TA>& args);
template <typename T, typename TA>
void sibling_lora_backward(const SiblingLoraBackwardArgs<T, TA>& args);
}  // namespace cpu

namespace cuda {  // T: float, bfloat16, float16; TA: T or float
template <typename T, typename TA>
int64_t sibling_lora_workspace(const SiblingLoraForwardArgs<T, TA>& args);  // bytes
template <typename T, typename TA>
int64_t sibling_lora_workspace(const SiblingLoraBackwardArgs<T, TA>& args);  // bytes
template <typename T, typename TA>
void sibling_lora_forward(const SiblingLoraForwardArgs<T, TA>& args, Stream stream);
template <typename T, typename TA>
void sibling_lora_backward(const SiblingLoraBackwardArgs<T, TA>& args, Stream stream);
}  // namespace cuda

}  // namespace align
