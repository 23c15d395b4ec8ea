// Heads combined by a router: HydraLoRA (groups = 1), R-LoRA (site latent), LoRA-MoE (A_per_head, top_k), mtLoRA
// (groups
// >= 1).
//
//   l[t,k,i] = R[k*heads + i] . x[t] / tau                      on x without dropout
//   w[t,k,:] = softmax over the top_k largest l[t,k,:], 0 elsewhere; ties go to the lowest head
//   y[t,o]  += scaling * sum_i w[t,k,i] B_i[o,:] . u_i[t] + offset_scaling * B0[o,:] A0 xd[t]
//              k = floor(o * groups / out_dim), the group of output o;  u_i, z, xd by site: heads.h
//
// Backward, with g = dL/dy and the gradients dzin and dwin that reach z and w from outside; B_ik are the rows of B_i
// that belong to group k, g_k the columns of g:
//   q_ik[t]    = B_ik^T g_k[t]
//   dw[t,k,i]  = scaling * u_i[t] . q_ik[t] + dwin[t,k,i]
//   dl[t,k,i]  = w[t,k,i] (dw[t,k,i] - sum_j w[t,k,j] dw[t,k,j]) / tau        zero where w is: outside the top_k
//   dR         = sum_t dl[t] x[t]^T
//   du_i[t]    = scaling * sum_k w[t,k,i] q_ik[t]
//   dB_ik      = scaling * sum_t w[t,k,i] g_k[t] u_i[t]^T
//   dz, dA, dx from du_i as in dropout_sum.h, and dx[t] += R^T dl[t]
//
// Products have operands of type T (adapters and router in float are rounded to it) and accumulate in Acc<T>; z, w, the
// softmax and its gradient have type Acc<T>. groups is at least 1 and divides out_dim; top_k is in 1 .. heads. x is
// read once for z, the offset path and the router together.
//
// Floating-point operations: forward 2 T ((r L + G N) n + N r m), backward twice that, with L = latents, N = heads and
// G = groups; the offset path adds 2 T r0 (n + m) to each. Bytes moved (lower bound): forward x + 2y + z + w, backward
// g + x + 2dx + z + w, where z has T L r and w has T G N elements.
#pragma once

#include "ops/heads.h"
#include "ops/stream.h"

namespace align {

struct Routing {
  int64_t groups;
  int64_t top_k;
  double tau;
};

template <typename T, typename TA = T>
struct RoutedLoraForwardArgs {
  HeadsForwardArgs<T, TA> projection;
  Routing routing;
  const TA* R;  // [groups * heads, in_dim], row k * heads + i
  Acc<T>* w;    // [tokens, groups, heads], assigned
};

template <typename T, typename TA = T>
struct RoutedLoraBackwardArgs {
  HeadsBackwardArgs<T, TA> projection;
  Routing routing;
  const TA* R;          // [groups * heads, in_dim]
  const Acc<T>* w;      // [tokens, groups, heads] of the forward
  const Acc<T>* dw_in;  // [tokens, groups, heads] grad output, or null: zero
  Acc<T>* dR;           // [groups * heads, in_dim] grad input, assigned
};

namespace cpu {  // T: float, double, bfloat16, float16; TA: T, or float for 16-bit T
int64_t routed_lora_forward_workspace(const HeadsShape& shape, const Routing& routing, bool dropout,
                                      int64_t acc_bytes);  // bytes
int64_t routed_lora_backward_workspace(const HeadsShape& shape, const Routing& routing, bool dropout,
                                       int64_t acc_bytes);  // bytes
template <typename T, typename TA>
void routed_lora_forward(const RoutedLoraForwardArgs<T, TA>& args);
template <typename T, typename TA>
void routed_lora_backward(const RoutedLoraBackwardArgs<T, TA>& args);
}  // namespace cpu

namespace cuda {  // T: float, bfloat16, float16; TA: T or float
template <typename T, typename TA>
int64_t routed_lora_forward_workspace(const HeadsInputs<T, TA>& inputs, const TA* R, const Routing& routing);  // bytes
template <typename T, typename TA>
int64_t routed_lora_backward_workspace(const HeadsInputs<T, TA>& inputs, const TA* R, const Routing& routing);  // bytes
template <typename T, typename TA>
void routed_lora_forward(const RoutedLoraForwardArgs<T, TA>& args, Stream stream);
template <typename T, typename TA>
void routed_lora_backward(const RoutedLoraBackwardArgs<T, TA>& args, Stream stream);
}  // namespace cuda

}  // namespace align
