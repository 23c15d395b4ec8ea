// Shared by the bindings of routed_lora and sibling_lora: the checks of a router.
#pragma once

#include "bindings/heads.h"
#include "ops/routed_lora.h"

namespace align {

// Checks the router and its options.
inline Routing check_router(const HeadsShape& shape, const Tensor& x, const Tensor& R, int64_t top_k, double tau) {
  ALIGN_CHECK(R.dim() == 2 && R.size(1) == shape.in_dim && R.size(0) > 0 && R.size(0) % shape.heads == 0,
              "R must be [groups * heads, in_dim] with heads ", shape.heads, " as in B and in_dim ", shape.in_dim,
              " as in x, got ", shape_of(R));
  check_floating(R, "R");
  const int64_t groups = R.size(0) / shape.heads;
  check_size(groups, kMaxCount, "groups, R's rows / heads,");
  check_ranks(shape, R.size(0));
  ALIGN_CHECK(shape.out_dim % groups == 0, "R has ", groups, " groups, which must divide out_dim ", shape.out_dim);
  ALIGN_CHECK(top_k >= 1 && top_k <= shape.heads, "top_k must be in 1 .. ", shape.heads, ", got ", top_k);
  ALIGN_CHECK(tau > 0, "tau must be positive, got ", tau);
  check_device(R, x, "R");
  return {groups, top_k, tau};
}

inline std::vector<int64_t> factor_sizes(const HeadsShape& shape, const Routing& routing) {
  return {shape.tokens, routing.groups, shape.heads};
}

// Checks the router's weights, an output of the forward pass, and their gradient.
inline void check_factors(const std::vector<int64_t>& sizes, const Tensor& x, const Tensor& w,
                          const OptionalTensor& dw) {
  check_shape(w, sizes, "w");
  check_device(w, x, "w");
  check_device(dw, x, "dw");
  check_accumulated(w, x, "w");
  check_accumulated(dw, x, "dw");
  if (dw) check_shape(*dw, sizes, "dw");
}

}  // namespace align
