#include "bindings/routed_lora.h"

namespace align {
namespace {

std::tuple<Tensor, Tensor, Tensor> routed_lora(const Tensor& x, const Tensor& A, const Tensor& B, const Tensor& R,
                                               double scaling, double offset_scaling, const OptionalTensor& A0,
                                               const OptionalTensor& B0, int64_t top_k, double tau, int64_t site,
                                               double p, const OptionalTensor& rng, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const OptionalTensor& base_out) {
  const HeadsAdapters adapters{A, B, A0, B0};
  const HeadsShape shape = check_heads(x, adapters, site, /*may_own_A=*/true);
  const Routing routing = check_router(shape, x, R, top_k, tau);
  const ScalarType dtype = adapter_type(x, {A, B, R});
  const HeadsTensors in(shape, x, adapters, dtype, scaling, offset_scaling, p, rng);
  const Tensor Rc = contiguous_as(R, dtype);
  HeadsOutputs out(in, weight, bias, base_out);
  Tensor w = make_empty(x, factor_sizes(shape, routing), acc_type(x));
  dispatch_types(x, dtype, [&](auto type, auto adapter) {
    using T = decltype(type);
    using W = decltype(adapter);
    const auto workspace = host_bytes(cpu::routed_lora_forward_workspace(shape, routing, p > 0, sizeof(Acc<T>)));
    cpu::routed_lora_forward<T, W>(
        {out.args<T, W>(in, workspace.get()), routing, data<W>(Rc), mutable_data<Acc<T>>(w)});
  });
  return {out.y, out.z, w};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> routed_lora_backward(
    const Tensor& dy, const OptionalTensor& dz, const OptionalTensor& dw, const Tensor& x, const Tensor& z,
    const Tensor& w, const Tensor& A, const Tensor& B, const Tensor& R, double scaling, double offset_scaling,
    const OptionalTensor& A0, const OptionalTensor& B0, double tau, int64_t site, double p, const OptionalTensor& rng,
    const OptionalTensor& weight, bool need_dx) {
  const HeadsAdapters adapters{A, B, A0, B0};
  const HeadsShape shape = check_heads(x, adapters, site, /*may_own_A=*/true);
  const Routing routing = check_router(shape, x, R, shape.heads, tau);
  const ScalarType dtype = adapter_type(x, {A, B, R});
  const HeadsTensors in(shape, x, adapters, dtype, scaling, offset_scaling, p, rng);
  check_factors(factor_sizes(shape, routing), x, w, dw);
  const Tensor Rc = contiguous_as(R, dtype), wc = contiguous_as(w, acc_type(x));
  const OptionalTensor dwc = contiguous_as(dw, acc_type(x));
  HeadsGradients out(in, adapters, dy, dz, z, weight, need_dx);
  Tensor dR = like_adapter(R, x);
  dispatch_types(x, dtype, [&](auto type, auto adapter) {
    using T = decltype(type);
    using W = decltype(adapter);
    const auto workspace = host_bytes(cpu::routed_lora_backward_workspace(shape, routing, p > 0, sizeof(Acc<T>)));
    cpu::routed_lora_backward<T, W>({out.args<T, W>(in, workspace.get()), routing, data<W>(Rc), data<Acc<T>>(wc),
                                     data<Acc<T>>(dwc), mutable_data<Acc<T>>(dR)});
  });
  return {out.dx, out.dA, out.dB, dR};
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, CPU, m) {
  m.impl("routed_lora", TORCH_BOX(&routed_lora));
  m.impl("routed_lora_backward", TORCH_BOX(&routed_lora_backward));
}

}  // namespace
}  // namespace align
