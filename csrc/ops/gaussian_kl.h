// Symmetric KL divergence between the tasks' diagonal Gaussians of the latent z (Align-LoRA, eq. 5), for all layers
// of a model at once, and its gradient, which is affine in z per task.
//
// Statistics of task i (ids outside 0 .. tasks-1 do not count):  n_i, mu_i = mean z, M2_i = sum (z - mu_i)^2.
// With var_i = M2_i / (n_i - ddof), v_i = var_i + eps, p_i = 1 / v_i over the Ma active tasks (n_i >= max(2, 1+ddof)),
// vb = mean v, c_i = mu_i - mean mu:
//
//   sum_{i<j} D_ij = 1/4 sum_d [ (Ma/vb) sum_i (v_i-vb)^2 p_i  +  Ma sum_i p_i c_i^2  +  (sum p)(sum c^2) ]
//   dL/dmu_i  = 1/2 [ Ma p_i c_i + c_i sum p - sum(p c) ]
//   dL/dvar_i = 1/4 [ sum p - p_i^2 (Ma vb + Ma c_i^2 + sum c^2) ]
//   dz_t      = a_i + b_i (z_t - mu_i),   a_i = dL/dmu_i / n_i,   b_i = 2 dL/dvar_i / (n_i - ddof)
//
// O(tasks * rank) instead of O(tasks^2 * rank), every term non-negative. Fewer than two active tasks: loss and tables
// 0. "mean" pairs divides everything by Ma (Ma - 1) / 2. Bytes moved (floor): moments z once, backward z and dz once;
// the tables are of the size of the moments. On CUDA all layers take 4 launches, up to 256 of them at a time: two for
// the moments, one for the tables, one for the gradient.
#pragma once

#include <cstdint>

#include "ops/dtype.h"
#include "ops/stream.h"

namespace align {

// The latents of all layers of a model, for the same tokens.
template <typename T>
struct Latents {
  int64_t layers;
  int64_t tokens;
  int64_t rank;          // the largest rank: moments and tables have zeros where a layer has a smaller one
  const T* const* z;     // [layers], on the host: where a layer's [tokens, ranks[layer]] begins
  const int64_t* ranks;  // [layers], on the host
  const int64_t* task;   // [tokens]
};

template <typename T>
struct TaskMomentsArgs {
  Latents<T> latents;
  int64_t tasks;
  Acc<T>* moments;  // [layers, tasks, 2 rank + 1] = n | mean | M2, assigned; zero for tasks without tokens
  void* workspace;
};

template <typename A>  // float or double: the type of the moments
struct GaussianKlTablesArgs {
  int64_t layers;
  int64_t rank;
  int64_t tasks;
  double eps;
  int ddof;          // 0 or 1
  bool mean_pairs;   // average over the active pairs instead of summing
  const A* moments;  // [layers, tasks, 2 rank + 1]
  A* loss;           // [layers], assigned
  A* tables;         // [layers, tasks, 3 rank] = a | b | mu, assigned
};

template <typename T>
struct GaussianKlBackwardArgs {
  Latents<T> latents;
  int64_t tasks;
  const Acc<T>* tables;  // [layers, tasks, 3 rank] = a | b | mu
  // grad outputs
  const Acc<T>* d_loss;  // [1], multiplies a and b, and so does scale
  double scale;
  // grad inputs
  T* dz;  // layer l's [tokens, ranks[l]] begins at l * dz_stride; assigned, zero if the token does not count
  int64_t dz_stride;  // at least tokens * rank
};

namespace cpu {
template <typename T>
int64_t task_moments_workspace(const Latents<T>& latents, int64_t tasks);  // bytes
template <typename T>
void task_moments(const TaskMomentsArgs<T>& args);
template <typename A>
void gaussian_kl_tables(const GaussianKlTablesArgs<A>& args);
template <typename T>
void gaussian_kl_backward(const GaussianKlBackwardArgs<T>& args);
}  // namespace cpu

namespace cuda {  // T: float, bfloat16, float16; A: float
template <typename T>
int64_t task_moments_workspace(const Latents<T>& latents, int64_t tasks);  // bytes
template <typename T>
void task_moments(const TaskMomentsArgs<T>& args, Stream stream);
template <typename A>
void gaussian_kl_tables(const GaussianKlTablesArgs<A>& args, Stream stream);
template <typename T>
void gaussian_kl_backward(const GaussianKlBackwardArgs<T>& args, Stream stream);
}  // namespace cuda

}  // namespace align
