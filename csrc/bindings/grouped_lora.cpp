#include "ops/grouped_lora.h"

#include "bindings/projection.h"

namespace align {

inline std::vector<int64_t> latent_sizes(const GroupedLoraShape& shape) { return {shape.tokens, shape.rank}; }

namespace {

GroupedLoraShape check_inputs(const Tensor& x, const Tensor& A, const Tensor& B) {
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

// Checks the shapes of offsets and group, which say to which group a row belongs, but not their values.
void check_groups(const GroupedLoraShape& shape, const Tensor& like, const OptionalTensor& offsets,
                  const OptionalTensor& group) {
  ALIGN_CHECK(!(offsets && group), "give offsets or group, not both");
  ALIGN_CHECK(offsets || group || shape.groups == 1, "A holds ", shape.groups, " groups: give offsets or group");
  check_device(offsets, like, "offsets");
  check_device(group, like, "group");
  if (offsets) {
    check_shape(*offsets, {shape.groups + 1}, "offsets");
    check_dtype(*offsets, ScalarType::Long, "offsets", "int64");
  }
  if (group) {
    check_shape(*group, {shape.tokens}, "group");
    check_dtype(*group, ScalarType::Long, "group", "int64");
  }
}

// The rows in group order, and where each group begins. Owns the arrays that RowGroups points to.
// On CUDA the kernels check the values of group and offsets.
template <class Device>
struct GroupedRows {
  std::array<int64_t, 2> whole;  // offsets of the only group, on the CPU
  Tensor sorted;                 // [tokens + groups + 1] rows, then offsets
  Tensor given;
  RowGroups view = {nullptr, nullptr};

  GroupedRows(const Device& device, const GroupedLoraShape& shape, const Tensor& like, const OptionalTensor& offsets,
              const OptionalTensor& group)
      : whole{0, shape.tokens} {
    check_groups(shape, like, offsets, group);
    if (offsets) {
      given = as_contiguous(*offsets);
      view.offsets = data<int64_t>(given);
      if constexpr (!Device::kCuda) check_offsets(shape);
    } else if (group) {
      given = as_contiguous(*group);
      if constexpr (!Device::kCuda) check_group(shape);
      sorted = make_empty(like, {shape.tokens + shape.groups + 1}, ScalarType::Long);
      int64_t *rows = mutable_data<int64_t>(sorted), *first = rows + shape.tokens;
      view = {rows, first};
      if constexpr (Device::kCuda) {
        cuda::group_rows(data<int64_t>(given), shape.tokens, shape.groups, rows, first, device.stream());
      } else {
        cpu::group_rows(data<int64_t>(given), shape.tokens, shape.groups, rows, first);
      }
    } else if (!Device::kCuda) {
      view.offsets = whole.data();
    }
  }
  GroupedRows(const GroupedRows&) = delete;  // view points into the object

 private:
  void check_offsets(const GroupedLoraShape& shape) const {
    const int64_t* o = view.offsets;
    bool valid = o[0] == 0 && o[shape.groups] == shape.tokens;
    for (int64_t k = 0; k < shape.groups; ++k) valid = valid && o[k] <= o[k + 1];
    ALIGN_CHECK(valid, "offsets must rise from 0 to the number of rows of x, ", shape.tokens);
  }

  void check_group(const GroupedLoraShape& shape) const {
    const int64_t* k = data<int64_t>(given);
    for (int64_t t = 0; t < shape.tokens; ++t)
      ALIGN_CHECK(k[t] >= 0 && k[t] < shape.groups, "group must be in 0..", shape.groups - 1, ", got ", k[t],
                  " at row ", t);
  }
};

template <class Device>
std::tuple<Tensor, Tensor> grouped_lora(const Tensor& x, const Tensor& A, const Tensor& B, double scaling,
                                        const OptionalTensor& offsets, const OptionalTensor& group, double p,
                                        const OptionalTensor& rng, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const OptionalTensor& base_out) {
  const GroupedLoraShape shape = check_inputs(x, A, B);
  const Device device(x);
  const ScalarType dtype = x.scalar_type(), adapters = adapter_type(x, {A, B});
  const Tensor xc = as_contiguous(x);
  const Tensor Ac = contiguous_as(A, adapters), Bc = contiguous_as(B, adapters);
  const Dropout dropout(p, rng, x);
  const GroupedRows<Device> rows(device, shape, x, offsets, group);
  BaseProduct y = output_of(xc, shape, weight, bias, base_out, low_rank_first<Device>());
  const OptionalTensor biasc = contiguous_as(bias, dtype);
  Tensor z = make_empty(x, {shape.tokens, shape.rank}, acc_type(x));
  dispatch_types<Device>(x, adapters, [&]<typename T, typename TA>(T, TA) {
    GroupedLoraForwardArgs<T, TA> args{.shape = shape,
                                       .row_groups = rows.view,
                                       .dropout = dropout.view,
                                       .scaling = scaling,
                                       .x = data<T>(xc),
                                       .A = data<TA>(Ac),
                                       .B = data<TA>(Bc),
                                       .y_in = data<T>(y.in),
                                       .bias = data<T>(biasc),
                                       .z = mutable_data<Acc<T>>(z),
                                       .y = mutable_data<T>(y.out)};
    if constexpr (Device::kCuda) {
      Tensor workspace = empty_bytes(x, cuda::grouped_lora_forward_workspace(shape, sizeof(T)));
      args.workspace = mutable_data<void>(workspace);
      cuda::grouped_lora_forward<T, TA>(args, device.stream());
    } else {
      const auto workspace = host_bytes(cpu::grouped_lora_forward_workspace(shape, p > 0, sizeof(Acc<T>)));
      args.workspace = workspace.get();
      cpu::grouped_lora_forward<T, TA>(args);
    }
  });
  y.finish();
  return {y.out, z};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> grouped_lora_backward(const Tensor& dy, const OptionalTensor& dz, const Tensor& x,
                                                         const Tensor& z, const Tensor& A, const Tensor& B,
                                                         double scaling, const OptionalTensor& offsets,
                                                         const OptionalTensor& group, double p,
                                                         const OptionalTensor& rng, const OptionalTensor& weight,
                                                         bool need_dx) {
  const GroupedLoraShape shape = check_inputs(x, A, B);
  check_gradients(shape, x, dy, dz, z, weight);
  const Device device(x);
  const ScalarType dtype = x.scalar_type(), acc = acc_type(x), adapters = adapter_type(x, {A, B});
  const Tensor xc = as_contiguous(x), zc = contiguous_as(z, acc), dyc = contiguous_as(dy, dtype);
  const Tensor Ac = contiguous_as(A, adapters), Bc = contiguous_as(B, adapters);
  const OptionalTensor dzc = contiguous_as(dz, acc);
  const Dropout dropout(p, rng, x);
  const GroupedRows<Device> rows(device, shape, x, offsets, group);
  BaseProduct dx = dx_of(shape, xc, dyc, weight, need_dx, low_rank_first<Device>());
  Tensor dA = like_adapter(A, x), dB = like_adapter(B, x);
  dispatch_types<Device>(x, adapters, [&]<typename T, typename TA>(T, TA) {
    GroupedLoraBackwardArgs<T, TA> args{.shape = shape,
                                        .row_groups = rows.view,
                                        .dropout = dropout.view,
                                        .scaling = scaling,
                                        .x = data<T>(xc),
                                        .z = data<Acc<T>>(zc),
                                        .A = data<TA>(Ac),
                                        .B = data<TA>(Bc),
                                        .dx_in = data<T>(dx.in),
                                        .dy = data<T>(dyc),
                                        .dz_in = data<Acc<T>>(dzc),
                                        .dx = need_dx ? mutable_data<T>(dx.out) : nullptr,
                                        .dA = mutable_data<Acc<T>>(dA),
                                        .dB = mutable_data<Acc<T>>(dB)};
    if constexpr (Device::kCuda) {
      Tensor workspace = empty_bytes(x, cuda::grouped_lora_backward_workspace(shape, sizeof(T)));
      args.workspace = mutable_data<void>(workspace);
      cuda::grouped_lora_backward<T, TA>(args, device.stream());
    } else {
      const auto workspace = host_bytes(cpu::grouped_lora_backward_workspace(shape, p > 0, sizeof(Acc<T>)));
      args.workspace = workspace.get();
      cpu::grouped_lora_backward<T, TA>(args);
    }
  });
  dx.finish();
  return {dx.out, dA, dB};
}

template <class Device>
void implement(auto& m) {
  m.impl("grouped_lora", TORCH_BOX(&grouped_lora<Device>));
  m.impl("grouped_lora_backward", TORCH_BOX(&grouped_lora_backward<Device>));
}
ALIGN_IMPLEMENT_ON_DEVICES(implement)

}  // namespace
}  // namespace align
