#include "ops/mk_mmd.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "bindings/latents.h"

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

void check_options(const MkMmdOptions& options) {
  check_count(options.tasks, "num_tasks");
  ALIGN_CHECK(options.n_max >= 2, "n_max must be at least 2, got ", options.n_max);
  const int64_t count = options.bandwidths.empty() ? options.num_kernels : int64_t(options.bandwidths.size());
  ALIGN_CHECK(count >= 1 && count <= kMaxMmdKernels, "there must be 1 to ", kMaxMmdKernels, " kernels, got ", count);
  for (double bandwidth : options.bandwidths) {
    ALIGN_CHECK(bandwidth > 0 && std::isfinite(bandwidth), "bandwidths must be positive, got ", bandwidth);
  }
}

int64_t largest_rank(const std::vector<Tensor>& z) {
  int64_t rank = 0;
  for (const Tensor& layer : z) {
    ALIGN_CHECK(layer.dim() == 2, "z must be [tokens, rank], got ", shape_of(layer));
    check_size(layer.size(1), kMaxColumns, "the rank of z");
    rank = std::max(rank, layer.size(1));
  }
  return rank;
}

MkMmdOutputs empty_mk_mmd(const LatentTensors& latents, const MkMmdOptions& options) {
  const Tensor& z = latents.z[0];
  const int64_t rows = mmd_rows(latents.tokens, options.tasks, options.n_max);
  return {make_empty(z, {latents.layers()}, acc_type(z)),
          make_empty(z, {latents.layers(), rows, latents.rank}, acc_type(z)),
          make_empty(z, {latents.tokens}, ScalarType::Int)};
}

// The arguments of the kernels, without a workspace.
template <typename T>
MkMmdArgs<T> mk_mmd_args(const LatentTensors& latents, const T* const* z, const MkMmdOptions& options,
                         MkMmdOutputs& outputs) {
  auto& [loss, gradient, slot] = outputs;
  return {.layers = latents.layers(),
          .tokens = latents.tokens,
          .rank = latents.rank,
          .tasks = options.tasks,
          .n_max = options.n_max,
          .u_statistic = options.u_statistic,
          .mean_pairs = options.mean_pairs,
          .z = z,
          .ranks = latents.ranks.data(),
          .strides = latents.strides.data(),
          .task = data<int64_t>(latents.task),
          .loss = mutable_data<Acc<T>>(loss),
          .gradient = mutable_data<Acc<T>>(gradient),
          .slot = mutable_data<int32_t>(slot),
          .workspace = nullptr,
          .kernels = options.kernels()};
}

void check_mk_mmd_backward(const Tensor& d_loss, const Tensor& gradient, const Tensor& slot, ScalarType dtype) {
  ALIGN_CHECK(gradient.dim() == 3, "gradient must be [layers, rows, rank], got ", shape_of(gradient));
  ALIGN_CHECK(slot.dim() == 1, "slot must be [tokens], got ", shape_of(slot));
  check_shape(d_loss, {gradient.size(0)}, "d_loss");
  check_floating(d_loss, "d_loss");
  check_accumulated(gradient, gradient, "gradient");
  check_size(slot.size(0), kMaxRows, "the rows of slot");
  check_size(gradient.size(0), kMaxCount, "layers, of gradient,");
  check_size(gradient.size(1), kMaxRows, "the rows of gradient");
  check_size(gradient.size(2), kMaxColumns, "the rank of gradient");
  ALIGN_CHECK(is_floating(dtype), "dtype must be float32, bfloat16, float16 or float64, got ", name_of(dtype));
  check_dtype(slot, ScalarType::Int, "slot", "int32");
  check_device(d_loss, gradient, "d_loss");
  check_device(slot, gradient, "slot");
}

template <class Device>
MkMmdOutputs mk_mmd(const std::vector<Tensor>& z, const Tensor& task, int64_t num_tasks, std::vector<double> bandwidths,
                    int64_t num_kernels, bool u_statistic, int64_t n_max, bool mean_pairs) {
  const MkMmdOptions options{num_tasks, std::move(bandwidths), num_kernels, u_statistic, n_max, mean_pairs};
  const LatentTensors latents(z, task, largest_rank(z), /*any_rows=*/true);
  check_options(options);
  const Device device(z[0]);
  MkMmdOutputs outputs = empty_mk_mmd(latents, options);
  dispatch_dtype<Device>(z[0], "z", [&]<typename T>(T) {
    const std::vector<const T*> pointers = latents.pointers<T>();
    MkMmdArgs<T> args = mk_mmd_args<T>(latents, pointers.data(), options, outputs);
    if constexpr (Device::kCuda) {
      Tensor workspace = empty_bytes(z[0], cuda::mk_mmd_workspace(args));
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
  Tensor dz = make_empty(gradient, {gradient.size(0), slot.size(0), gradient.size(2)}, dtype);
  const Tensor gc = contiguous_as(gradient, acc_type(dz)), dc = contiguous_as(d_loss, acc_type(dz));
  const Tensor sc = as_contiguous(slot);
  const int32_t* const slots = data<int32_t>(sc);
  for (int64_t t = 0; !Device::kCuda && t < sc.size(0); ++t) {  // the CUDA kernel checks by itself
    ALIGN_CHECK(slots[t] < gc.size(1), "slot must be below the rows of gradient, ", gc.size(1), ", got ", slots[t]);
  }
  dispatch_dtype<Device>(dz, "z", [&]<typename T>(T) {
    const MkMmdBackwardArgs<T> args{.layers = dz.size(0),
                                    .tokens = dz.size(1),
                                    .rank = dz.size(2),
                                    .rows = gc.size(1),
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
