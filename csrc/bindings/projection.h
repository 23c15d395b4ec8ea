// Shared by the bindings of all projections: the dropout arguments, the frozen base layer, checks and new gradients. A
// Shape has tokens, in_dim and out_dim, and latent_sizes(shape) returns the sizes of z.
#pragma once

#include <vector>

#include "bindings/base_linear.h"
#include "bindings/device.h"
#include "ops/philox.h"

namespace align {

// The dropout arguments. Owns the tensor that DropoutArgs points to.
struct Dropout {
  Tensor rng;
  DropoutArgs view = {0, nullptr};

  Dropout(double p, const OptionalTensor& given, const Tensor& like) {
    ALIGN_CHECK(p >= 0 && p < 1 && dropout_threshold(p) < 65536, "p must be in [0, 1 - 2^-17), got ", p);
    if (p == 0) return;
    ALIGN_CHECK(given, "rng must be given when p > 0");
    check_shape(*given, {2}, "rng");
    check_dtype(*given, ScalarType::Long, "rng", "int64 (seed, offset)");
    check_device(*given, like, "rng");
    rng = as_contiguous(*given);
    view = {p, reinterpret_cast<const uint64_t*>(data<int64_t>(rng))};
  }
};

// The number of rows of x [..., in_dim].
inline int64_t tokens_of(const Tensor& x) {
  ALIGN_CHECK(x.dim() >= 1, "x must be [..., in_dim], got a scalar");
  check_floating(x, "x");
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) tokens = product({tokens, x.size(d)});
  check_size(tokens, kMaxRows, "the rows of x");
  return tokens;
}

inline void check_columns(int64_t in_dim, int64_t out_dim) {
  check_size(in_dim, kMaxColumns, "in_dim, the columns of x and A,");
  check_size(out_dim, kMaxColumns, "out_dim, the rows of B,");
}

inline std::vector<int64_t> with_last_dim(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = last;
  return sizes;
}

// Returns a new output [..., out_dim] of x, to which base(x) or base_out and the low-rank term are added.
template <typename Shape>
BaseProduct output_of(const Tensor& x, const Shape& shape, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& base_out, bool product_last) {
  ALIGN_CHECK(weight.has_value() != base_out.has_value(), "give exactly one of weight and base_out");
  const ScalarType dtype = x.scalar_type();
  check_device(weight, x, "weight");
  check_device(bias, x, "bias");
  check_device(base_out, x, "base_out");
  if (base_out) {
    ALIGN_CHECK(!bias, "bias goes with weight; base_out already holds it");
    check_shape(*base_out, with_last_dim(x, shape.out_dim), "base_out");
    check_dtype(*base_out, dtype, "base_out", "of the dtype of x");
    const Tensor given = as_contiguous(*base_out);
    return {given, make_empty(given, sizes_of(given))};
  }
  check_shape(*weight, {shape.out_dim, shape.in_dim}, "weight");
  check_dtype(*weight, dtype, "weight", "of the dtype of x");
  if (bias) {
    check_shape(*bias, {shape.out_dim}, "bias");
    check_dtype(*bias, dtype, "bias", "of the dtype of x");
  }
  const Tensor out = make_empty(x, with_last_dim(x, shape.out_dim));
  return {{{x, transposed(*weight)}}, shape.tokens, out, product_last};
}

template <typename Shape>
void check_gradients(const Shape& shape, const Tensor& x, const Tensor& dy, const OptionalTensor& dz, const Tensor& z,
                     const OptionalTensor& weight) {
  check_shape(dy, with_last_dim(x, shape.out_dim), "dy");
  check_dtype(dy, x.scalar_type(), "dy", "of the dtype of x");
  check_shape(z, latent_sizes(shape), "z");
  check_accumulated(z, x, "z");
  check_accumulated(dz, x, "dz");
  check_device(dy, x, "dy");
  check_device(z, x, "z");
  check_device(dz, x, "dz");
  check_device(weight, x, "weight");
  if (dz) check_shape(*dz, latent_sizes(shape), "dz");
  if (weight) {
    check_shape(*weight, {shape.out_dim, shape.in_dim}, "weight");
    check_dtype(*weight, x.scalar_type(), "weight", "of the dtype of x");
  }
}

// Returns a new dx, to which those of the frozen layers, dy W each, and the low-rank term are added.
inline BaseProduct dx_of(const Tensor& x, const std::vector<BaseProduct::Factors>& products, bool need_dx,
                         bool product_last) {
  const Tensor dx = need_dx ? make_empty(x, sizes_of(x)) : make_empty(x, {0});
  if (!need_dx || products.empty()) return {std::nullopt, dx};
  return {products, tokens_of(x), dx, product_last};
}

// Of one layer, which may have no weight.
inline BaseProduct dx_of(const Tensor& x, const Tensor& dy, const OptionalTensor& weight, bool need_dx,
                         bool product_last) {
  std::vector<BaseProduct::Factors> products;
  if (weight) products.push_back({dy, *weight});
  return dx_of(x, products, need_dx, product_last);
}

// The gradient of an adapter, in the accumulation type.
inline Tensor like_adapter(const Tensor& adapter, const Tensor& x) {
  return make_empty(adapter, sizes_of(adapter), acc_type(x));
}

}  // namespace align
