// Grouped LoRA: the low-rank path of LoRA, Align-LoRA (one group) and Multi-Adapter (one group per task).
//
//   xd     = x * mask                                  input dropout, mask already scaled by 1/(1-p)
//   z[t]   = A_k xd[t]                                  k = group of row t
//   y[t]  += scaling * B_k z[t]
//
// Backward, with g = dL/dy and the gradient dzin that reaches z from outside (alignment, a user's loss):
//   dz[t]  = scaling * B_k^T g[t] + dzin[t]
//   dB_k   = scaling * sum_{t in k} g[t] z[t]^T
//   dA_k   = sum_{t in k} dz[t] xd[t]^T
//   dx[t] += (A_k^T dz[t]) * mask[t]
//
// Products have operands of type T (adapters in float are rounded to it) and accumulate in Acc<T>; z has type Acc<T>.
// For dropout element (t, c) of x has the number t * in_dim + c (philox.h), whatever the grouping. Every size may be 0.
//
// Floating-point operations: forward 2 T r (n + m), backward 4 T r (n + m). Bytes moved (lower bound): forward
// x + 2y + z, backward g + x + 2dx + z.
#pragma once

#include <cstdint>

#include "ops/dtype.h"
#include "ops/philox.h"
#include "ops/stream.h"

namespace align {

struct GroupedLoraShape {
  int64_t tokens;
  int64_t in_dim;
  int64_t out_dim;
  int64_t rank;
  int64_t groups;
};

// The rows of x in group order: group k has rows[offsets[k]] .. rows[offsets[k+1] - 1].
struct RowGroups {
  const int64_t* rows;     // [tokens] row numbers; null: the rows of x are in group order
  const int64_t* offsets;  // [groups + 1] from 0 to tokens; on CUDA null means one group
};

template <typename T, typename TA = T>  // TA: type of the adapters, T or float
struct GroupedLoraForwardArgs {
  GroupedLoraShape shape;
  RowGroups row_groups;
  DropoutArgs dropout;  // one mask on x
  double scaling;
  // inputs
  const T* x;     // [tokens, in_dim]
  const TA* A;    // [groups, rank, in_dim]
  const TA* B;    // [groups, out_dim, rank]
  const T* y_in;  // [tokens, out_dim], is added to the low-rank term; may be y itself
  const T* bias;  // [out_dim], is added too, or null: zero
  // outputs
  Acc<T>* z;  // [tokens, rank], assigned
  T* y;       // [tokens, out_dim], assigned y_in + bias + low rank, one rounding
  void* workspace;
};

template <typename T, typename TA = T>
struct GroupedLoraBackwardArgs {
  GroupedLoraShape shape;
  RowGroups row_groups;
  DropoutArgs dropout;  // one mask on x
  double scaling;
  // inputs
  const T* x;       // [tokens, in_dim]
  const Acc<T>* z;  // [tokens, rank] of the forward
  const TA* A;      // [groups, rank, in_dim]
  const TA* B;      // [groups, out_dim, rank]
  const T* dx_in;   // [tokens, in_dim], is added to dx; may be dx itself, or null: zero
  // grad outputs
  const T* dy;          // [tokens, out_dim]
  const Acc<T>* dz_in;  // [tokens, rank], or null: zero
  // grad inputs
  T* dx;       // [tokens, in_dim], assigned dx_in + low rank, or null: not wanted
  Acc<T>* dA;  // [groups, rank, in_dim], assigned (zero for empty groups)
  Acc<T>* dB;  // [groups, out_dim, rank], assigned (zero for empty groups)
  void* workspace;
};

namespace cpu {  // T: float, double, bfloat16, float16; TA: T, or float for 16-bit T
int64_t grouped_lora_forward_workspace(const GroupedLoraShape& shape, bool dropout, int64_t acc_bytes);   // bytes
int64_t grouped_lora_backward_workspace(const GroupedLoraShape& shape, bool dropout, int64_t acc_bytes);  // bytes
template <typename T, typename TA>
void grouped_lora_forward(const GroupedLoraForwardArgs<T, TA>& args);
template <typename T, typename TA>
void grouped_lora_backward(const GroupedLoraBackwardArgs<T, TA>& args);

// Stable counting sort of per-row group numbers (each in 0 .. groups-1) into RowGroups' two arrays.
void group_rows(const int64_t* group, int64_t tokens, int64_t groups, int64_t* rows, int64_t* offsets);
}  // namespace cpu

namespace cuda {  // T: float, bfloat16, float16; TA: T or float
int64_t grouped_lora_forward_workspace(const GroupedLoraShape& shape, int64_t element_bytes);   // bytes
int64_t grouped_lora_backward_workspace(const GroupedLoraShape& shape, int64_t element_bytes);  // bytes
template <typename T, typename TA>
void grouped_lora_forward(const GroupedLoraForwardArgs<T, TA>& args, Stream stream);
template <typename T, typename TA>
void grouped_lora_backward(const GroupedLoraBackwardArgs<T, TA>& args, Stream stream);

// Does the same as cpu::group_rows. A group number out of range stops the program.
void group_rows(const int64_t* group, int64_t tokens, int64_t groups, int64_t* rows, int64_t* offsets, Stream stream);
}  // namespace cuda

}  // namespace align
