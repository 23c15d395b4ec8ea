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
    ALIGN_CHECK(!layers.empty(), "z must hold the latent of one layer at least");
    ALIGN_CHECK(rank >= 0 && rank <= kMaxColumns, "rank must be in 0 .. ", kMaxColumns, ", got ", rank);
    for (const Tensor& layer : layers) check_layer(layer, layers[0]);
    tokens = layers[0].size(0);
    check_size(tokens, kMaxRows, "the rows of z");
    check_shape(ids, {tokens}, "task");
    check_device(ids, layers[0], "task");
    check_dtype(ids, ScalarType::Long, "task", "int64");
    for (const Tensor& layer : layers) z.push_back(as_contiguous(layer));
    task = as_contiguous(ids);
  }

  void check_layer(const Tensor& layer, const Tensor& first) {
    ALIGN_CHECK(layer.dim() == 2, "z must be [tokens, rank], got ", shape_of(layer));
    check_floating(layer, "z");
    check_shape(layer, {first.size(0), layer.size(1)}, "z of every layer");
    check_device(layer, first, "z of every layer");
    ALIGN_CHECK(layer.scalar_type() == first.scalar_type(), "z of every layer must have the same dtype");
    ranks.push_back(layer.size(1));
    ALIGN_CHECK(ranks.back() <= rank, "z has rank ", ranks.back(), ", but there is room for rank ", rank);
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

inline void check_ddof(int64_t ddof) { ALIGN_CHECK(ddof == 0 || ddof == 1, "ddof must be 0 or 1, got ", ddof); }

inline void check_gaussian_kl(const Tensor& z, int64_t num_tasks, int64_t ddof) {
  ALIGN_CHECK(z.dim() == 2, "z must be [tokens, rank], got ", shape_of(z));
  check_size(z.size(1), kMaxColumns, "the rank of z");
  check_count(num_tasks, "num_tasks");
  check_ddof(ddof);
}

inline void check_moments(const Tensor& moments, int64_t ddof) {
  ALIGN_CHECK(moments.dim() == 3 && moments.size(2) % 2 == 1, "moments must be [layers, tasks, 2 rank + 1], got ",
              shape_of(moments));
  check_size(moments.size(0), kMaxCount, "layers, of moments,");
  check_size(moments.size(1), kMaxCount, "tasks, of moments,");
  check_size(moments.size(2) / 2, kMaxColumns, "rank, of moments,");
  check_accumulated(moments, moments, "moments");
  check_ddof(ddof);
}

// The rank that tables [layers, tasks, 3 rank] have room for.
inline int64_t check_tables(const Tensor& d_loss, const std::vector<Tensor>& z, const Tensor& tables) {
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

inline Tensor empty_moments(const LatentTensors& latents, int64_t num_tasks) {
  check_count(num_tasks, "num_tasks");
  const Tensor& z = latents.z[0];
  return make_empty(z, {latents.layers(), num_tasks, 2 * latents.rank + 1}, acc_type(z));
}

// [layers, tokens * rank and up to 15 more]: each layer's part begins where a vector may.
inline Tensor empty_gradients(const LatentTensors& latents) {
  const int64_t size = (latents.tokens * latents.rank + 15) / 16 * 16;  // both are bounded
  return make_empty(latents.z[0], {latents.layers(), size});
}

}  // namespace align
