#include "ops/grouped_lora.h"

#include <tuple>

#include "bindings/compose.h"
#include "bindings/tensors.h"
#include "ops/philox.h"

namespace align {
namespace {

GroupedLoraShape check_inputs(const Tensor& x, const Tensor& A, const Tensor& B) {
  STD_TORCH_CHECK(x.dim() >= 1, "x must be [..., in_dim], got a scalar");
  STD_TORCH_CHECK(A.dim() == 2 || A.dim() == 3, "A must be [rank, in_dim] or [groups, rank, in_dim], got ",
                  shape_of(A));
  GroupedLoraShape shape;
  shape.in_dim = x.size(x.dim() - 1);
  shape.tokens = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.tokens *= x.size(d);
  shape.groups = A.dim() == 3 ? A.size(0) : 1;
  shape.rank = A.size(A.dim() - 2);
  STD_TORCH_CHECK(A.size(A.dim() - 1) == shape.in_dim, "A must be [", A.dim() == 3 ? "groups, " : "",
                  "rank, in_dim] with in_dim ", shape.in_dim, " as in x, got ", shape_of(A));
  STD_TORCH_CHECK(
      B.dim() == A.dim() && B.size(B.dim() - 1) == shape.rank && (B.dim() == 2 || B.size(0) == shape.groups),
      "B must be [", A.dim() == 3 ? "groups, " : "", "out_dim, rank] to match A ", shape_of(A), ", got ", shape_of(B));
  shape.out_dim = B.size(B.dim() - 2);
  check_device(A, x, "A");
  check_device(B, x, "B");
  return shape;
}

// The rows of each group. Owns the arrays that RowGroups points to.
struct GroupedRows {
  std::vector<int64_t> whole;  // offsets of the only group
  Tensor sorted;               // [tokens + groups + 1] rows, then offsets
  Tensor given;
  RowGroups view;

  GroupedRows(const GroupedLoraShape& shape, const Tensor& like, const OptionalTensor& offsets,
              const OptionalTensor& group) {
    STD_TORCH_CHECK(!(offsets && group), "give offsets or group, not both");
    if (offsets) {
      from_offsets(shape, like, *offsets);
    } else if (group) {
      from_group(shape, like, *group);
    } else {
      STD_TORCH_CHECK(shape.groups == 1, "A holds ", shape.groups, " groups: give offsets or group");
      whole = {0, shape.tokens};
      view = {nullptr, whole.data()};
    }
  }

  void from_offsets(const GroupedLoraShape& shape, const Tensor& like, const Tensor& offsets) {
    check_shape(offsets, {shape.groups + 1}, "offsets");
    check_device(offsets, like, "offsets");
    check_dtype(offsets, ScalarType::Long, "offsets", "int64");
    given = torch::stable::contiguous(offsets);
    const int64_t* o = data<int64_t>(given);
    bool valid = o[0] == 0 && o[shape.groups] == shape.tokens;
    for (int64_t k = 0; k < shape.groups; ++k) valid = valid && o[k] <= o[k + 1];
    STD_TORCH_CHECK(valid, "offsets must rise from 0 to the number of rows of x, ", shape.tokens);
    view = {nullptr, o};
  }

  void from_group(const GroupedLoraShape& shape, const Tensor& like, const Tensor& group) {
    check_shape(group, {shape.tokens}, "group");
    check_device(group, like, "group");
    check_dtype(group, ScalarType::Long, "group", "int64");
    given = torch::stable::contiguous(group);
    const int64_t* k = data<int64_t>(given);
    for (int64_t t = 0; t < shape.tokens; ++t)
      STD_TORCH_CHECK(k[t] >= 0 && k[t] < shape.groups, "group must be in 0..", shape.groups - 1, ", got ", k[t],
                      " at row ", t);
    sorted = torch::stable::new_empty(like, {shape.tokens + shape.groups + 1}, ScalarType::Long);
    int64_t* rows = mutable_data<int64_t>(sorted);
    int64_t* offsets = rows + shape.tokens;
    cpu::group_rows(k, shape.tokens, shape.groups, rows, offsets);
    view = {rows, offsets};
  }
};

// The dropout arguments. Owns the tensor that InputDropout points to.
struct Dropout {
  Tensor rng;
  InputDropout view = {0, nullptr};

  Dropout(double p, const OptionalTensor& given) {
    STD_TORCH_CHECK(p >= 0 && dropout_threshold(p) < 65536, "p must be in [0, 1 - 2^-17), got ", p);
    if (p == 0) return;
    STD_TORCH_CHECK(given, "rng must be given when p > 0");
    check_shape(*given, {2}, "rng");
    check_dtype(*given, ScalarType::Long, "rng", "int64 (seed, offset)");
    rng = torch::stable::contiguous(*given);
    view = {p, reinterpret_cast<const uint64_t*>(data<int64_t>(rng))};
  }
};

std::vector<int64_t> with_last_dim(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

Tensor rows_of(const Tensor& x, int64_t tokens) { return torch::stable::view(x, {tokens, x.size(x.dim() - 1)}); }

// What the low-rank term is added to, [tokens, out_dim]: base(x) into a new tensor, or base_out.
Tensor base_of(const Tensor& x, const GroupedLoraShape& shape, const OptionalTensor& weight, const OptionalTensor& bias,
               const OptionalTensor& base_out) {
  STD_TORCH_CHECK(weight.has_value() != base_out.has_value(), "give exactly one of weight and base_out");
  const ScalarType dtype = x.scalar_type();
  check_device(weight, x, "weight");
  check_device(bias, x, "bias");
  check_device(base_out, x, "base_out");
  if (base_out) {
    STD_TORCH_CHECK(!bias, "bias goes with weight; base_out already holds it");
    check_shape(*base_out, with_last_dim(x, shape.out_dim), "base_out");
    check_dtype(*base_out, dtype, "base_out", "of the dtype of x");
    return torch::stable::contiguous(*base_out);
  }
  check_shape(*weight, {shape.out_dim, shape.in_dim}, "weight");
  check_dtype(*weight, dtype, "weight", "of the dtype of x");
  if (bias) {
    check_shape(*bias, {shape.out_dim}, "bias");
    check_dtype(*bias, dtype, "bias", "of the dtype of x");
  }
  const Tensor out = base_forward(rows_of(x, shape.tokens), *weight);
  return torch::stable::view(out, with_last_dim(x, shape.out_dim));
}

std::tuple<Tensor, Tensor> grouped_lora(const Tensor& x, const Tensor& A, const Tensor& B, double scaling,
                                        const OptionalTensor& offsets, const OptionalTensor& group, double p,
                                        const OptionalTensor& rng, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const OptionalTensor& base_out,
                                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&) {
  const GroupedLoraShape shape = check_inputs(x, A, B);
  const ScalarType dtype = x.scalar_type();
  const Tensor xc = torch::stable::contiguous(x);
  const Tensor Ac = contiguous_as(A, dtype), Bc = contiguous_as(B, dtype);
  const Dropout dropout(p, rng);
  const GroupedRows rows(shape, x, offsets, group);
  const Tensor base = base_of(xc, shape, weight, bias, base_out);
  const OptionalTensor biasc = bias ? OptionalTensor(torch::stable::contiguous(*bias)) : std::nullopt;
  Tensor y = weight ? base : torch::stable::empty_like(base);
  Tensor z = torch::stable::new_empty(x, {shape.tokens, shape.rank}, acc_type(x));
  dispatch_dtype(x, "x", [&](auto type) {
    using T = decltype(type);
    Tensor workspace = empty_bytes(x, cpu::grouped_lora_forward_workspace(shape, p > 0));
    cpu::grouped_lora_forward<T>({shape, rows.view, dropout.view, scaling, data<T>(xc), data<T>(Ac), data<T>(Bc),
                                  data<T>(base), data<T>(biasc), mutable_data<Acc<T>>(z), mutable_data<T>(y),
                                  workspace.mutable_data_ptr()});
  });
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> grouped_lora_backward(const Tensor& dy, const OptionalTensor& dz, const Tensor& x,
                                                         const Tensor& z, const Tensor& A, const Tensor& B,
                                                         double scaling, const OptionalTensor& offsets,
                                                         const OptionalTensor& group, double p,
                                                         const OptionalTensor& rng, const OptionalTensor& weight,
                                                         bool need_dx) {
  const GroupedLoraShape shape = check_inputs(x, A, B);
  const ScalarType dtype = x.scalar_type(), acc = acc_type(x);
  check_shape(dy, with_last_dim(x, shape.out_dim), "dy");
  check_shape(z, {shape.tokens, shape.rank}, "z");
  check_device(dy, x, "dy");
  check_device(z, x, "z");
  check_device(dz, x, "dz");
  check_device(weight, x, "weight");
  if (dz) check_shape(*dz, {shape.tokens, shape.rank}, "dz");
  if (weight) {
    check_shape(*weight, {shape.out_dim, shape.in_dim}, "weight");
    check_dtype(*weight, dtype, "weight", "of the dtype of x");
  }
  const Tensor xc = torch::stable::contiguous(x), zc = contiguous_as(z, acc);
  const Tensor Ac = contiguous_as(A, dtype), Bc = contiguous_as(B, dtype), dyc = contiguous_as(dy, dtype);
  const OptionalTensor dzc = dz ? OptionalTensor(contiguous_as(*dz, acc)) : std::nullopt;
  const Dropout dropout(p, rng);
  const GroupedRows rows(shape, x, offsets, group);
  const bool has_base = need_dx && weight.has_value();
  Tensor dx =
      has_base ? torch::stable::view(base_backward(rows_of(dyc, shape.tokens), *weight), with_last_dim(x, shape.in_dim))
      : need_dx ? torch::stable::empty_like(xc)
                : torch::stable::new_empty(x, {0});
  Tensor dA = torch::stable::new_empty(A, std::vector<int64_t>(A.sizes().begin(), A.sizes().end()), acc);
  Tensor dB = torch::stable::new_empty(B, std::vector<int64_t>(B.sizes().begin(), B.sizes().end()), acc);
  dispatch_dtype(x, "x", [&](auto type) {
    using T = decltype(type);
    Tensor workspace = empty_bytes(x, cpu::grouped_lora_backward_workspace(shape, p > 0));
    T* dx_data = need_dx ? mutable_data<T>(dx) : nullptr;
    cpu::grouped_lora_backward<T>({shape, rows.view, dropout.view, scaling, data<T>(xc), data<Acc<T>>(zc), data<T>(Ac),
                                   data<T>(Bc), has_base ? dx_data : nullptr, data<T>(dyc), data<Acc<T>>(dzc), dx_data,
                                   mutable_data<Acc<T>>(dA), mutable_data<Acc<T>>(dB), workspace.mutable_data_ptr()});
  });
  return {dx, dA, dB};
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, CPU, m) {
  m.impl("grouped_lora", TORCH_BOX(&grouped_lora));
  m.impl("grouped_lora_backward", TORCH_BOX(&grouped_lora_backward));
}

}  // namespace
}  // namespace align
