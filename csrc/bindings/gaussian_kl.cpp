#include "bindings/gaussian_kl.h"

namespace align {
namespace {

Tensor task_moments(const Tensor& z, const Tensor& task, int64_t num_tasks) {
  check_latent(z, task);
  const Tensor zc = torch::stable::contiguous(z), taskc = torch::stable::contiguous(task);
  Tensor moments = empty_moments(z, num_tasks);
  dispatch_dtype(z, "z", [&](auto type) {
    using T = decltype(type);
    Tensor workspace = empty_bytes(z, cpu::task_moments_workspace<T>(z.size(0), z.size(1), num_tasks));
    cpu::task_moments<T>({z.size(0), z.size(1), num_tasks, data<T>(zc), data<int64_t>(taskc),
                          mutable_data<Acc<T>>(moments), workspace.mutable_data_ptr()});
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
  return only_layer(gaussian_kl_tables(as_only_layer(task_moments(z, task, num_tasks)), eps, ddof, mean_pairs));
}

Tensor gaussian_kl_backward(const Tensor& d_loss, const Tensor& z, const Tensor& task, const Tensor& tables) {
  const int64_t tasks = check_tables(d_loss, z, task, tables);
  const Tensor zc = torch::stable::contiguous(z), taskc = torch::stable::contiguous(task);
  const Tensor tc = contiguous_as(tables, acc_type(z)), gc = contiguous_as(d_loss, acc_type(z));
  Tensor dz = torch::stable::empty_like(zc);
  dispatch_dtype(z, "z", [&](auto type) {
    using T = decltype(type);
    cpu::gaussian_kl_backward<T>({z.size(0), z.size(1), tasks, data<T>(zc), data<int64_t>(taskc), data<Acc<T>>(tc),
                                  data<Acc<T>>(gc), mutable_data<T>(dz)});
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
