#include "bindings/gaussian_kl.h"

namespace align {
namespace {

template <typename T>
void run_moments(const LatentTensors& latents, int64_t num_tasks, Acc<T>* moments) {
  latents.with<T>([&](const Latents<T>& all) {
    const auto workspace = host_bytes(cpu::task_moments_workspace(all, num_tasks));
    cpu::task_moments<T>({all, num_tasks, moments, workspace.get()});
  });
}

Tensor task_moments(const std::vector<Tensor>& z, const Tensor& task, int64_t num_tasks, int64_t rank) {
  const LatentTensors latents(z, task, rank);
  Tensor moments = empty_moments(latents, num_tasks);
  dispatch_dtype(z[0], "z", [&](auto type) {
    using T = decltype(type);
    run_moments<T>(latents, num_tasks, mutable_data<Acc<T>>(moments));
  });
  return moments;
}

std::tuple<Tensor, Tensor> gaussian_kl_tables(const Tensor& moments, double eps, int64_t ddof, bool mean_pairs) {
  check_moments(moments, ddof);
  const int64_t layers = moments.size(0), tasks = moments.size(1), rank = moments.size(2) / 2;
  const Tensor mc = contiguous_as(moments, acc_type(moments));
  Tensor loss = make_empty(mc, {layers});
  Tensor tables = make_empty(mc, {layers, tasks, 3 * rank});
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
  check_gaussian_kl(z, num_tasks, ddof);
  const int64_t rank = z.size(1);
  const LatentTensors latents({z}, task, rank);
  Tensor memory = empty_moments(latents, num_tasks), loss = make_empty(z, {}, acc_type(z));
  Tensor tables = make_empty(z, {1, num_tasks, 3 * rank}, acc_type(z));
  dispatch_dtype(z, "z", [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    A* moments = mutable_data<A>(memory);
    run_moments<T>(latents, num_tasks, moments);
    cpu::gaussian_kl_tables<A>(
        {1, rank, num_tasks, eps, int(ddof), mean_pairs, moments, mutable_data<A>(loss), mutable_data<A>(tables)});
  });
  return {loss, tables};
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
