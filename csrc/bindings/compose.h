// The frozen base layer, composed from the vendor's GEMM.
#pragma once

#include <array>

#include "bindings/tensors.h"

namespace align {

// base(x) = x Wᵀ + b for x [tokens, in_dim], weight [out_dim, in_dim], bias [out_dim] or none.
inline Tensor base_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 3> stack = {torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                       torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// dx = dy W for dy [tokens, out_dim].
inline Tensor base_backward(const Tensor& dy, const Tensor& weight) { return torch::stable::matmul(dy, weight); }

}  // namespace align
