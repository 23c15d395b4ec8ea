// The frozen base layer, composed from the vendor's GEMM. By out variants: autocast, which may be on while the op runs
// (backward inside an autocast region, say), rewrites the functional products and leaves these alone.
#pragma once

#include <array>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bindings/tensors.h"

namespace align {

inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  const char* const failed = "the base layer's product failed";
  if (out.is_cpu()) {  // not through the dispatcher, whose search by name takes longer than a tiny product
    STD_TORCH_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()) == AOTI_TORCH_SUCCESS, failed);
    return;
  }
  std::array<StableIValue, 3> stack = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                                       torch::stable::detail::from(out)};
  const auto status = torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, failed);
  torch::stable::detail::to<Tensor>(stack[0]);  // out again, ours to release
}

// x [..., columns], contiguous, as [rows, columns].
inline Tensor rows_of(const Tensor& x, int64_t rows) {
  const int64_t columns = x.size(x.dim() - 1);
  return matrix(x, {rows, columns}, {columns, 1});
}

// out = x Wᵀ for x [..., in_dim] of so many rows, weight [out_dim, in_dim]; the bias is added with the low-rank term.
inline void base_forward(const Tensor& x, int64_t rows, const Tensor& weight, const Tensor& out) {
  const Tensor transposed = matrix(weight, {weight.size(1), weight.size(0)}, {weight.stride(1), weight.stride(0)});
  mm_out(rows_of(x, rows), transposed, rows_of(out, rows));
}

// dx = dy W for dy [..., out_dim].
inline void base_backward(const Tensor& dy, int64_t rows, const Tensor& weight, const Tensor& dx) {
  mm_out(rows_of(dy, rows), weight, rows_of(dx, rows));
}

}  // namespace align
