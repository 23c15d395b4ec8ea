#include "ops/dropout_sum.h"

#include "bindings/heads.h"

namespace align {
namespace {

std::tuple<Tensor, Tensor> dropout_sum(const Tensor& x, const Tensor& A, const Tensor& B, double scaling,
                                       double offset_scaling, const OptionalTensor& A0, const OptionalTensor& B0,
                                       int64_t site, double p, const OptionalTensor& rng, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& base_out) {
  const HeadsAdapters adapters{A, B, A0, B0};
  const HeadsShape shape = check_heads(x, adapters, site, /*may_own_A=*/false);
  const ScalarType dtype = adapter_type(x, {A, B});
  const HeadsTensors in(shape, x, adapters, dtype, scaling, offset_scaling, p, rng);
  HeadsOutputs out(in, weight, bias, base_out);
  dispatch_types(x, dtype, [&](auto type, auto adapter) {
    using T = decltype(type);
    using W = decltype(adapter);
    const auto workspace = host_bytes(cpu::dropout_sum_forward_workspace(shape, p > 0, sizeof(Acc<T>)));
    cpu::dropout_sum_forward<T, W>(out.args<T, W>(in, workspace.get()));
  });
  return {out.y, out.z};
}

std::tuple<Tensor, Tensor, Tensor> dropout_sum_backward(const Tensor& dy, const OptionalTensor& dz, const Tensor& x,
                                                        const Tensor& z, const Tensor& A, const Tensor& B,
                                                        double scaling, double offset_scaling, const OptionalTensor& A0,
                                                        const OptionalTensor& B0, int64_t site, double p,
                                                        const OptionalTensor& rng, const OptionalTensor& weight,
                                                        bool need_dx) {
  const HeadsAdapters adapters{A, B, A0, B0};
  const HeadsShape shape = check_heads(x, adapters, site, /*may_own_A=*/false);
  const ScalarType dtype = adapter_type(x, {A, B});
  const HeadsTensors in(shape, x, adapters, dtype, scaling, offset_scaling, p, rng);
  HeadsGradients out(in, adapters, dy, dz, z, weight, need_dx);
  dispatch_types(x, dtype, [&](auto type, auto adapter) {
    using T = decltype(type);
    using W = decltype(adapter);
    const auto workspace = host_bytes(cpu::dropout_sum_backward_workspace(shape, p > 0, sizeof(Acc<T>)));
    cpu::dropout_sum_backward<T, W>(out.args<T, W>(in, workspace.get()));
  });
  return {out.dx, out.dA, out.dB};
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, CPU, m) {
  m.impl("dropout_sum", TORCH_BOX(&dropout_sum));
  m.impl("dropout_sum_backward", TORCH_BOX(&dropout_sum_backward));
}

}  // namespace
}  // namespace align
