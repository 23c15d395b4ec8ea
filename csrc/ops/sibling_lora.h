// Sibling LoRA: the low-rank paths of up to kMaxSiblings layers that see the same x (q, k, v; gate, up), each with a
// LoRA of its own, as in grouped_lora with one group.
//
//   xd_i   = x * mask_i                                 element (t, c) has the dropout number (t * count + i) * in_dim
//   + c z_i[t] = A_i xd_i[t] y_i[t] += scaling_i * B_i z_i[t]
//
// Backward, with g_i = dL/dy_i and the gradient dzin_i that reaches z_i from outside:
//   dz_i   = scaling_i * B_i^T g_i + dzin_i
//   dB_i   = scaling_i * sum_t g_i[t] z_i[t]^T
//   dA_i   = sum_t dz_i[t] xd_i[t]^T
//   dx    += sum_i (A_i^T dz_i) * mask_i
//
// On CUDA x is read once in each direction and dx is written once, however many layers there are; with dropout dA reads
// x for each mask, in blocks that run side by side. Bytes moved (lower bound): forward x + sum_i (2 y_i + z_i),
// backward x + 2 dx + sum_i (g_i + z_i).
#pragma once

#include "ops/grouped_lora.h"

namespace align {

constexpr int kMaxSiblings = 3;

// The arguments of each layer, as in grouped_lora: the same tokens, in_dim, x [tokens, in_dim] and p in all, one group,
// and one rng for all masks.
template <typename T, typename TA = T>
struct SiblingLoraForwardArgs {
  int count;
  GroupedLoraForwardArgs<T, TA> layers[kMaxSiblings];
  void* workspace;
};

// dx and dx_in of the first layer are those of all.
template <typename T, typename TA = T>
struct SiblingLoraBackwardArgs {
  int count;
  GroupedLoraBackwardArgs<T, TA> layers[kMaxSiblings];
  void* workspace;
};

struct SiblingLoraShape {
  int count;
  GroupedLoraShape layers[kMaxSiblings];
};

namespace cpu {  // T: float, double, bfloat16, float16; TA: T, or float for 16-bit T
int64_t sibling_lora_forward_workspace(const SiblingLoraShape& shape, bool dropout, int64_t acc_bytes);   // bytes
int64_t sibling_lora_backward_workspace(const SiblingLoraShape& shape, bool dropout, int64_t acc_bytes);  // bytes
template <typename T, typename TA>
void sibling_lora_forward(const SiblingLoraForwardArgs<T, TA>& args);
template <typename T, typename TA>
void sibling_lora_backward(const SiblingLoraBackwardArgs<T, TA>& args);
}  // namespace cpu

namespace cuda {  // T: float, bfloat16, float16; TA: T or float
int64_t sibling_lora_forward_workspace(const SiblingLoraShape& shape, bool dropout, int64_t element_bytes);   // bytes
int64_t sibling_lora_backward_workspace(const SiblingLoraShape& shape, bool dropout, int64_t element_bytes);  // bytes
template <typename T, typename TA>
void sibling_lora_forward(const SiblingLoraForwardArgs<T, TA>& args, Stream stream);
template <typename T, typename TA>
void sibling_lora_backward(const SiblingLoraBackwardArgs<T, TA>& args, Stream stream);
}  // namespace cuda

}  // namespace align
