#include "bindings/device.h"
#include "bindings/routed_lora.h"

namespace align {
namespace {

struct Checked {
  HeadsShape shape;
  Routing routing;

  Checked(const Tensor& x, const HeadsAdapters& adapters, const Tensor& R, int64_t top_k, double tau, int64_t site)
      : shape(check_heads(x, adapters, site, /*may_own_A=*/true)) {
    routing = check_router(shape, x, R, top_k < 0 ? shape.heads : top_k, tau);
  }
};

std::tuple<Tensor, Tensor, Tensor> routed_lora(const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& R,
                                               double scaling, double offset_scaling, const OptionalTensor& A0,
                                               const OptionalTensor& B0, int64_t top_k, double tau, int64_t site,
                                               double p, const OptionalTensor& rng, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const OptionalTensor& base_out) {
  const HeadsAdapters adapters{A, B, A0, B0};
  const Checked checked(x, adapters, R, top_k, tau, site);
  const Device device(x);
  const ScalarType dtype = adapter_type(x, {A, B, R});
  const HeadsTensors in(checked.shape, x, adapters, dtype, scaling, offset_scaling, p, rng);
  const Tensor Rc = contiguous_as(R, dtype);
  HeadsOutputs out(in, weight, bias, base_out);
  Tensor w = make_empty(x, factor_sizes(checked.shape, checked.routing), ScalarType::Float);
  dispatch_cuda_types(x, dtype, [&](auto type, auto adapter) {
    using T = decltype(type);
    using W = decltype(adapter);
    const auto inputs = in.inputs<T, W>();
    Tensor workspace = empty_bytes(x, cuda::routed_lora_forward_workspace(inputs, data<W>(Rc), checked.routing));
    cuda::routed_lora_forward<T, W>(
        {out.args<T, W>(in, mutable_data<void>(workspace)), checked.routing, data<W>(Rc), mutable_data<float>(w)},
        device.stream());
  });
  return {out.y, out.z, w};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> routed_lora_backward(
    const Tensor& dy, const OptionalTensor& dz, const OptionalTensor& dw, const Tensor& x, const Tensor& z,
    const Tensor& w, const Tensor& A, const Tensor& B, const Tensor& R, double scaling, double offset_scaling,
    const OptionalTensor& A0, const OptionalTensor& B0, double tau, int64_t site, double p, const OptionalTensor& rng,
    const OptionalTensor& weight, bool need_dx) {
  const HeadsAdapters adapters{A, B, A0, B0};
  const Checked checked(x, adapters, R, /*top_k=*/-1, tau, site);  // w is 0 outside of the top k
  check_factors(factor_sizes(checked.shape, checked.routing), x, w, dw);
  const Device device(x);
  const ScalarType dtype = adapter_type(x, {A, B, R});
  const HeadsTensors in(checked.shape, x, adapters, dtype, scaling, offset_scaling, p, rng);
  const Tensor Rc = contiguous_as(R, dtype), wc = contiguous_as(w, ScalarType::Float);
  const OptionalTensor dwc = contiguous_as(dw, ScalarType::Float);
  HeadsGradients out(in, adapters, dy, dz, z, weight, need_dx);
  Tensor dR = like_adapter(R, x);
  dispatch_cuda_types(x, dtype, [&](auto type, auto adapter) {
    using T = decltype(type);
    using W = decltype(adapter);
    const auto inputs = in.inputs<T, W>();
    Tensor workspace = empty_bytes(x, cuda::routed_lora_backward_workspace(inputs, data<W>(Rc), checked.routing));
    cuda::routed_lora_backward<T, W>({out.args<T, W>(in, mutable_data<void>(workspace)), checked.routing, data<W>(Rc),
                                      data<float>(wc), data<float>(dwc), mutable_data<float>(dR)},
                                     device.stream());
  });
  return {out.dx, out.dA, out.dB, dR};
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, ALIGN_DEVICE_KEY, m) {
  m.impl("routed_lora", TORCH_BOX(&routed_lora));
  m.impl("routed_lora_backward", TORCH_BOX(&routed_lora_backward));
}

}  // namespace
}  // namespace align
