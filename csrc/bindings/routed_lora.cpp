#include "ops/routed_lora.h"

#include "bindings/router.h"

namespace align {
namespace {

template <class Device>
std::tuple<Tensor, Tensor, Tensor> routed_lora(const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& R,
                                               double scaling, double offset_scaling, const OptionalTensor& A0,
                                               const OptionalTensor& B0, int64_t top_k, double tau, int64_t site,
                                               double p, const OptionalTensor& rng, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const OptionalTensor& base_out) {
  const HeadsAdapters adapters{A, B, A0, B0};
  const HeadsShape shape = check_heads(x, adapters, site, /*may_have_A_per_head=*/true);
  const Routing routing = check_router(shape, x, R, top_k, tau);
  const Device device(x);
  const ScalarType dtype = adapter_type(x, {A, B, R});
  const HeadsTensors in(shape, x, adapters, dtype, scaling, offset_scaling, p, rng);
  const Tensor Rc = contiguous_as(R, dtype);
  HeadsOutputs out(in, weight, bias, base_out, low_rank_first<Device>());
  Tensor w = make_empty(x, factor_sizes(shape, routing), acc_type(x));
  dispatch_types<Device>(x, dtype, [&]<typename T, typename TA>(T, TA) {
    RoutedLoraForwardArgs<T, TA> args{.routing = routing, .R = data<TA>(Rc), .w = mutable_data<Acc<T>>(w)};
    if constexpr (Device::kCuda) {
      const auto inputs = in.inputs<T, TA>();
      Tensor workspace = empty_bytes(x, cuda::routed_lora_forward_workspace(inputs, args.R, routing));
      args.projection = out.args<T, TA>(in, mutable_data<void>(workspace));
      cuda::routed_lora_forward<T, TA>(args, device.stream());
    } else {
      const auto workspace = host_bytes(cpu::routed_lora_forward_workspace(shape, routing, p > 0, sizeof(Acc<T>)));
      args.projection = out.args<T, TA>(in, workspace.get());
      cpu::routed_lora_forward<T, TA>(args);
    }
  });
  out.y.finish();
  return {out.y.out, out.z, w};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> routed_lora_backward(
    const Tensor& dy, const OptionalTensor& dz, const OptionalTensor& dw, const Tensor& x, const Tensor& z,
    const Tensor& w, const Tensor& A, const Tensor& B, const Tensor& R, double scaling, double offset_scaling,
    const OptionalTensor& A0, const OptionalTensor& B0, double tau, int64_t site, double p, const OptionalTensor& rng,
    const OptionalTensor& weight, bool need_dx) {
  const HeadsAdapters adapters{A, B, A0, B0};
  const HeadsShape shape = check_heads(x, adapters, site, /*may_have_A_per_head=*/true);
  const Routing routing = check_router(shape, x, R, shape.heads, tau);
  const Device device(x);
  const ScalarType dtype = adapter_type(x, {A, B, R});
  const HeadsTensors in(shape, x, adapters, dtype, scaling, offset_scaling, p, rng);
  check_factors(factor_sizes(shape, routing), x, w, dw);
  const Tensor Rc = contiguous_as(R, dtype), wc = contiguous_as(w, acc_type(x));
  const OptionalTensor dwc = contiguous_as(dw, acc_type(x));
  HeadsGradients out(in, adapters, dy, dz, z, weight);
  BaseProduct dx = dx_of(in.x, out.dy, weight, need_dx, low_rank_first<Device>());
  Tensor dR = like_adapter(R, x);
  dispatch_types<Device>(x, dtype, [&]<typename T, typename TA>(T, TA) {
    RoutedLoraBackwardArgs<T, TA> args{.routing = routing,
                                       .R = data<TA>(Rc),
                                       .w = data<Acc<T>>(wc),
                                       .dw_in = data<Acc<T>>(dwc),
                                       .dR = mutable_data<Acc<T>>(dR)};
    if constexpr (Device::kCuda) {
      const auto inputs = in.inputs<T, TA>();
      Tensor workspace = empty_bytes(x, cuda::routed_lora_backward_workspace(inputs, args.R, routing));
      args.projection = out.args<T, TA>(in, dx, need_dx, mutable_data<void>(workspace));
      cuda::routed_lora_backward<T, TA>(args, device.stream());
    } else {
      const auto workspace = host_bytes(cpu::routed_lora_backward_workspace(shape, routing, p > 0, sizeof(Acc<T>)));
      args.projection = out.args<T, TA>(in, dx, need_dx, workspace.get());
      cpu::routed_lora_backward<T, TA>(args);
    }
  });
  dx.finish();
  return {dx.out, out.dA, out.dB, dR};
}

template <class Device>
void implement(auto& m) {
  m.impl("routed_lora", TORCH_BOX(&routed_lora<Device>));
  m.impl("routed_lora_backward", TORCH_BOX(&routed_lora_backward<Device>));
}
ALIGN_IMPLEMENT_ON_DEVICES(implement)

}  // namespace
}  // namespace align
