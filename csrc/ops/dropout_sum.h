// The sum of dropped-out heads: M-LoRA (site latent) and HydraLoRA without a router (site input_per_head).
//
//   y[t]  += scaling * sum_i B_i u_i[t] + offset_scaling * B0 A0 xd[t]     u_i, z, xd by site: heads.h
//
// scaling is s for the sum of the heads and s / heads for their mean; offset_scaling is -s.
//
// Backward, with g = dL/dy [tokens, out_dim] and the gradient dzin that reaches z from outside:
//   du_i[t] = scaling * B_i^T g[t]
//   dB_i    = scaling * sum_t g[t] u_i[t]^T
//   dz[t]   = sum_i mask_i * du_i[t] + dzin[t]        (site latent; without masks of the heads mask_i = 1)
//   dz_i[t] = du_i[t] + dzin_i[t]                     (one latent per head; times mask_i for site latent)
//   dA      = sum_t dz[t] xd[t]^T                     (site input_per_head: sum_t,i dz_i[t] (x[t] * mask_i)^T)
//   dx[t]  += (A^T dz[t]) * mask[t]                   (site input_per_head: sum_i (A^T dz_i[t]) * mask_i)
//   dx[t]  += (offset_scaling * A0^T B0^T g[t]) * mask[t]                    (mask: of site input, else 1)
//
// Products have operands of type T (adapters in float are rounded to it) and accumulate in Acc<T>; z has type Acc<T>.
// If all u_i are the same z, the B_i act as their sum. A_per_head is false.
//
// Floating-point operations: forward 2 T (r L n + N r m), backward twice that, with L = latents and N = heads; the
// offset path adds 2 T r0 (n + m) to each. Bytes moved (lower bound): forward x + 2y + z, backward g + x + 2dx + z,
// where z has T L r elements.
#pragma once

#include "ops/heads.h"
#include "ops/stream.h"

namespace align {

template <typename T, typename TA = T>
using DropoutSumForwardArgs = HeadsForwardArgs<T, TA>;
template <typename T, typename TA = T>
using DropoutSumBackwardArgs = HeadsBackwardArgs<T, TA>;

namespace cpu {  // T: float, double, bfloat16, float16; TA: T, or float for 16-bit T
int64_t dropout_sum_forward_workspace(const HeadsShape& shape, bool dropout, int64_t acc_bytes);   // bytes
int64_t dropout_sum_backward_workspace(const HeadsShape& shape, bool dropout, int64_t acc_bytes);  // bytes
template <typename T, typename TA>
void dropout_sum_forward(const DropoutSumForwardArgs<T, TA>& args);
template <typename T, typename TA>
void dropout_sum_backward(const DropoutSumBackwardArgs<T, TA>& args);
}  // namespace cpu

namespace cuda {  // T: float, bfloat16, float16; TA: T or float
template <typename T, typename TA>
int64_t dropout_sum_forward_workspace(const HeadsInputs<T, TA>& inputs);  // bytes
template <typename T, typename TA>
int64_t dropout_sum_backward_workspace(const HeadsInputs<T, TA>& inputs);  // bytes
template <typename T, typename TA>
void dropout_sum_forward(const DropoutSumForwardArgs<T, TA>& args, Stream stream);
template <typename T, typename TA>
void dropout_sum_backward(const DropoutSumBackwardArgs<T, TA>& args, Stream stream);
}  // namespace cuda

}  // namespace align
