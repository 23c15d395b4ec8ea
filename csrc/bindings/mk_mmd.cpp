#include "bindings/mk_mmd.h"

namespace align {
namespace {

MkMmdOutputs mk_mmd(const Tensor& z, const Tensor& task, int64_t num_tasks, std::vector<double> bandwidths,
                    int64_t num_kernels, bool u_statistic, int64_t n_max, bool mean_pairs) {
  const MkMmdOptions options{num_tasks, std::move(bandwidths), num_kernels, u_statistic, n_max, mean_pairs};
  check_mk_mmd(z, task, options);
  const Tensor zc = as_contiguous(z), taskc = as_contiguous(task);
  MkMmdOutputs outputs = empty_mk_mmd(z, options);
  dispatch_dtype(z, "z", [&](auto type) {
    using T = decltype(type);
    MkMmdArgs<T> args = mk_mmd_args<T>(zc, taskc, options, outputs);
    const auto workspace = host_bytes(cpu::mk_mmd_workspace(args));
    args.workspace = workspace.get();
    cpu::mk_mmd(args);
  });
  return outputs;
}

Tensor mk_mmd_backward(const Tensor& d_loss, const Tensor& gradient, const Tensor& slot, ScalarType dtype) {
  check_mk_mmd_backward(d_loss, gradient, slot, dtype);
  Tensor dz = make_empty(gradient, {slot.size(0), gradient.size(1)}, dtype);
  const Tensor gc = contiguous_as(gradient, acc_type(dz)), dc = contiguous_as(d_loss, acc_type(dz));
  const Tensor sc = as_contiguous(slot);
  const int32_t* const slots = data<int32_t>(sc);
  for (int64_t t = 0; t < sc.size(0); ++t) {
    ALIGN_CHECK(slots[t] < gc.size(0), "slot must be below the rows of gradient, ", gc.size(0), ", got ", slots[t]);
  }
  dispatch_dtype(dz, "z", [&](auto type) {
    using T = decltype(type);
    cpu::mk_mmd_backward<T>(
        {dz.size(0), dz.size(1), gc.size(0), data<Acc<T>>(gc), slots, data<Acc<T>>(dc), mutable_data<T>(dz)});
  });
  return dz;
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, CPU, m) {
  m.impl("mk_mmd", TORCH_BOX(&mk_mmd));
  m.impl("mk_mmd_backward", TORCH_BOX(&mk_mmd_backward));
}

}  // namespace
}  // namespace align
