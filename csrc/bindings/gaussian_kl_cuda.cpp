#include "bindings/device.h"
#include "bindings/gaussian_kl.h"

namespace align {
namespace {

Tensor task_moments(const Tensor& z, const Tensor& task, int64_t num_tasks) {
  check_latent(z, task);
  const Device device(z);
  const Tensor zc = torch::stable::contiguous(z), taskc = torch::stable::contiguous(task);
  Tensor moments = empty_moments(z, num_tasks);
  dispatch_cuda_dtype(z, "z", [&](auto type) {
    using T = decltype(type);
    Tensor workspace = empty_bytes(z, cuda::task_moments_workspace<T>(z.size(0), z.size(1), num_tasks));
    cuda::task_moments<T>({z.size(0), z.size(1), num_tasks, data<T>(zc), data<int64_t>(taskc),
                           mutable_data<float>(moments), mutable_data<void>(workspace)},
                          device.stream());
  });
  return moments;
}

std::tuple<Tensor, Tensor> gaussian_kl_tables(const Tensor& moments, double eps, int64_t ddof, bool mean_pairs) {
  check_moments(moments, ddof);
  const Device device(moments);
  const int64_t layers = moments.size(0), tasks = moments.size(1), rank = moments.size(2) / 2;
  const Tensor mc = contiguous_as(moments, ScalarType::Float);
  Tensor loss = torch::stable::new_empty(mc, {layers});
  Tensor tables = torch::stable::new_empty(mc, {layers, tasks, 3 * rank});
  cuda::gaussian_kl_tables<float>({layers, rank, tasks, eps, int(ddof), mean_pairs, data<float>(mc),
                                   mutable_data<float>(loss), mutable_data<float>(tables)},
                                  device.stream());
  return {loss, tables};
}

std::tuple<Tensor, Tensor> gaussian_kl(const Tensor& z, const Tensor& task, int64_t num_tasks, double eps, int64_t ddof,
                                       bool mean_pairs) {
  return only_layer(gaussian_kl_tables(as_only_layer(task_moments(z, task, num_tasks)), eps, ddof, mean_pairs));
}

Tensor gaussian_kl_backward(const Tensor& d_loss, const Tensor& z, const Tensor& task, const Tensor& tables) {
  const int64_t tasks = check_tables(d_loss, z, task, tables);
  const Device device(z);
  const Tensor zc = torch::stable::contiguous(z), taskc = torch::stable::contiguous(task);
  const Tensor tc = contiguous_as(tables, ScalarType::Float), gc = contiguous_as(d_loss, ScalarType::Float);
  Tensor dz = torch::stable::empty_like(zc);
  dispatch_cuda_dtype(z, "z", [&](auto type) {
    using T = decltype(type);
    cuda::gaussian_kl_backward<T>({z.size(0), z.size(1), tasks, data<T>(zc), data<int64_t>(taskc), data<float>(tc),
                                   data<float>(gc), mutable_data<T>(dz)},
                                  device.stream());
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
