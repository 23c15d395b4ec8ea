// Multi-kernel maximum mean discrepancy between the tasks' latents z (Align-LoRA-M), over all pairs of tasks in one
// pass over pairs of tokens, and its gradient, for all layers of a model at once.
//
// clang-format off
//   k(a, b) = sum_k exp(-beta_k |z_a - z_b|^2)
//   L       = sum_{i<j} mean k(i, i) + mean k(j, j) - 2 mean k(i, j) = sum_{a,b} omega_ab k(a, b)
//   omega   = (Ma - 1) / n_i^2 within task i (V-statistic), (Ma - 1) / (n_i (n_i - 1)) and 0 at a = b (U-statistic),
//             -1 / (n_i n_j) for different tasks
//   bw      = mean_{a != b} |z_a - z_b|^2 = 2 sum |z - mean z|^2 / (n - 1), a constant for the gradient
//   dz_a    = -4 sum_b omega_ab h(a, b) (z_a - z_b),     h(a, b) = sum_k beta_k exp(-beta_k |z_a - z_b|^2)
// clang-format on
//
// A task takes part if it has at least two tokens; Ma is the number of these tasks. Of its n tokens, in their order,
// those with index floor(j n / n_max), j = 0 .. n_max-1, take part, or all if n <= n_max. Ids outside 0 .. tasks-1 do
// not count. Given bandwidths have beta_k = 1 / bandwidth_k; the heuristic has bandwidths in units of bw over all
// tokens that take part. With fewer than two tasks, or bw < 1e-12, loss and gradient are 0. "mean" pairs divides both
// by the number of pairs, Ma (Ma - 1) / 2.
//
// Layers see the same tokens, so the same ones take part in all. The forward pass writes the gradient of each layer's
// loss for the n tokens that take part, [rows, rank], and slot, the row of each token in it. Floating-point operations
// of a layer: about n^2 (4 rank + 30) on the CPU, which takes every unordered pair once, and twice that on CUDA. Bytes
// (lower bound): task, slot and the z that take part; backward slot, dz once and the rows. There is no n x n buffer. On
// CUDA all layers take 7 launches forward, up to 240 of them at a time, and 1 backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "ops/dtype.h"
#include "ops/stream.h"

namespace align {

constexpr int kMaxMmdKernels = 32;
constexpr int kMmdTileRows = 32;  // rows of one task that are processed together
constexpr double kMmdMinBandwidth = 1e-12;

// The kernels from the widest to the narrowest. squared[k]: kernel k is the square of the kernel before it.
struct MmdKernels {
  bool relative;  // beta is in units of 1 / bw
  int count;
  double beta[kMaxMmdKernels];  // ascending
  bool squared[kMaxMmdKernels];
};

// Squaring doubles a relative error: after two squarings the next kernel takes an exponential.
inline void find_squares(MmdKernels& kernels) {
  constexpr int kMaxSquarings = 2;
  int run = 0;
  for (int k = 0; k < kernels.count; ++k) {
    const bool twice = k > 0 && std::fabs(kernels.beta[k] / kernels.beta[k - 1] - 2) < 1e-9;
    kernels.squared[k] = twice && run < kMaxSquarings;
    run = kernels.squared[k] ? run + 1 : 0;
  }
}

// beta_k = 1 / (bw 2^(k - count/2)), k = 0 .. count-1.
inline MmdKernels heuristic_kernels(int count) {
  MmdKernels kernels = {true, count, {}, {}};
  for (int k = 0; k < count; ++k) kernels.beta[count - 1 - k] = std::ldexp(1.0, count / 2 - k);
  find_squares(kernels);
  return kernels;
}

inline MmdKernels given_kernels(const double* bandwidths, int count) {
  MmdKernels kernels = {false, count, {}, {}};
  for (int k = 0; k < count; ++k) kernels.beta[k] = 1 / bandwidths[k];
  std::sort(kernels.beta, kernels.beta + count);
  find_squares(kernels);
  return kernels;
}

// Upper bounds of the number of tokens that take part, and of the number of tiles of one task that hold them.
inline int64_t mmd_rows(int64_t tokens, int64_t tasks, int64_t n_max) {
  return std::min(tokens, tasks * std::min(n_max, tokens));
}
inline int64_t mmd_tiles(int64_t rows, int64_t tasks) { return rows / kMmdTileRows + std::min(tasks, rows / 2); }

template <typename T>
struct MkMmdArgs {
  int64_t layers;
  int64_t tokens;  // below 2^31
  int64_t rank;    // the largest rank: gradient has zeros where a layer has a smaller one
  int64_t tasks;
  int64_t n_max;           // 2 or more
  bool u_statistic;        // else V
  bool mean_pairs;         // average over the pairs of tasks instead of summing
  const T* const* z;       // [layers], on the host: where a layer's [tokens, ranks[layer]] begins
  const int64_t* ranks;    // [layers], on the host
  const int64_t* strides;  // [layers], on the host: elements from one row of z to the next
  const int64_t* task;     // [tokens]
  Acc<T>* loss;            // [layers], assigned
  Acc<T>* gradient;  // [layers, mmd_rows, rank], assigned: dL/dz of the tokens that take part, task by task; then zeros
  int32_t* slot;     // [tokens], assigned: the token's row in gradient, or -1
  void* workspace;
  MmdKernels kernels;
};

template <typename T>
struct MkMmdBackwardArgs {
  int64_t layers;
  int64_t tokens;
  int64_t rank;
  int64_t rows;
  const Acc<T>* gradient;  // [layers, rows, rank]
  const int32_t* slot;     // [tokens], below rows
  // grad outputs
  const Acc<T>* d_loss;  // [layers], multiplies gradient
  // grad inputs
  T* dz;  // [layers, tokens, rank], assigned; zero where slot is -1
};

namespace cpu {
template <typename T>
int64_t mk_mmd_workspace(const MkMmdArgs<T>& args);  // bytes; reads sizes alone
template <typename T>
void mk_mmd(const MkMmdArgs<T>& args);
template <typename T>
void mk_mmd_backward(const MkMmdBackwardArgs<T>& args);
}  // namespace cpu

namespace cuda {  // T: float, bfloat16, float16
template <typename T>
int64_t mk_mmd_workspace(const MkMmdArgs<T>& args);  // bytes; reads sizes alone
template <typename T>
void mk_mmd(const MkMmdArgs<T>& args, Stream stream);
template <typename T>
void mk_mmd_backward(const MkMmdBackwardArgs<T>& args, Stream stream);
}  // namespace cuda

}  // namespace align
