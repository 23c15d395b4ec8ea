// Shared by the bindings of grouped_lora and sibling_lora: the checks of a layer.
#pragma once

#include "bindings/projection.h"
#include "ops/grouped_lora.h"

namespace align {

inline std::vector<int64_t> latent_sizes(const GroupedLoraShape& shape) { return {shape.tokens, shape.rank}; }

inline GroupedLoraShape check_inputs(const Tensor& x, const Tensor& A, const Tensor& B) {
  ALIGN_CHECK(A.dim() == 2 || A.dim() == 3, "A must be [rank, in_dim] or [groups, rank, in_dim], got ", shape_of(A));
  GroupedLoraShape shape;
  shape.tokens = tokens_of(x);
  shape.in_dim = x.size(x.dim() - 1);
  shape.groups = A.dim() == 3 ? A.size(0) : 1;
  shape.rank = A.size(A.dim() - 2);
  ALIGN_CHECK(A.size(A.dim() - 1) == shape.in_dim, "A must be [", A.dim() == 3 ? "groups, " : "",
              "rank, in_dim] with in_dim ", shape.in_dim, " as in x, got ", shape_of(A));
  ALIGN_CHECK(B.dim() == A.dim() && B.size(B.dim() - 1) == shape.rank && (B.dim() == 2 || B.size(0) == shape.groups),
              "B must be [", A.dim() == 3 ? "groups, " : "", "out_dim, rank] to match A ", shape_of(A), ", got ",
              shape_of(B));
  shape.out_dim = B.size(B.dim() - 2);
  check_floating(A, "A");
  check_floating(B, "B");
  check_columns(shape.in_dim, shape.out_dim);
  check_size(shape.rank, kMaxRanks, "rank, the rows of A,");
  check_size(shape.groups, kMaxCount, "groups, of A,");
  ALIGN_CHECK(shape.groups > 0 || shape.tokens == 0, "A holds no group, but x has ", shape.tokens, " rows");
  check_device(A, x, "A");
  check_device(B, x, "B");
  return shape;
}

}  // namespace align
