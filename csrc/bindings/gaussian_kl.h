// The device-independent half of the gaussian_kl bindings: checks and outputs.
#pragma once

#include <tuple>

#include "bindings/tensors.h"
#include "ops/gaussian_kl.h"

namespace align {

inline void check_latent(const Tensor& z, const Tensor& task) {
  STD_TORCH_CHECK(z.dim() == 2, "z must be [tokens, rank], got ", shape_of(z));
  check_shape(task, {z.size(0)}, "task");
  check_device(task, z, "task");
  check_dtype(task, ScalarType::Long, "task", "int64");
}

inline void check_moments(const Tensor& moments, int64_t ddof) {
  STD_TORCH_CHECK(moments.dim() == 3 && moments.size(2) % 2 == 1, "moments must be [layers, tasks, 2 rank + 1], got ",
                  shape_of(moments));
  STD_TORCH_CHECK(ddof == 0 || ddof == 1, "ddof must be 0 or 1, got ", ddof);
}

inline int64_t check_tables(const Tensor& d_loss, const Tensor& z, const Tensor& task, const Tensor& tables) {
  check_latent(z, task);
  check_device(d_loss, z, "d_loss");
  check_device(tables, z, "tables");
  STD_TORCH_CHECK(d_loss.numel() == 1, "d_loss must hold one value, got ", shape_of(d_loss));
  STD_TORCH_CHECK(tables.dim() == 2 && tables.size(1) == 3 * z.size(1), "tables must be [tasks, 3 rank], got ",
                  shape_of(tables));
  return tables.size(0);
}

inline Tensor empty_moments(const Tensor& z, int64_t num_tasks) {
  STD_TORCH_CHECK(num_tasks > 0, "num_tasks must be positive, got ", num_tasks);
  return torch::stable::new_empty(z, {num_tasks, 2 * z.size(1) + 1}, acc_type(z));
}

// One layer's moments as the model-wide kernel takes them, and its answer back.
inline Tensor as_only_layer(const Tensor& moments) { return torch::stable::unsqueeze(moments, 0); }

inline std::tuple<Tensor, Tensor> only_layer(const std::tuple<Tensor, Tensor>& loss_and_tables) {
  const auto& [loss, tables] = loss_and_tables;
  return {torch::stable::view(loss, {}), torch::stable::view(tables, {tables.size(1), tables.size(2)})};
}

}  // namespace align
