#include "ops/dropout_sum.h"

#include "bindings/heads.h"

namespace align {
namespace {

template <class Device>
std::tuple<Tensor, Tensor> dropout_sum(const Tensor& x, const Tensor& A, const Tensor& B, double scaling,
                                       double offset_scaling, const OptionalTensor& A0, const OptionalTensor& B0,
                                       int64_t site, double p, const OptionalTensor& rng, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& base_out) {
  const HeadsAdapters adapters{A, B, A0, B0};
  const HeadsShape shape = check_heads(x, adapters, site, /*may_have_A_per_head=*/false);
  const Device device(x);
  const ScalarType dtype = adapter_type(x, {A, B});
  const HeadsTensors in(shape, x, adapters, dtype, scaling, offset_scaling, p, rng);
  HeadsOutputs out(in, weight, bias, base_out, low_rank_first<Device>());
  dispatch_types<Device>(x, dtype, [&]<typename T, typename TA>(T, TA) {
    if constexpr (Device::kCuda) {
      Tensor workspace = empty_bytes(x, cuda::dropout_sum_forward_workspace(in.inputs<T, TA>()));
      cuda::dropout_sum_forward<T, TA>(out.args<T, TA>(in, mutable_data<void>(workspace)), device.stream());
    } else {
      const auto workspace = host_bytes(cpu::dropout_sum_forward_workspace(shape, p > 0, sizeof(Acc<T>)));
      cpu::dropout_sum_forward<T, TA>(out.args<T, TA>(in, workspace.get()));
    }
  });
  out.y.finish();
  return {out.y.out, out.z};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> dropout_sum_backward(const Tensor& dy, const OptionalTensor& dz, const Tensor& x,
                                                        const Tensor& z, const Tensor& A, const Tensor& B,
                                                        double scaling, double offset_scaling, const OptionalTensor& A0,
                                                        const OptionalTensor& B0, int64_t site, double p,
                                                        const OptionalTensor& rng, const OptionalTensor& weight,
                                                        bool need_dx) {
  const HeadsAdapters adapters{A, B, A0, B0};
  const HeadsShape shape = check_heads(x, adapters, site, /*may_have_A_per_head=*/false);
  const Device device(x);
  const ScalarType dtype = adapter_type(x, {A, B});
  const HeadsTensors in(shape, x, adapters, dtype, scaling, offset_scaling, p, rng);
  HeadsGradients out(in, adapters, dy, dz, z, weight);
  BaseProduct dx = dx_of(in.x, out.dy, weight, need_dx, low_rank_first<Device>());
  dispatch_types<Device>(x, dtype, [&]<typename T, typename TA>(T, TA) {
    if constexpr (Device::kCuda) {
      Tensor workspace = empty_bytes(x, cuda::dropout_sum_backward_workspace(in.inputs<T, TA>()));
      cuda::dropout_sum_backward<T, TA>(out.args<T, TA>(in, dx, need_dx, mutable_data<void>(workspace)),
                                        device.stream());
    } else {
      const auto workspace = host_bytes(cpu::dropout_sum_backward_workspace(shape, p > 0, sizeof(Acc<T>)));
      cpu::dropout_sum_backward<T, TA>(out.args<T, TA>(in, dx, need_dx, workspace.get()));
    }
  });
  dx.finish();
  return {dx.out, out.dA, out.dB};
}

template <class Device>
void implement(auto& m) {
  m.impl("dropout_sum", TORCH_BOX(&dropout_sum<Device>));
  m.impl("dropout_sum_backward", TORCH_BOX(&dropout_sum_backward<Device>));
}
ALIGN_IMPLEMENT_ON_DEVICES(implement)

}  // namespace
}  // namespace align
