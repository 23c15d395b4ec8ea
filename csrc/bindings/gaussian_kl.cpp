#include "ops/gaussian_kl.h"

#include <tuple>
#include <vector>

#include "bindings/latents.h"

namespace align {
namespace {

// Calls body(latents) with pointers of the kernel type T.
template <typename T, typename Body>
void with_latents(const LatentTensors& latents, const Body& body) {
  const std::vector<const T*> pointers = latents.pointers<T>();
  body(Latents<T>{latents.layers(), latents.tokens, latents.rank, pointers.data(), latents.ranks.data(),
                  data<int64_t>(latents.task)});
}

void check_ddof(int64_t ddof) { ALIGN_CHECK(ddof == 0 || ddof == 1, "ddof must be 0 or 1, got ", ddof); }

void check_gaussian_kl(const Tensor& z, int64_t num_tasks, int64_t ddof) {
  ALIGN_CHECK(z.dim() == 2, "z must be [tokens, rank], got ", shape_of(z));
  check_size(z.size(1), kMaxColumns, "the rank of z");
  check_count(num_tasks, "num_tasks");
  check_ddof(ddof);
}

void check_moments(const Tensor& moments, int64_t ddof) {
  ALIGN_CHECK(moments.dim() == 3 && moments.size(2) % 2 == 1, "moments must be [layers, tasks, 2 rank + 1], got ",
              shape_of(moments));
  check_size(moments.size(0), kMaxCount, "layers, of moments,");
  check_size(moments.size(1), kMaxCount, "tasks, of moments,");
  check_size(moments.size(2) / 2, kMaxColumns, "rank, of moments,");
  check_accumulated(moments, moments, "moments");
  check_ddof(ddof);
}

// Checks the tables [layers, tasks, 3 rank] and returns their rank.
int64_t check_tables(const Tensor& d_loss, const std::vector<Tensor>& z, const Tensor& tables) {
  ALIGN_CHECK(d_loss.numel() == 1, "d_loss must hold one value, got ", shape_of(d_loss));
  check_floating(d_loss, "d_loss");
  check_accumulated(tables, tables, "tables");
  ALIGN_CHECK(tables.dim() == 3 && tables.size(0) == int64_t(z.size()) && tables.size(2) % 3 == 0,
              "tables must be [layers, tasks, 3 rank], got ", shape_of(tables), " for ", z.size(), " layers");
  check_size(tables.size(1), kMaxCount, "tasks, of tables,");
  check_size(tables.size(2) / 3, kMaxColumns, "rank, of tables,");
  for (const Tensor& layer : z) {
    check_device(d_loss, layer, "d_loss");
    check_device(tables, layer, "tables");
  }
  return tables.size(2) / 3;
}

Tensor empty_moments(const LatentTensors& latents, int64_t num_tasks) {
  check_count(num_tasks, "num_tasks");
  const Tensor& z = latents.z[0];
  return make_empty(z, {latents.layers(), num_tasks, 2 * latents.rank + 1}, acc_type(z));
}

// [layers, tokens * rank rounded up to 16]: the gradient of each layer begins at an aligned address.
Tensor empty_gradients(const LatentTensors& latents) {
  const int64_t size = (latents.tokens * latents.rank + 15) / 16 * 16;  // both are bounded
  return make_empty(latents.z[0], {latents.layers(), size});
}

template <class Device>
Tensor task_moments(const std::vector<Tensor>& z, const Tensor& task, int64_t num_tasks, int64_t rank) {
  const LatentTensors latents(z, task, rank);
  const Device device(z[0]);
  Tensor moments = empty_moments(latents, num_tasks);
  dispatch_dtype<Device>(z[0], "z", [&]<typename T>(T) {
    with_latents<T>(latents, [&](const Latents<T>& all) {
      TaskMomentsArgs<T> args{.latents = all, .tasks = num_tasks, .moments = mutable_data<Acc<T>>(moments)};
      if constexpr (Device::kCuda) {
        Tensor workspace = empty_bytes(z[0], cuda::task_moments_workspace(all, num_tasks));
        args.workspace = mutable_data<void>(workspace);
        cuda::task_moments<T>(args, device.stream());
      } else {
        const auto workspace = host_bytes(cpu::task_moments_workspace(all, num_tasks));
        args.workspace = workspace.get();
        cpu::task_moments<T>(args);
      }
    });
  });
  return moments;
}

template <class Device>
std::tuple<Tensor, Tensor> gaussian_kl_tables(const Tensor& moments, double eps, int64_t ddof, bool mean_pairs) {
  check_moments(moments, ddof);
  const Device device(moments);
  const int64_t layers = moments.size(0), tasks = moments.size(1), rank = moments.size(2) / 2;
  const Tensor mc = contiguous_as(moments, Device::kCuda ? ScalarType::Float : acc_type(moments));
  Tensor loss = make_empty(mc, {layers});
  Tensor tables = make_empty(mc, {layers, tasks, 3 * rank});
  dispatch_dtype<Device>(mc, "moments", [&]<typename A>(A) {
    if constexpr (sizeof(A) > 2) {
      const GaussianKlTablesArgs<A> args{.layers = layers,
                                         .rank = rank,
                                         .tasks = tasks,
                                         .eps = eps,
                                         .ddof = int(ddof),
                                         .mean_pairs = mean_pairs,
                                         .moments = data<A>(mc),
                                         .loss = mutable_data<A>(loss),
                                         .tables = mutable_data<A>(tables)};
      if constexpr (Device::kCuda) {
        cuda::gaussian_kl_tables<A>(args, device.stream());
      } else {
        cpu::gaussian_kl_tables<A>(args);
      }
    }
  });
  return {loss, tables};
}

template <class Device>
std::tuple<Tensor, Tensor> gaussian_kl(const Tensor& z, const Tensor& task, int64_t num_tasks, double eps, int64_t ddof,
                                       bool mean_pairs) {
  check_gaussian_kl(z, num_tasks, ddof);
  const Tensor moments = task_moments<Device>({z}, task, num_tasks, z.size(1));
  const auto [loss, tables] = gaussian_kl_tables<Device>(moments, eps, ddof, mean_pairs);
  return {view_of<0>(loss, {}, {}), tables};
}

template <class Device>
Tensor gaussian_kl_backward(const Tensor& d_loss, double scale, const std::vector<Tensor>& z, const Tensor& task,
                            const Tensor& tables) {
  const LatentTensors latents(z, task, check_tables(d_loss, z, tables));
  const Device device(z[0]);
  const Tensor tc = contiguous_as(tables, acc_type(z[0])), gc = contiguous_as(d_loss, acc_type(z[0]));
  Tensor dz = empty_gradients(latents);
  dispatch_dtype<Device>(z[0], "z", [&]<typename T>(T) {
    with_latents<T>(latents, [&](const Latents<T>& all) {
      const GaussianKlBackwardArgs<T> args{.latents = all,
                                           .tasks = tables.size(1),
                                           .tables = data<Acc<T>>(tc),
                                           .d_loss = data<Acc<T>>(gc),
                                           .scale = scale,
                                           .dz = mutable_data<T>(dz),
                                           .dz_stride = dz.size(1)};
      if constexpr (Device::kCuda) {
        cuda::gaussian_kl_backward<T>(args, device.stream());
      } else {
        cpu::gaussian_kl_backward<T>(args);
      }
    });
  });
  return dz;
}

template <class Device>
void implement(auto& m) {
  m.impl("task_moments", TORCH_BOX(&task_moments<Device>));
  m.impl("gaussian_kl_tables", TORCH_BOX(&gaussian_kl_tables<Device>));
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl<Device>));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward<Device>));
}
ALIGN_IMPLEMENT_ON_DEVICES(implement)

}  // namespace
}  // namespace align
