// The device-independent half of the mk_mmd bindings: checks, options and outputs.
#pragma once

#include <tuple>
#include <vector>

#include "bindings/tensors.h"
#include "ops/mk_mmd.h"

namespace align {

// loss, gradient, slot
using MkMmdOutputs = std::tuple<Tensor, Tensor, Tensor>;

struct MkMmdOptions {
  int64_t tasks;
  std::vector<double> bandwidths;  // empty: heuristic
  int64_t num_kernels;             // of the heuristic
  bool u_statistic;
  int64_t n_max;
  bool mean_pairs;

  MmdKernels kernels() const {
    return bandwidths.empty() ? heuristic_kernels(int(num_kernels))
                              : given_kernels(bandwidths.data(), int(bandwidths.size()));
  }
};

inline void check_mk_mmd(const Tensor& z, const Tensor& task, const MkMmdOptions& options) {
  ALIGN_CHECK(z.dim() == 2, "z must be [tokens, rank], got ", shape_of(z));
  check_floating(z, "z");
  check_shape(task, {z.size(0)}, "task");
  check_device(task, z, "task");
  check_dtype(task, ScalarType::Long, "task", "int64");
  check_size(z.size(0), kMaxRows, "the rows of z");
  check_size(z.size(1), kMaxColumns, "the rank of z");
  check_count(options.tasks, "num_tasks");
  ALIGN_CHECK(options.n_max >= 2, "n_max must be at least 2, got ", options.n_max);
  const int64_t count = options.bandwidths.empty() ? options.num_kernels : int64_t(options.bandwidths.size());
  ALIGN_CHECK(count >= 1 && count <= kMaxMmdKernels, "there must be 1 to ", kMaxMmdKernels, " kernels, got ", count);
  for (double bandwidth : options.bandwidths) {
    ALIGN_CHECK(bandwidth > 0 && std::isfinite(bandwidth), "bandwidths must be positive, got ", bandwidth);
  }
}

inline MkMmdOutputs empty_mk_mmd(const Tensor& z, const MkMmdOptions& options) {
  const int64_t rows = mmd_rows(z.size(0), options.tasks, options.n_max);
  return {make_empty(z, {}, acc_type(z)), make_empty(z, {rows, z.size(1)}, acc_type(z)),
          make_empty(z, {z.size(0)}, ScalarType::Int)};
}

// Everything but the workspace.
template <typename T>
MkMmdArgs<T> mk_mmd_args(const Tensor& z, const Tensor& task, const MkMmdOptions& options, MkMmdOutputs& outputs) {
  auto& [loss, gradient, slot] = outputs;
  return {z.size(0),
          z.size(1),
          options.tasks,
          options.n_max,
          options.u_statistic,
          options.mean_pairs,
          data<T>(z),
          data<int64_t>(task),
          mutable_data<Acc<T>>(loss),
          mutable_data<Acc<T>>(gradient),
          mutable_data<int32_t>(slot),
          nullptr,
          options.kernels()};
}

inline void check_mk_mmd_backward(const Tensor& d_loss, const Tensor& gradient, const Tensor& slot, ScalarType dtype) {
  ALIGN_CHECK(gradient.dim() == 2, "gradient must be [rows, rank], got ", shape_of(gradient));
  ALIGN_CHECK(slot.dim() == 1, "slot must be [tokens], got ", shape_of(slot));
  ALIGN_CHECK(d_loss.numel() == 1, "d_loss must hold one value, got ", shape_of(d_loss));
  check_floating(d_loss, "d_loss");
  check_accumulated(gradient, gradient, "gradient");
  check_size(slot.size(0), kMaxRows, "the rows of slot");
  check_size(gradient.size(0), kMaxRows, "the rows of gradient");
  check_size(gradient.size(1), kMaxColumns, "the rank of gradient");
  ALIGN_CHECK(is_floating(dtype), "dtype must be float32, bfloat16, float16 or float64, got ", name_of(dtype));
  check_dtype(slot, ScalarType::Int, "slot", "int32");
  check_device(d_loss, gradient, "d_loss");
  check_device(slot, gradient, "slot");
}

}  // namespace align
