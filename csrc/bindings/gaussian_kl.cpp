#include "bindings/gaussian_kl.h"

namespace align {
namespace {

Tensor task_moments(const std::vector<Tensor>& z, const Tensor& task, int64_t num_tasks, int64_t rank) {
  const LatentTensors latents(z, task, rank);
  Tensor moments = empty_moments(latents, num_tasks);
  dispatch_dtype(z[0], "z", [&](auto type) {
    using T = decltype(type);
    latents.with<T>([&](const Latents<T>& all) {
      Tensor workspace = empty_bytes(z[0], cpu::task_moments_workspace(all, num_tasks));
      cpu::task_moments<T>({all, num_tasks, mutable_data<Acc<T>>(moments), workspace.mutable_data_ptr()});
    });
  });
  return moments;
}

std::tuple<Tensor, Tensor> gaussian_kl_tables(const Tensor& moments, double eps, int64_t ddof, bool mean_pairs) {
  check_moments(moments, ddof);
  const int64_t layers = moments.size(0), tasks = moments.size(1), rank = moments.size(2) / 2;
  const Tensor mc = contiguous_as(moments, acc_type(moments));
  Tensor loss = torch::stable::new_empty(mc, {layers});
  Tensor tables = torch::stable::new_empty(mc, {layers, tasks, 3 * rank});
  const auto run = [&](auto type) {
    using A = decltype(type);
    cpu::gaussian_kl_tables<A>(
        {layers, rank, tasks, eps, int(ddof), mean_pairs, data<A>(mc), mutable_data<A>(loss), mutable_data<A>(tables)});
  };
  mc.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {loss, tables};
}

std::tuple<Tensor, Tensor> gaussian_kl(const Tensor& z, const Tensor& task, int64_t num_tasks, double eps, int64_t ddof,
                                       bool mean_pairs) {
  STD_TORCH_CHECK(z.dim() == 2, "z must be [tokens, rank], got ", shape_of(z));
  return only_layer(gaussian_kl_tables(task_moments({z}, task, num_tasks, z.size(1)), eps, ddof, mean_pairs));
}

Tensor gaussian_kl_backward(const Tensor& d_loss, double scale, const std::vector<Tensor>& z, const Tensor& task,
                            const Tensor& tables) {
  const LatentTensors latents(z, task, check_tables(d_loss, z, tables));
  const int64_t tasks = tables.size(1);
  const Tensor tc = contiguous_as(tables, acc_type(z[0])), gc = contiguous_as(d_loss, acc_type(z[0]));
  Tensor dz = empty_gradients(latents);
  dispatch_dtype(z[0], "z", [&](auto type) {
    using T = decltype(type);
    latents.with<T>([&](const Latents<T>& all) {
      cpu::gaussian_kl_backward<T>(
          {all, tasks, data<Acc<T>>(tc), data<Acc<T>>(gc), scale, mutable_data<T>(dz), dz.size(1)});
    });
  });
  return dz;
}

STABLE_TORCH_LIBRARY_IMPL(align_ext, CPU, m) {
  m.impl("task_moments", TORCH_BOX(&task_moments));
  m.impl("gaussian_kl_tables", TORCH_BOX(&gaussian_kl_tables));
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
}

}  // namespace
}  // namespace align
