#include "bindings/device.h"
#include "bindings/gaussian_kl.h"

namespace align {
namespace {

Tensor task_moments(const std::vector<Tensor>& z, const Tensor& task, int64_t num_tasks, int64_t rank) {
  const LatentTensors latents(z, task, rank);
  const Device device(z[0]);
  Tensor moments = empty_moments(latents, num_tasks);
  dispatch_cuda_dtype(z[0], "z", [&](auto type) {
    using T = decltype(type);
    latents.with<T>([&](const Latents<T>& all) {
      Tensor workspace = empty_bytes(z[0], cuda::task_moments_workspace(all, num_tasks));
      cuda::task_moments<T>({all, num_tasks, mutable_data<Acc<T>>(moments), mutable_data<void>(workspace)},
                            device.stream());
    });
  });
  return moments;
}

std::tuple<Tensor, Tensor> gaussian_kl_tables(const Tensor& moments, double eps, int64_t ddof, bool mean_pairs) {
  check_moments(moments, ddof);
  const Device device(moments);
  const int64_t layers = moments.size(0), tasks = moments.size(1), rank = moments.size(2) / 2;
  const Tensor mc = contiguous_as(moments, ScalarType::Float);
  Tensor loss = make_empty(mc, {layers});
  Tensor tables = make_empty(mc, {layers, tasks, 3 * rank});
  cuda::gaussian_kl_tables<float>({layers, rank, tasks, eps, int(ddof), mean_pairs, data<float>(mc),
                                   mutable_data<float>(loss), mutable_data<float>(tables)},
                                  device.stream());
  return {loss, tables};
}

std::tuple<Tensor, Tensor> gaussian_kl(const Tensor& z, const Tensor& task, int64_t num_tasks, double eps, int64_t ddof,
                                       bool mean_pairs) {
  check_gaussian_kl(z, num_tasks, ddof);
  const auto [loss, tables] = gaussian_kl_tables(task_moments({z}, task, num_tasks, z.size(1)), eps, ddof, mean_pairs);
  return {view_of<0>(loss, {}, {}), tables};
}

Tensor gaussian_kl_backward(const Tensor& d_loss, double scale, const std::vector<Tensor>& z, const Tensor& task,
                            const Tensor& tables) {
  const LatentTensors latents(z, task, check_tables(d_loss, z, tables));
  const int64_t tasks = tables.size(1);
  const Device device(z[0]);
  const Tensor tc = contiguous_as(tables, ScalarType::Float), gc = contiguous_as(d_loss, ScalarType::Float);
  Tensor dz = empty_gradients(latents);
  dispatch_cuda_dtype(z[0], "z", [&](auto type) {
    using T = decltype(type);
    latents.with<T>([&](const Latents<T>& all) {
      cuda::gaussian_kl_backward<T>(
          {all, tasks, data<Acc<T>>(tc), data<Acc<T>>(gc), scale, mutable_data<T>(dz), dz.size(1)}, device.stream());
    });
  });
  return dz;
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, ALIGN_DEVICE_KEY, m) {
  m.impl("task_moments", TORCH_BOX(&task_moments));
  m.impl("gaussian_kl_tables", TORCH_BOX(&gaussian_kl_tables));
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
}

}  // namespace
}  // namespace align
