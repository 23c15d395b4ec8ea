#include "bindings/device.h"
#include "bindings/grouped_lora.h"

namespace align {
namespace {

// The rows of each group, on the device, where their values are checked. Owns the arrays that RowGroups points to.
struct GroupedRows {
  Tensor sorted;  // [tokens + groups + 1] rows, then offsets
  Tensor given;
  RowGroups view = {nullptr, nullptr};

  GroupedRows(const GroupedLoraShape& shape, const Tensor& like, const OptionalTensor& offsets,
              const OptionalTensor& group, Stream stream) {
    check_groups(shape, like, offsets, group);
    if (offsets) {
      given = as_contiguous(*offsets);
      view.offsets = data<int64_t>(given);
    } else if (group) {
      given = as_contiguous(*group);
      sorted = make_empty(like, {shape.tokens + shape.groups + 1}, ScalarType::Long);
      int64_t* rows = mutable_data<int64_t>(sorted);
      view = {rows, rows + shape.tokens};
      cuda::group_rows(data<int64_t>(given), shape.tokens, shape.groups, rows, rows + shape.tokens, stream);
    }
  }
};

std::tuple<Tensor, Tensor> grouped_lora(const Tensor& x, const Tensor& A, const Tensor& B, double scaling,
                                        const OptionalTensor& offsets, const OptionalTensor& group, double p,
                                        const OptionalTensor& rng, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const OptionalTensor& base_out) {
  const GroupedLoraShape shape = check_inputs(x, A, B);
  const Device device(x);
  const Tensor xc = as_contiguous(x);
  const ScalarType adapters = adapter_type(x, {A, B});
  const Tensor Ac = contiguous_as(A, adapters), Bc = contiguous_as(B, adapters);
  const Dropout dropout(p, rng, x);
  const GroupedRows rows(shape, x, offsets, group, device.stream());
  const Tensor base = base_of(xc, shape, weight, bias, base_out);
  const OptionalTensor biasc = contiguous_as(bias, x.scalar_type());
  Tensor y = weight ? base : make_empty(base, sizes_of(base));
  Tensor z = make_empty(x, {shape.tokens, shape.rank}, ScalarType::Float);
  dispatch_cuda_types(x, adapters, [&](auto type, auto adapter) {
    using T = decltype(type);
    using W = decltype(adapter);
    Tensor workspace = empty_bytes(x, cuda::grouped_lora_forward_workspace(shape, sizeof(T)));
    cuda::grouped_lora_forward<T, W>(
        {shape, rows.view, dropout.view, scaling, data<T>(xc), data<W>(Ac), data<W>(Bc), data<T>(base), data<T>(biasc),
         mutable_data<float>(z), mutable_data<T>(y), mutable_data<void>(workspace)},
        device.stream());
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
  const Device device(x);
  const Tensor xc = as_contiguous(x), zc = contiguous_as(z, ScalarType::Float);
  const Tensor dyc = contiguous_as(dy, x.scalar_type());
  const OptionalTensor dzc = contiguous_as(dz, ScalarType::Float);
  const ScalarType adapters = adapter_type(x, {A, B});
  const Tensor Ac = contiguous_as(A, adapters), Bc = contiguous_as(B, adapters);
  const Dropout dropout(p, rng, x);
  const GroupedRows rows(shape, x, offsets, group, device.stream());
  const bool has_base = need_dx && weight.has_value();
  Tensor dx = dx_of(shape, xc, dyc, weight, need_dx);
  Tensor dA = like_adapter(A, x), dB = like_adapter(B, x);
  dispatch_cuda_types(x, adapters, [&](auto type, auto adapter) {
    using T = decltype(type);
    using W = decltype(adapter);
    Tensor workspace = empty_bytes(x, cuda::grouped_lora_backward_workspace(shape, sizeof(T)));
    cuda::grouped_lora_backward<T, W>(
        {shape, rows.view, dropout.view, scaling, data<T>(xc), data<float>(zc), data<W>(Ac), data<W>(Bc),
         has_base ? data<T>(dx) : nullptr, data<T>(dyc), data<float>(dzc), need_dx ? mutable_data<T>(dx) : nullptr,
         mutable_data<float>(dA), mutable_data<float>(dB), mutable_data<void>(workspace)},
        device.stream());
  });
  return {dx, dA, dB};
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, ALIGN_DEVICE_KEY, m) {
  m.impl("grouped_lora", TORCH_BOX(&grouped_lora));
  m.impl("grouped_lora_backward", TORCH_BOX(&grouped_lora_backward));
}

}  // namespace
}  // namespace align
