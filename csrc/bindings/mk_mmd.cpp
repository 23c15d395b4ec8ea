#include "ops/mk_mmd.h"

#include <tuple>
#include <vector>

#include "bindings/device.h"

namespace align {
namespace {

// loss, gradient, slot
using MkMmdOutputs = std::tuple<Tensor, Tensor, Tensor>;

struct MkMmdOptions {
  int64_t tasks;
  std::vector<double> bandwidths;  // empty: heuristic
  int64_t num_kernels;             // for the heuristic
  bool u_statistic;
  int64_t n_max;
  bool mean_pairs;

  MmdKernels kernels() const {
    return bandwidths.empty() ? heuristic_kernels(int(num_kernels))
                              : given_kernels(bandwidths.data(), int(bandwidths.size()));
  }
};

void check_mk_mmd(const Tensor& z, const Tensor& task, const MkMmdOptions& options) {
  ALIGN_CHECK(z.dim() == 2, "z must be [tokens, rank], got ", shape_of(z));
  check_floating(z, "z");
  check_shape(task, {z.size(0)}, "task");
  check_device(task, z, "task");
  check_dtype(task, ScalarType::Long, "task", "int64");
  check_size(z.size(0), kMaxRows, "the rows of z");
  check_size(z.size(1), kMaxColumns, "the rank of z");
  check_count(options.tasks, "num_tasks");
  ALIGN_CHECK(options.n_max >= 2, "n_max must be at least 2, got ", options.n_max);
  const int64_t count = options.bandwidths.empty() ? options.num_kernels : int64_t(options.bandwidths.size());
  ALIGN_CHECK(count >= 1 && count <= kMaxMmdKernels, "there must be 1 to ", kMaxMmdKernels, " kernels, got ", count);
  for (double bandwidth : options.bandwidths) {
    ALIGN_CHECK(bandwidth > 0 && std::isfinite(bandwidth), "bandwidths must be positive, got ", bandwidth);
  }
}

MkMmdOutputs empty_mk_mmd(const Tensor& z, const MkMmdOptions& options) {
  const int64_t rows = mmd_rows(z.size(0), options.tasks, options.n_max);
  return {make_empty(z, {}, acc_type(z)), make_empty(z, {rows, z.size(1)}, acc_type(z)),
          make_empty(z, {z.size(0)}, ScalarType::Int)};
}

// The arguments of the kernels, without a workspace.
template <typename T>
MkMmdArgs<T> mk_mmd_args(const Tensor& z, const Tensor& task, const MkMmdOptions& options, MkMmdOutputs& outputs) {
  auto& [loss, gradient, slot] = outputs;
  return {.tokens = z.size(0),
          .rank = z.size(1),
          .tasks = options.tasks,
          .n_max = options.n_max,
          .u_statistic = options.u_statistic,
          .mean_pairs = options.mean_pairs,
          .z = data<T>(z),
          .task = data<int64_t>(task),
          .loss = mutable_data<Acc<T>>(loss),
          .gradient = mutable_data<Acc<T>>(gradient),
          .slot = mutable_data<int32_t>(slot),
          .workspace = nullptr,
          .kernels = options.kernels()};
}

void check_mk_mmd_backward(const Tensor& d_loss, const Tensor& gradient, const Tensor& slot, ScalarType dtype) {
  ALIGN_CHECK(gradient.dim() == 2, "gradient must be [rows, rank], got ", shape_of(gradient));
  ALIGN_CHECK(slot.dim() == 1, "slot must be [tokens], got ", shape_of(slot));
  ALIGN_CHECK(d_loss.numel() == 1, "d_loss must hold one value, got ", shape_of(d_loss));
  check_floating(d_loss, "d_loss");
  check_accumulated(gradient, gradient, "gradient");
  check_size(slot.size(0), kMaxRows, "the rows of slot");
  check_size(gradient.size(0), kMaxRows, "the rows of gradient");
  check_size(gradient.size(1), kMaxColumns, "the rank of gradient");
  ALIGN_CHECK(is_floating(dtype), "dtype must be float32, bfloat16, float16 or float64, got ", name_of(dtype));
  check_dtype(slot, ScalarType::Int, "slot", "int32");
  check_device(d_loss, gradient, "d_loss");
  check_device(slot, gradient, "slot");
}

template <class Device>
MkMmdOutputs mk_mmd(const Tensor& z, const Tensor& task, int64_t num_tasks, std::vector<double> bandwidths,
                    int64_t num_kernels, bool u_statistic, int64_t n_max, bool mean_pairs) {
  const MkMmdOptions options{num_tasks, std::move(bandwidths), num_kernels, u_statistic, n_max, mean_pairs};
  check_mk_mmd(z, task, options);
  const Device device(z);
  const Tensor zc = as_contiguous(z), taskc = as_contiguous(task);
  MkMmdOutputs outputs = empty_mk_mmd(z, options);
  dispatch_dtype<Device>(z, "z", [&]<typename T>(T) {
    MkMmdArgs<T> args = mk_mmd_args<T>(zc, taskc, options, outputs);
    if constexpr (Device::kCuda) {
      Tensor workspace = empty_bytes(z, cuda::mk_mmd_workspace(args));
      args.workspace = mutable_data<void>(workspace);
      cuda::mk_mmd(args, device.stream());
    } else {
      const auto workspace = host_bytes(cpu::mk_mmd_workspace(args));
      args.workspace = workspace.get();
      cpu::mk_mmd(args);
    }
  });
  return outputs;
}

template <class Device>
Tensor mk_mmd_backward(const Tensor& d_loss, const Tensor& gradient, const Tensor& slot, ScalarType dtype) {
  check_mk_mmd_backward(d_loss, gradient, slot, dtype);
  const Device device(gradient);
  Tensor dz = make_empty(gradient, {slot.size(0), gradient.size(1)}, dtype);
  const Tensor gc = contiguous_as(gradient, acc_type(dz)), dc = contiguous_as(d_loss, acc_type(dz));
  const Tensor sc = as_contiguous(slot);
  const int32_t* const slots = data<int32_t>(sc);
  for (int64_t t = 0; !Device::kCuda && t < sc.size(0); ++t) {  // the CUDA kernel checks by itself
    ALIGN_CHECK(slots[t] < gc.size(0), "slot must be below the rows of gradient, ", gc.size(0), ", got ", slots[t]);
  }
  dispatch_dtype<Device>(dz, "z", [&]<typename T>(T) {
    const MkMmdBackwardArgs<T> args{.tokens = dz.size(0),
                                    .rank = dz.size(1),
                                    .rows = gc.size(0),
                                    .gradient = data<Acc<T>>(gc),
                                    .slot = slots,
                                    .d_loss = data<Acc<T>>(dc),
                                    .dz = mutable_data<T>(dz)};
    if constexpr (Device::kCuda) {
      cuda::mk_mmd_backward<T>(args, device.stream());
    } else {
      cpu::mk_mmd_backward<T>(args);
    }
  });
  return dz;
}

template <class Device>
void implement(auto& m) {
  m.impl("mk_mmd", TORCH_BOX(&mk_mmd<Device>));
  m.impl("mk_mmd_backward", TORCH_BOX(&mk_mmd_backward<Device>));
}
ALIGN_IMPLEMENT_ON_DEVICES(implement)

}  // namespace
}  // namespace align
