// The latents of all layers of a model, for the same tokens, as the losses take them.
#pragma once

#include <vector>

#include "bindings/device.h"

namespace align {

// The latents of all layers, checked. rank is that of the results, at least the largest rank of a layer.
struct LatentTensors {
  std::vector<Tensor> z;
  Tensor task;
  std::vector<int64_t> ranks, strides;  // strides: from one row to the next; elements of a row lie side by side
  int64_t tokens = 0, rank;

  // any_rows: rows may be apart, as those of one head among others are; else they are contiguous.
  LatentTensors(const std::vector<Tensor>& layers, const Tensor& ids, int64_t room, bool any_rows = false)
      : rank(room) {
    ALIGN_CHECK(!layers.empty(), "z must hold the latent of one layer at least");
    ALIGN_CHECK(rank >= 0 && rank <= kMaxColumns, "rank must be in 0 .. ", kMaxColumns, ", got ", rank);
    for (const Tensor& layer : layers) check_layer(layer, layers[0]);
    tokens = layers[0].size(0);
    check_size(tokens, kMaxRows, "the rows of z");
    check_shape(ids, {tokens}, "task");
    check_device(ids, layers[0], "task");
    check_dtype(ids, ScalarType::Long, "task", "int64");
    for (const Tensor& layer : layers) add(layer, any_rows);
    task = as_contiguous(ids);
  }

  int64_t layers() const { return int64_t(z.size()); }

  // Where the latents of each layer begin.
  template <typename T>
  std::vector<const T*> pointers() const {
    std::vector<const T*> pointers;
    for (const Tensor& layer : z) pointers.push_back(data<T>(layer));
    return pointers;
  }

 private:
  void check_layer(const Tensor& layer, const Tensor& first) {
    ALIGN_CHECK(layer.dim() == 2, "z must be [tokens, rank], got ", shape_of(layer));
    check_floating(layer, "z");
    check_shape(layer, {first.size(0), layer.size(1)}, "z of every layer");
    check_device(layer, first, "z of every layer");
    ALIGN_CHECK(layer.scalar_type() == first.scalar_type(), "z of every layer must have the same dtype");
    ranks.push_back(layer.size(1));
    ALIGN_CHECK(ranks.back() <= rank, "z has rank ", ranks.back(), ", but there is room for rank ", rank);
  }

  void add(const Tensor& layer, bool any_rows) {
    const bool as_it_is = any_rows && layer.stride(1) == 1 && layer.stride(0) >= 0 && layer.stride(0) <= kMaxColumns;
    z.push_back(as_it_is ? layer : as_contiguous(layer));
    strides.push_back(as_it_is ? layer.stride(0) : layer.size(1));
  }
};

}  // namespace align
