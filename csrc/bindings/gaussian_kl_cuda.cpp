#include <torch/csrc/stable/accelerator.h>

#include "bindings/gaussian_kl.h"
#include "bindings/stream.h"

namespace align {
namespace {

using torch::stable::accelerator::DeviceGuard;

// float64 is for gradient checks, on the CPU only.
template <typename Body>
void dispatch_cuda_dtype(const Tensor& tensor, const char* name, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(float16{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 on CUDA");
  }
}

Tensor task_moments(const Tensor& z, const Tensor& task, int64_t num_tasks) {
  check_latent(z, task);
  const DeviceGuard guard(z.get_device_index());
  const Tensor zc = torch::stable::contiguous(z), taskc = torch::stable::contiguous(task);
  Tensor moments = empty_moments(z, num_tasks);
  dispatch_cuda_dtype(z, "z", [&](auto type) {
    using T = decltype(type);
    Tensor workspace = empty_bytes(z, cuda::task_moments_workspace<T>(z.size(0), z.size(1), num_tasks));
    cuda::task_moments<T>({z.size(0), z.size(1), num_tasks, data<T>(zc), data<int64_t>(taskc),
                           mutable_data<float>(moments), workspace.mutable_data_ptr()},
                          current_stream(z.get_device_index()));
  });
  return moments;
}

std::tuple<Tensor, Tensor> gaussian_kl_tables(const Tensor& moments, double eps, int64_t ddof, bool mean_pairs) {
  check_moments(moments, ddof);
  const DeviceGuard guard(moments.get_device_index());
  const int64_t layers = moments.size(0), tasks = moments.size(1), rank = moments.size(2) / 2;
  const Tensor mc = contiguous_as(moments, ScalarType::Float);
  Tensor loss = torch::stable::new_empty(mc, {layers});
  Tensor tables = torch::stable::new_empty(mc, {layers, tasks, 3 * rank});
  cuda::gaussian_kl_tables<float>({layers, rank, tasks, eps, int(ddof), mean_pairs, data<float>(mc),
                                   mutable_data<float>(loss), mutable_data<float>(tables)},
                                  current_stream(moments.get_device_index()));
  return {loss, tables};
}

std::tuple<Tensor, Tensor> gaussian_kl(const Tensor& z, const Tensor& task, int64_t num_tasks, double eps, int64_t ddof,
                                       bool mean_pairs) {
  return only_layer(gaussian_kl_tables(as_only_layer(task_moments(z, task, num_tasks)), eps, ddof, mean_pairs));
}

Tensor gaussian_kl_backward(const Tensor& d_loss, const Tensor& z, const Tensor& task, const Tensor& tables) {
  const int64_t tasks = check_tables(d_loss, z, task, tables);
  const DeviceGuard guard(z.get_device_index());
  const Tensor zc = torch::stable::contiguous(z), taskc = torch::stable::contiguous(task);
  const Tensor tc = contiguous_as(tables, ScalarType::Float), gc = contiguous_as(d_loss, ScalarType::Float);
  Tensor dz = torch::stable::empty_like(zc);
  dispatch_cuda_dtype(z, "z", [&](auto type) {
    using T = decltype(type);
    cuda::gaussian_kl_backward<T>({z.size(0), z.size(1), tasks, data<T>(zc), data<int64_t>(taskc), data<float>(tc),
                                   data<float>(gc), mutable_data<T>(dz)},
                                  current_stream(z.get_device_index()));
  });
  return dz;
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, CUDA, m) {
  m.impl("task_moments", TORCH_BOX(&task_moments));
  m.impl("gaussian_kl_tables", TORCH_BOX(&gaussian_kl_tables));
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
}

}  // namespace
}  // namespace align
