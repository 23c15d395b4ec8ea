// The device-independent half of the gaussian_kl bindings: checks and outputs.
#pragma once

#include <tuple>
#include <vector>

#include "bindings/tensors.h"
#include "ops/gaussian_kl.h"

namespace align {

// Checked latents of all layers: contiguous, and as the kernels take them. rank: of moments and tables, the widest
// layer's or more.
struct LatentTensors {
  std::vector<Tensor> z;
  Tensor task;
  std::vector<int64_t> ranks;
  int64_t tokens = 0, rank;

  LatentTensors(const std::vector<Tensor>& layers, const Tensor& ids, int64_t room) : rank(room) {
    STD_TORCH_CHECK(!layers.empty(), "z must hold the latent of one layer at least");
    for (const Tensor& layer : layers) {
      STD_TORCH_CHECK(layer.dim() == 2, "z must be [tokens, rank], got ", shape_of(layer));
      check_shape(layer, {layers[0].size(0), layer.size(1)}, "z of every layer");
      check_device(layer, layers[0], "z of every layer");
      STD_TORCH_CHECK(layer.scalar_type() == layers[0].scalar_type(), "z of every layer must have the same dtype");
      z.push_back(as_contiguous(layer));
      ranks.push_back(layer.size(1));
      STD_TORCH_CHECK(ranks.back() <= rank, "z has rank ", ranks.back(), ", but there is room for rank ", rank);
    }
    tokens = layers[0].size(0);
    check_shape(ids, {tokens}, "task");
    check_device(ids, z[0], "task");
    check_dtype(ids, ScalarType::Long, "task", "int64");
    task = as_contiguous(ids);
  }

  int64_t layers() const { return int64_t(z.size()); }

  // Calls body(latents) with pointers of the kernel type T.
  template <typename T, typename Body>
  void with(const Body& body) const {
    std::vector<const T*> pointers;
    for (const Tensor& layer : z) pointers.push_back(data<T>(layer));
    body(Latents<T>{layers(), tokens, rank, pointers.data(), ranks.data(), data<int64_t>(task)});
  }
};

inline void check_tasks(int64_t num_tasks) {
  STD_TORCH_CHECK(num_tasks > 0, "num_tasks must be positive, got ", num_tasks);
}

inline void check_ddof(int64_t ddof) { STD_TORCH_CHECK(ddof == 0 || ddof == 1, "ddof must be 0 or 1, got ", ddof); }

inline void check_gaussian_kl(const Tensor& z, int64_t num_tasks, int64_t ddof) {
  STD_TORCH_CHECK(z.dim() == 2, "z must be [tokens, rank], got ", shape_of(z));
  check_tasks(num_tasks);
  check_ddof(ddof);
}

inline void check_moments(const Tensor& moments, int64_t ddof) {
  STD_TORCH_CHECK(moments.dim() == 3 && moments.size(2) % 2 == 1, "moments must be [layers, tasks, 2 rank + 1], got ",
                  shape_of(moments));
  check_ddof(ddof);
}

// The rank that tables [layers, tasks, 3 rank] have room for.
inline int64_t check_tables(const Tensor& d_loss, const std::vector<Tensor>& z, const Tensor& tables) {
  STD_TORCH_CHECK(d_loss.numel() == 1, "d_loss must hold one value, got ", shape_of(d_loss));
  STD_TORCH_CHECK(tables.dim() == 3 && tables.size(0) == int64_t(z.size()) && tables.size(2) % 3 == 0,
                  "tables must be [layers, tasks, 3 rank], got ", shape_of(tables), " for ", z.size(), " layers");
  for (const Tensor& layer : z) {
    check_device(d_loss, layer, "d_loss");
    check_device(tables, layer, "tables");
  }
  return tables.size(2) / 3;
}

inline Tensor empty_moments(const LatentTensors& latents, int64_t num_tasks) {
  check_tasks(num_tasks);
  const Tensor& z = latents.z[0];
  return make_empty(z, {latents.layers(), num_tasks, 2 * latents.rank + 1}, acc_type(z));
}

// [layers, tokens * rank and up to 15 more]: each layer's part begins where a vector may.
inline Tensor empty_gradients(const LatentTensors& latents) {
  const int64_t size = (latents.tokens * latents.rank + 15) / 16 * 16;
  return make_empty(latents.z[0], {latents.layers(), size});
}

}  // namespace align
