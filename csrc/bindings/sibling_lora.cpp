#include "ops/sibling_lora.h"

#include "bindings/router.h"

namespace align {
namespace {

using Tensors = std::vector<Tensor>;

void check_length(size_t length, size_t count, const char* name) {
  ALIGN_CHECK(length == count, name, " must have an element for each of the ", count, " layers, got ", length);
}

// Element i of a list that may be empty, in which a tensor without elements stands for none.
OptionalTensor optional(const Tensors& list, size_t i) {
  return list.empty() || list[i].numel() == 0 ? std::nullopt : OptionalTensor(list[i]);
}

// B of a layer as that of heads: without a dimension for these it has one.
Tensor heads_of(const Tensor& B) {
  if (B.dim() != 2) return B;
  return view_of<3>(B, {1, B.size(0), B.size(1)}, {B.size(0) * B.size(1), B.stride(0), B.stride(1)});
}

// All layers as the caller gave them. Of R, A0 and B0 there may be none.
struct Given {
  const Tensor& x;
  const Tensors &A, &B, &R, &A0, &B0, &weight;
  const std::vector<double>&scaling, &offset_scaling;
  int64_t site;
  double p;
  const OptionalTensor& rng;
  double tau;

  size_t count() const { return A.size(); }
  bool routed() const { return !R.empty(); }
  void check_lengths() const {
    ALIGN_CHECK(!A.empty() && count() <= kMaxSiblings, "A must hold the matrices of 1 to ", kMaxSiblings,
                " layers, got ", count());
    check_length(B.size(), count(), "B");
    check_length(weight.size(), count(), "weight");
    check_length(scaling.size(), count(), "scaling");
    check_length(offset_scaling.size(), count(), "offset_scaling");
    if (routed()) check_length(R.size(), count(), "R");
    if (!A0.empty()) check_length(A0.size(), count(), "A0");
    if (!B0.empty()) check_length(B0.size(), count(), "B0");
    ALIGN_CHECK(site != int64_t(DropoutSite::kInputPerHead),
                "site must be none, input or latent (0 .. 2) for layers with the same x, got 3");
  }
};

// The layers, checked, contiguous, with all adapters in one dtype.
struct Layers {
  std::vector<HeadsTensors> in;
  std::vector<Routing> routing;
  Tensors R;
  ScalarType adapters;

  Layers(const Given& given, int64_t top_k) {
    Tensors all = given.A;
    all.insert(all.end(), given.B.begin(), given.B.end());
    all.insert(all.end(), given.R.begin(), given.R.end());
    adapters = adapter_type(given.x, all);
    const Tensor x = as_contiguous(given.x);
    int64_t ranks = 0;
    for (size_t i = 0; i < given.count(); ++i) {
      const Tensor B = heads_of(given.B[i]);
      const OptionalTensor A0 = optional(given.A0, i), B0 = optional(given.B0, i);
      const HeadsAdapters of_layer{given.A[i], B, A0, B0};
      const HeadsShape shape = check_heads(x, of_layer, given.site, given.routed());
      ALIGN_CHECK(shape.rank > 0, "A of every layer must have a row at least");
      ALIGN_CHECK(i == 0 || shape.heads == in[0].shape.heads, "B of every layer must have the ", in[0].shape.heads,
                  " heads of the first one, got ", shape.heads);
      routing.push_back(given.routed() ? check_router(shape, x, given.R[i], top_k, given.tau) : Routing{0, 0, 1});
      ranks += ranks_of(shape, routing[i].groups * shape.heads);
      in.emplace_back(shape, x, of_layer, adapters, given.scaling[i], given.offset_scaling[i], given.p, given.rng);
      if (given.routed()) R.push_back(contiguous_as(given.R[i], adapters));
    }
    check_size(ranks, kMaxRanks, "the ranks of all layers together");
  }

  int count() const { return int(in.size()); }
  template <typename TA>
  const TA* router(size_t i) const {
    return R.empty() ? nullptr : data<TA>(R[i]);
  }
};

template <class Device>
std::tuple<Tensors, Tensors, Tensors> sibling_lora(const Tensor& x, const Tensors& A, const Tensors& B,
                                                   const Tensors& R, const std::vector<double>& scaling,
                                                   const std::vector<double>& offset_scaling, const Tensors& A0,
                                                   const Tensors& B0, int64_t top_k, double tau, int64_t site, double p,
                                                   const OptionalTensor& rng, const Tensors& weight,
                                                   const Tensors& bias) {
  const Given given{x, A, B, R, A0, B0, weight, scaling, offset_scaling, site, p, rng, tau};
  given.check_lengths();
  if (!bias.empty()) check_length(bias.size(), given.count(), "bias");
  const Device device(x);
  const Layers layers(given, top_k);
  std::vector<HeadsOutputs> out;
  Tensors y, z, w;
  for (size_t i = 0; i < given.count(); ++i) {
    out.emplace_back(layers.in[i], weight[i], optional(bias, i), std::nullopt, low_rank_first<Device>());
    y.push_back(out[i].y.out);
    z.push_back(out[i].z);
    const HeadsShape& shape = layers.in[i].shape;
    if (given.routed()) w.push_back(make_empty(x, factor_sizes(shape, layers.routing[i]), acc_type(x)));
  }
  dispatch_types<Device>(x, layers.adapters, [&]<typename T, typename TA>(T, TA) {
    SiblingLoraForwardArgs<T, TA> args{.count = layers.count(), .layers = {}, .workspace = nullptr};
    for (size_t i = 0; i < given.count(); ++i) {
      args.layers[i] = {.projection = out[i].args<T, TA>(layers.in[i], nullptr),
                        .routing = layers.routing[i],
                        .R = layers.router<TA>(i),
                        .w = given.routed() ? mutable_data<Acc<T>>(w[i]) : nullptr};
    }
    if constexpr (Device::kCuda) {
      Tensor workspace = empty_bytes(x, cuda::sibling_lora_workspace(args));
      args.workspace = mutable_data<void>(workspace);
      cuda::sibling_lora_forward<T, TA>(args, device.stream());
    } else {
      const auto workspace = host_bytes(cpu::sibling_lora_workspace(args));
      args.workspace = workspace.get();
      cpu::sibling_lora_forward<T, TA>(args);
    }
  });
  for (const HeadsOutputs& of_layer : out) of_layer.y.finish();
  return {y, z, w};
}

template <class Device>
std::tuple<Tensor, Tensors, Tensors, Tensors> sibling_lora_backward(
    const Tensors& dy, const Tensors& dz, const Tensors& dw, const Tensor& x, const Tensors& z, const Tensors& w,
    const Tensors& A, const Tensors& B, const Tensors& R, const std::vector<double>& scaling,
    const std::vector<double>& offset_scaling, const Tensors& A0, const Tensors& B0, double tau, int64_t site, double p,
    const OptionalTensor& rng, const Tensors& weight, bool need_dx) {
  const Given given{x, A, B, R, A0, B0, weight, scaling, offset_scaling, site, p, rng, tau};
  given.check_lengths();
  check_length(dy.size(), given.count(), "dy");
  check_length(z.size(), given.count(), "z");
  if (!dz.empty()) check_length(dz.size(), given.count(), "dz");
  if (!dw.empty()) check_length(dw.size(), given.count(), "dw");
  if (given.routed()) check_length(w.size(), given.count(), "w");
  const Device device(x);
  const Layers layers(given, /*top_k=*/1);
  std::vector<HeadsGradients> out;
  std::vector<BaseProduct::Factors> products;
  Tensors dA, dB, dR, wc;
  std::vector<OptionalTensor> dwc;
  for (size_t i = 0; i < given.count(); ++i) {
    const OptionalTensor none;
    out.emplace_back(layers.in[i], HeadsAdapters{A[i], B[i], none, none}, dy[i], optional(dz, i), z[i], weight[i]);
    products.push_back({out[i].dy, weight[i]});
    dA.push_back(out[i].dA);
    dB.push_back(out[i].dB);
    if (!given.routed()) continue;
    check_factors(factor_sizes(layers.in[i].shape, layers.routing[i]), x, w[i], optional(dw, i));
    wc.push_back(contiguous_as(w[i], acc_type(x)));
    dwc.push_back(contiguous_as(optional(dw, i), acc_type(x)));
    dR.push_back(like_adapter(R[i], x));
  }
  BaseProduct dx = dx_of(layers.in[0].x, products, need_dx, low_rank_first<Device>());
  dispatch_types<Device>(x, layers.adapters, [&]<typename T, typename TA>(T, TA) {
    SiblingLoraBackwardArgs<T, TA> args{.count = layers.count(), .layers = {}, .workspace = nullptr};
    for (size_t i = 0; i < given.count(); ++i) {
      args.layers[i] = {.projection = out[i].args<T, TA>(layers.in[i], dx, need_dx, nullptr),
                        .routing = layers.routing[i],
                        .R = layers.router<TA>(i),
                        .w = given.routed() ? data<Acc<T>>(wc[i]) : nullptr,
                        .dw_in = given.routed() ? data<Acc<T>>(dwc[i]) : nullptr,
                        .dR = given.routed() ? mutable_data<Acc<T>>(dR[i]) : nullptr};
    }
    if constexpr (Device::kCuda) {
      Tensor workspace = empty_bytes(x, cuda::sibling_lora_workspace(args));
      args.workspace = mutable_data<void>(workspace);
      cuda::sibling_lora_backward<T, TA>(args, device.stream());
    } else {
      const auto workspace = host_bytes(cpu::sibling_lora_workspace(args));
      args.workspace = workspace.get();
      cpu::sibling_lora_backward<T, TA>(args);
    }
  });
  dx.finish();
  return {dx.out, dA, dB, dR};
}

template <class Device>
void implement(auto& m) {
  m.impl("sibling_lora", TORCH_BOX(&sibling_lora<Device>));
  m.impl("sibling_lora_backward", TORCH_BOX(&sibling_lora_backward<Device>));
}
ALIGN_IMPLEMENT_ON_DEVICES(implement)

}  // namespace
}  // namespace align
