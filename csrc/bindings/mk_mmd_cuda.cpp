#include "bindings/device.h"
#include "bindings/mk_mmd.h"

namespace align {
namespace {

MkMmdOutputs mk_mmd(const Tensor& z, const Tensor& task, int64_t num_tasks, std::vector<double> bandwidths,
                    int64_t num_kernels, bool u_statistic, int64_t n_max, bool mean_pairs) {
  const MkMmdOptions options{num_tasks, std::move(bandwidths), num_kernels, u_statistic, n_max, mean_pairs};
  check_mk_mmd(z, task, options);
  const Device device(z);
  const Tensor zc = as_contiguous(z), taskc = as_contiguous(task);
  MkMmdOutputs outputs = empty_mk_mmd(z, options);
  dispatch_cuda_dtype(z, "z", [&](auto type) {
    using T = decltype(type);
    MkMmdArgs<T> args = mk_mmd_args<T>(zc, taskc, options, outputs);
    Tensor workspace = empty_bytes(z, cuda::mk_mmd_workspace(args));
    args.workspace = mutable_data<void>(workspace);
    cuda::mk_mmd(args, device.stream());
  });
  return outputs;
}

Tensor mk_mmd_backward(const Tensor& d_loss, const Tensor& gradient, const Tensor& slot, ScalarType dtype) {
  check_mk_mmd_backward(d_loss, gradient, slot, dtype);
  const Device device(gradient);
  Tensor dz = make_empty(gradient, {slot.size(0), gradient.size(1)}, dtype);
  const Tensor gc = contiguous_as(gradient, ScalarType::Float), dc = contiguous_as(d_loss, ScalarType::Float);
  const Tensor sc = as_contiguous(slot);
  dispatch_cuda_dtype(dz, "z", [&](auto type) {
    using T = decltype(type);
    cuda::mk_mmd_backward<T>(
        {dz.size(0), dz.size(1), gc.size(0), data<float>(gc), data<int32_t>(sc), data<float>(dc), mutable_data<T>(dz)},
        device.stream());
  });
  return dz;
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, ALIGN_DEVICE_KEY, m) {
  m.impl("mk_mmd", TORCH_BOX(&mk_mmd));
  m.impl("mk_mmd_backward", TORCH_BOX(&mk_mmd_backward));
}

}  // namespace
}  // namespace align
