#include "ops/grouped_lora.h"

#include "bindings/projection.h"

namespace align {

static std::vector<int64_t> latent_sizes(const GroupedLoraShape& shape) { return {shape.tokens, shape.rank}; }

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

// The order that group_rows found: rows [tokens] in the order of their groups, then offsets [groups + 1].
int64_t size_of_order(int64_t tokens, int64_t groups) { return tokens + groups + 1; }

// Checks the shapes of offsets and order, which say to which group a row belongs, but not their values.
void check_groups(const GroupedLoraShape& shape, const Tensor& like, const OptionalTensor& offsets,
                  const OptionalTensor& order) {
  ALIGN_CHECK(!(offsets && order), "give offsets or order, not both");
  ALIGN_CHECK(offsets || order || shape.groups == 1, "A holds ", shape.groups, " groups: give offsets or order");
  check_device(offsets, like, "offsets");
  check_device(order, like, "order");
  if (offsets) {
    check_shape(*offsets, {shape.groups + 1}, "offsets");
    check_dtype(*offsets, ScalarType::Long, "offsets", "int64");
  }
  if (order) {
    check_shape(*order, {size_of_order(shape.tokens, shape.groups)}, "order");
    check_dtype(*order, ScalarType::Long, "order", "int64");
  }
}

// The rows in group order, and where each group begins. Owns the arrays that RowGroups points to. On CUDA the kernels
// check the values of offsets.
template <class Device>
struct GroupedRows {
  std::array<int64_t, 2> whole;  // offsets of the only group, on the CPU
  Tensor given;
  RowGroups view = {nullptr, nullptr};

  GroupedRows(const GroupedLoraShape& shape, const Tensor& like, const OptionalTensor& offsets,
              const OptionalTensor& order)
      : whole{0, shape.tokens} {
    check_groups(shape, like, offsets, order);
    if (offsets || order) {
      given = as_contiguous(offsets ? *offsets : *order);
      const int64_t* const values = data<int64_t>(given);
      view = offsets ? RowGroups{nullptr, values} : RowGroups{values, values + shape.tokens};
      if constexpr (!Device::kCuda) check_values(shape);
    } else if (!Device::kCuda) {
      view.offsets = whole.data();
    }
  }
  GroupedRows(const GroupedRows&) = delete;  // view points into the object

 private:
  void check_values(const GroupedLoraShape& shape) const {
    const int64_t* o = view.offsets;
    bool valid = o[0] == 0 && o[shape.groups] == shape.tokens;
    for (int64_t k = 0; k < shape.groups; ++k) valid = valid && o[k] <= o[k + 1];
    ALIGN_CHECK(valid, "offsets must rise from 0 to the number of rows of x, ", shape.tokens);
    for (int64_t i = 0; view.rows && i < shape.tokens; ++i) {
      ALIGN_CHECK(view.rows[i] >= 0 && view.rows[i] < shape.tokens, "order must hold rows of x, 0 .. ",
                  shape.tokens - 1, ", got ", view.rows[i]);
    }
  }
};

template <class Device>
Tensor group_rows(const Tensor& group, int64_t groups) {
  ALIGN_CHECK(group.dim() == 1, "group must be [tokens], got ", shape_of(group));
  check_dtype(group, ScalarType::Long, "group", "int64");
  check_size(group.size(0), kMaxRows, "the rows of group");
  check_count(groups, "groups");
  const Device device(group);
  const int64_t tokens = group.size(0);
  const Tensor given = as_contiguous(group);
  Tensor order = make_empty(group, {size_of_order(tokens, groups)});
  const int64_t* const k = data<int64_t>(given);
  int64_t *const rows = mutable_data<int64_t>(order), *const offsets = rows + tokens;
  if constexpr (Device::kCuda) {  // which checks the values by itself
    cuda::group_rows(k, tokens, groups, rows, offsets, device.stream());
  } else {
    for (int64_t t = 0; t < tokens; ++t) {
      ALIGN_CHECK(k[t] >= 0 && k[t] < groups, "group must be in 0..", groups - 1, ", got ", k[t], " at row ", t);
    }
    cpu::group_rows(k, tokens, groups, rows, offsets);
  }
  return order;
}

template <class Device>
std::tuple<Tensor, Tensor> grouped_lora(const Tensor& x, const Tensor& A, const Tensor& B, double scaling,
                                        const OptionalTensor& offsets, const OptionalTensor& order, double p,
                                        const OptionalTensor& rng, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const OptionalTensor& base_out) {
  const GroupedLoraShape shape = check_inputs(x, A, B);
  const Device device(x);
  const ScalarType dtype = x.scalar_type(), adapters = adapter_type(x, {A, B});
  const Tensor xc = as_contiguous(x);
  const Tensor Ac = contiguous_as(A, adapters), Bc = contiguous_as(B, adapters);
  const Dropout dropout(p, rng, x);
  const GroupedRows<Device> rows(shape, x, offsets, order);
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
                                                         const OptionalTensor& order, double p,
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
  const GroupedRows<Device> rows(shape, x, offsets, order);
  BaseProduct dx = dx_of(xc, dyc, weight, need_dx, low_rank_first<Device>());
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
  m.impl("group_rows", TORCH_BOX(&group_rows<Device>));
  m.impl("grouped_lora", TORCH_BOX(&grouped_lora<Device>));
  m.impl("grouped_lora_backward", TORCH_BOX(&grouped_lora_backward<Device>));
}
ALIGN_IMPLEMENT_ON_DEVICES(implement)

}  // namespace
}  // namespace align
