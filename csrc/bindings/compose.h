// The frozen base layer, composed from the vendor's GEMM. By out variants: autocast, which may be on while the op runs
// (backward inside an autocast region, say), rewrites the functional products and leaves these alone.
#pragma once

#include <array>

#include "bindings/tensors.h"

namespace align {

inline void mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                                       torch::stable::detail::from(out)};
  const auto status = torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "the base layer's product failed");
  out = torch::stable::detail::to<Tensor>(stack[0]);
}

// x Wᵀ for x [tokens, in_dim], weight [out_dim, in_dim]; the bias is added with the low-rank term.
inline Tensor base_forward(const Tensor& x, const Tensor& weight) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  mm_out(x, torch::stable::transpose(weight, 0, 1), out);
  return out;
}

// dx = dy W for dy [tokens, out_dim].
inline Tensor base_backward(const Tensor& dy, const Tensor& weight) {
  Tensor out = torch::stable::new_empty(dy, {dy.size(0), weight.size(1)});
  mm_out(dy, weight, out);
  return out;
}

}  // namespace align
