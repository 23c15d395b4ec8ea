#include "ops/sibling_lora.h"

#include "bindings/grouped_lora.h"

namespace align {
namespace {

using Tensors = std::vector<Tensor>;

void check_length(const Tensors& list, size_t count, const char* name) {
  ALIGN_CHECK(list.size() == count, name, " must have one tensor for each of the ", count, " layers, got ",
              list.size());
}

// Element i of a list that may be empty, in which a tensor without elements stands for none.
OptionalTensor optional(const Tensors& list, size_t i) {
  return list.empty() || list[i].numel() == 0 ? std::nullopt : OptionalTensor(list[i]);
}

SiblingLoraShape check_layers(const Tensor& x, const Tensors& A, const Tensors& B, const std::vector<double>& scaling,
                              const Tensors& weight) {
  ALIGN_CHECK(!A.empty() && A.size() <= kMaxSiblings, "A must hold the matrices of 1 to ", kMaxSiblings,
              " layers, got ", A.size());
  check_length(B, A.size(), "B");
  check_length(weight, A.size(), "weight");
  ALIGN_CHECK(scaling.size() == A.size(), "scaling must have a number for each of the ", A.size(), " layers, got ",
              scaling.size());
  SiblingLoraShape shape = {int(A.size()), {}};
  int64_t ranks = 0;
  for (size_t i = 0; i < A.size(); ++i) {
    ALIGN_CHECK(A[i].dim() == 2, "A of every layer must be [rank, in_dim], got ", shape_of(A[i]));
    shape.layers[i] = check_inputs(x, A[i], B[i]);
    ALIGN_CHECK(shape.layers[i].rank > 0, "A of every layer must have a row at least");
    ranks += (shape.layers[i].rank + 7) / 8 * 8;
  }
  check_size(ranks, kMaxRanks, "the ranks of all layers together");
  return shape;
}

// The inputs of both passes, contiguous, with all adapters in one dtype.
struct SiblingTensors {
  Tensor x;
  Tensors A, B;
  ScalarType adapters;
  Dropout dropout;

  SiblingTensors(const Tensor& given_x, const Tensors& given_A, const Tensors& given_B, double p,
                 const OptionalTensor& rng)
      : x(as_contiguous(given_x)), A(given_A), B(given_B), dropout(p, rng, given_x) {
    Tensors all = A;
    all.insert(all.end(), B.begin(), B.end());
    adapters = adapter_type(x, all);
    for (Tensors* of_layers : {&A, &B}) {
      for (Tensor& adapter : *of_layers) adapter = contiguous_as(adapter, adapters);
    }
  }
};

template <class Device>
std::tuple<Tensors, Tensors> sibling_lora(const Tensor& x, const Tensors& A, const Tensors& B,
                                          const std::vector<double>& scaling, double p, const OptionalTensor& rng,
                                          const Tensors& weight, const Tensors& bias) {
  const SiblingLoraShape shape = check_layers(x, A, B, scaling, weight);
  const size_t count = A.size();
  if (!bias.empty()) check_length(bias, count, "bias");
  const Device device(x);
  const SiblingTensors in(x, A, B, p, rng);
  std::vector<BaseProduct> products;
  std::vector<OptionalTensor> biases;
  Tensors y, z;
  for (size_t i = 0; i < count; ++i) {
    const GroupedLoraShape& layer = shape.layers[i];
    const OptionalTensor given = optional(bias, i);
    products.push_back(output_of(in.x, layer, weight[i], given, std::nullopt, low_rank_first<Device>()));
    biases.push_back(contiguous_as(given, x.scalar_type()));
    y.push_back(products[i].out);
    z.push_back(make_empty(x, latent_sizes(layer), acc_type(x)));
  }
  dispatch_types<Device>(x, in.adapters, [&]<typename T, typename TA>(T, TA) {
    SiblingLoraForwardArgs<T, TA> args{.count = shape.count, .layers = {}, .workspace = nullptr};
    const int64_t offsets[] = {0, tokens_of(x)};
    for (size_t i = 0; i < count; ++i) {
      args.layers[i] = {.shape = shape.layers[i],
                        .row_groups = {nullptr, Device::kCuda ? nullptr : offsets},
                        .dropout = in.dropout.view,
                        .scaling = scaling[i],
                        .x = data<T>(in.x),
                        .A = data<TA>(in.A[i]),
                        .B = data<TA>(in.B[i]),
                        .y_in = data<T>(products[i].in),
                        .bias = data<T>(biases[i]),
                        .z = mutable_data<Acc<T>>(z[i]),
                        .y = mutable_data<T>(products[i].out)};
    }
    if constexpr (Device::kCuda) {
      Tensor workspace = empty_bytes(x, cuda::sibling_lora_forward_workspace(shape, p > 0, sizeof(T)));
      args.workspace = mutable_data<void>(workspace);
      cuda::sibling_lora_forward<T, TA>(args, device.stream());
    } else {
      const auto workspace = host_bytes(cpu::sibling_lora_forward_workspace(shape, p > 0, sizeof(Acc<T>)));
      args.workspace = workspace.get();
      cpu::sibling_lora_forward<T, TA>(args);
    }
  });
  for (const BaseProduct& product : products) product.finish();
  return {y, z};
}

template <class Device>
std::tuple<Tensor, Tensors, Tensors> sibling_lora_backward(const Tensors& dy, const Tensors& dz, const Tensor& x,
                                                           const Tensors& z, const Tensors& A, const Tensors& B,
                                                           const std::vector<double>& scaling, double p,
                                                           const OptionalTensor& rng, const Tensors& weight,
                                                           bool need_dx) {
  const SiblingLoraShape shape = check_layers(x, A, B, scaling, weight);
  const size_t count = A.size();
  check_length(dy, count, "dy");
  check_length(z, count, "z");
  if (!dz.empty()) check_length(dz, count, "dz");
  for (size_t i = 0; i < count; ++i) {
    check_gradients(shape.layers[i], x, dy[i], optional(dz, i), z[i], weight[i]);
  }
  const Device device(x);
  const SiblingTensors in(x, A, B, p, rng);
  const int64_t tokens = tokens_of(x);
  Tensors dyc, zc, dA, dB;
  std::vector<OptionalTensor> dzc;
  for (size_t i = 0; i < count; ++i) {
    dyc.push_back(contiguous_as(dy[i], x.scalar_type()));
    zc.push_back(contiguous_as(z[i], acc_type(x)));
    dzc.push_back(contiguous_as(optional(dz, i), acc_type(x)));
    dA.push_back(like_adapter(A[i], x));
    dB.push_back(like_adapter(B[i], x));
  }
  Tensor dx = make_empty(x, need_dx ? sizes_of(x) : std::vector<int64_t>{0});
  const auto add_products = [&](bool onto_low_rank) {
    for (size_t i = 0; i < count && need_dx; ++i) {
      const Tensor rows = rows_of(dx, tokens), gradient = rows_of(dyc[i], tokens);
      if (i > 0 || onto_low_rank) {
        mm_add(gradient, weight[i], rows);
      } else {
        mm_out(gradient, weight[i], rows);
      }
    }
  };
  if (!low_rank_first<Device>()) add_products(/*onto_low_rank=*/false);
  dispatch_types<Device>(x, in.adapters, [&]<typename T, typename TA>(T, TA) {
    SiblingLoraBackwardArgs<T, TA> args{.count = shape.count, .layers = {}, .workspace = nullptr};
    const int64_t offsets[] = {0, tokens};
    for (size_t i = 0; i < count; ++i) {
      args.layers[i] = {.shape = shape.layers[i],
                        .row_groups = {nullptr, Device::kCuda ? nullptr : offsets},
                        .dropout = in.dropout.view,
                        .scaling = scaling[i],
                        .x = data<T>(in.x),
                        .z = data<Acc<T>>(zc[i]),
                        .A = data<TA>(in.A[i]),
                        .B = data<TA>(in.B[i]),
                        .dx_in = low_rank_first<Device>() || !need_dx ? nullptr : data<T>(dx),
                        .dy = data<T>(dyc[i]),
                        .dz_in = data<Acc<T>>(dzc[i]),
                        .dx = need_dx ? mutable_data<T>(dx) : nullptr,
                        .dA = mutable_data<Acc<T>>(dA[i]),
                        .dB = mutable_data<Acc<T>>(dB[i])};
    }
    if constexpr (Device::kCuda) {
      Tensor workspace = empty_bytes(x, cuda::sibling_lora_backward_workspace(shape, p > 0, sizeof(T)));
      args.workspace = mutable_data<void>(workspace);
      cuda::sibling_lora_backward<T, TA>(args, device.stream());
    } else {
      const auto workspace = host_bytes(cpu::sibling_lora_backward_workspace(shape, p > 0, sizeof(Acc<T>)));
      args.workspace = workspace.get();
      cpu::sibling_lora_backward<T, TA>(args);
    }
  });
  if (low_rank_first<Device>()) add_products(/*onto_low_rank=*/true);
  return {dx, dA, dB};
}

template <class Device>
void implement(auto& m) {
  m.impl("sibling_lora", TORCH_BOX(&sibling_lora<Device>));
  m.impl("sibling_lora_backward", TORCH_BOX(&sibling_lora_backward<Device>));
}
ALIGN_IMPLEMENT_ON_DEVICES(implement)

}  // namespace
}  // namespace align
