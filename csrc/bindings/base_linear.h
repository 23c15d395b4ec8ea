// The frozen base layer, computed by the GEMM of the vendor. It uses the out variants of the products: autocast, which
// may be active while the operator runs (for example in a backward pass), changes the functional ones but not these.
#pragma once

#include <array>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bindings/tensors.h"

namespace align {

inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (out.is_cpu()) {  // without the dispatcher, whose search by name takes longer than a tiny product
    return check_call(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()), "the base layer's product");
  }
  using torch::stable::detail::from;
  call_operator<3>("aten::mm", "out", {from(a), from(b), from(out)});  // returns out
}

// A contiguous x [..., columns] as [rows, columns].
inline Tensor rows_of(const Tensor& x, int64_t rows) {
  const int64_t columns = x.size(x.dim() - 1);
  return view_of<2>(x, {rows, columns}, {columns, 1});
}

// out = x Wᵀ for x [..., in_dim] with `rows` rows and weight [out_dim, in_dim]. The kernels add the bias.
inline void base_forward(const Tensor& x, int64_t rows, const Tensor& weight, const Tensor& out) {
  const Tensor transposed = view_of<2>(weight, {weight.size(1), weight.size(0)}, {weight.stride(1), weight.stride(0)});
  mm_out(rows_of(x, rows), transposed, rows_of(out, rows));
}

// dx = dy W for dy [..., out_dim].
inline void base_backward(const Tensor& dy, int64_t rows, const Tensor& weight, const Tensor& dx) {
  mm_out(rows_of(dy, rows), weight, rows_of(dx, rows));
}

}  // namespace align
