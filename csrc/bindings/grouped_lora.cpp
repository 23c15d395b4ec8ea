#include "bindings/grouped_lora.h"

namespace align {
namespace {

// The rows of each group. Owns the arrays that RowGroups points to.
struct GroupedRows {
  std::vector<int64_t> whole;  // offsets of the only group
  Tensor sorted;               // [tokens + groups + 1] rows, then offsets
  Tensor given;
  RowGroups view;

  GroupedRows(const GroupedLoraShape& shape, const Tensor& like, const OptionalTensor& offsets,
              const OptionalTensor& group) {
    check_groups(shape, like, offsets, group);
    if (offsets) {
      from_offsets(shape, *offsets);
    } else if (group) {
      from_group(shape, like, *group);
    } else {
      whole = {0, shape.tokens};
      view = {nullptr, whole.data()};
    }
  }

  void from_offsets(const GroupedLoraShape& shape, const Tensor& offsets) {
    given = as_contiguous(offsets);
    const int64_t* o = data<int64_t>(given);
    bool valid = o[0] == 0 && o[shape.groups] == shape.tokens;
    for (int64_t k = 0; k < shape.groups; ++k) valid = valid && o[k] <= o[k + 1];
    ALIGN_CHECK(valid, "offsets must rise from 0 to the number of rows of x, ", shape.tokens);
    view = {nullptr, o};
  }

  void from_group(const GroupedLoraShape& shape, const Tensor& like, const Tensor& group) {
    given = as_contiguous(group);
    const int64_t* k = data<int64_t>(given);
    for (int64_t t = 0; t < shape.tokens; ++t)
      ALIGN_CHECK(k[t] >= 0 && k[t] < shape.groups, "group must be in 0..", shape.groups - 1, ", got ", k[t],
                  " at row ", t);
    sorted = make_empty(like, {shape.tokens + shape.groups + 1}, ScalarType::Long);
    int64_t* rows = mutable_data<int64_t>(sorted);
    int64_t* offsets = rows + shape.tokens;
    cpu::group_rows(k, shape.tokens, shape.groups, rows, offsets);
    view = {rows, offsets};
  }
};

std::tuple<Tensor, Tensor> grouped_lora(const Tensor& x, const Tensor& A, const Tensor& B, double scaling,
                                        const OptionalTensor& offsets, const OptionalTensor& group, double p,
                                        const OptionalTensor& rng, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const OptionalTensor& base_out) {
  const GroupedLoraShape shape = check_inputs(x, A, B);
  const ScalarType dtype = x.scalar_type(), adapters = adapter_type(x, {A, B});
  const Tensor xc = as_contiguous(x);
  const Tensor Ac = contiguous_as(A, adapters), Bc = contiguous_as(B, adapters);
  const Dropout dropout(p, rng, x);
  const GroupedRows rows(shape, x, offsets, group);
  const Tensor base = base_of(xc, shape, weight, bias, base_out);
  const OptionalTensor biasc = contiguous_as(bias, dtype);
  Tensor y = weight ? base : make_empty(base, sizes_of(base));
  Tensor z = make_empty(x, {shape.tokens, shape.rank}, acc_type(x));
  dispatch_types(x, adapters, [&](auto type, auto adapter) {
    using T = decltype(type);
    using W = decltype(adapter);
    const auto workspace = host_bytes(cpu::grouped_lora_forward_workspace(shape, p > 0, sizeof(Acc<T>)));
    cpu::grouped_lora_forward<T, W>({shape, rows.view, dropout.view, scaling, data<T>(xc), data<W>(Ac), data<W>(Bc),
                                     data<T>(base), data<T>(biasc), mutable_data<Acc<T>>(z), mutable_data<T>(y),
                                     workspace.get()});
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
  check_gradients(shape, x, dy, dz, z, weight);
  const ScalarType dtype = x.scalar_type(), acc = acc_type(x), adapters = adapter_type(x, {A, B});
  const Tensor xc = as_contiguous(x), zc = contiguous_as(z, acc), dyc = contiguous_as(dy, dtype);
  const Tensor Ac = contiguous_as(A, adapters), Bc = contiguous_as(B, adapters);
  const OptionalTensor dzc = contiguous_as(dz, acc);
  const Dropout dropout(p, rng, x);
  const GroupedRows rows(shape, x, offsets, group);
  const bool has_base = need_dx && weight.has_value();
  Tensor dx = dx_of(shape, xc, dyc, weight, need_dx);
  Tensor dA = like_adapter(A, x), dB = like_adapter(B, x);
  dispatch_types(x, adapters, [&](auto type, auto adapter) {
    using T = decltype(type);
    using W = decltype(adapter);
    const auto workspace = host_bytes(cpu::grouped_lora_backward_workspace(shape, p > 0, sizeof(Acc<T>)));
    T* dx_data = need_dx ? mutable_data<T>(dx) : nullptr;
    cpu::grouped_lora_backward<T, W>({shape, rows.view, dropout.view, scaling, data<T>(xc), data<Acc<T>>(zc),
                                      data<W>(Ac), data<W>(Bc), has_base ? dx_data : nullptr, data<T>(dyc),
                                      data<Acc<T>>(dzc), dx_data, mutable_data<Acc<T>>(dA), mutable_data<Acc<T>>(dB),
                                      workspace.get()});
  });
  return {dx, dA, dB};
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, CPU, m) {
  m.impl("grouped_lora", TORCH_BOX(&grouped_lora));
  m.impl("grouped_lora_backward", TORCH_BOX(&grouped_lora_backward));
}

}  // namespace
}  // namespace align
