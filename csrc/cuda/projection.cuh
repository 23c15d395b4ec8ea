// Shared by the launchers of all projections: the choice of the products by the plan, and the kernels that do not
// depend on the operator, which projection.cu compiles once.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "cuda/backward.cuh"
#include "cuda/ffma.cuh"
#include "cuda/mma.cuh"
#include "cuda/shrink.cuh"

namespace align::cuda {

// Adds the partials of one element, which the splits of shrink or the blocks of the sweep have written, in order.
__device__ inline float sum_of_partials(const float* partials, int64_t count, int64_t stride, int64_t element) {
  float total = 0;
#pragma unroll 4
  for (int64_t i = 0; i < count; ++i) total += partials[i * stride + element];
  return total;
}

// Latent rows that lie in memory. A router's weights multiply them when they are read.
struct LatentRows {
  const float* latent;  // row 0, rank 0
  int64_t width;        // distance between rows
  int ranks;
  int weighted = 0;          // the ranks below it are multiplied by the weight of their head, w[row, group, j / rank]
  const float* w = nullptr;  // [tokens, output_groups, heads]
  int output_groups = 0;
  int heads = 0, rank = 0;

  __device__ const float* value(int64_t row, int j) const { return latent + row * width + j; }
  __device__ const float* weight(int64_t row, int j, int output_group) const {
    return w + (row * output_groups + output_group) * heads + j / rank;
  }
  __device__ float operator()(int64_t row, int j, int output_group) const {
    if (j >= ranks) return 0;
    return j < weighted ? *weight(row, j, output_group) * *value(row, j) : *value(row, j);
  }
  __device__ void save(const RowTile&, int, int, int, int) const {}
};

// Calls body(Math{}) with the products that the plan has chosen. Without tensor cores (sm_75) there is no bfloat16
// either, which these GPUs would emulate.
template <typename T, typename Body>
void with_math(const Plan& plan, const Body& body) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (std::is_same_v<T, float16>) {
      if (!plan.tensor_cores) return body(Ffma<T, 16>{});
    } else if (!plan.tensor_cores) {
      throw std::runtime_error("bfloat16 takes a GPU of sm_80 or newer: use float16 or float32 on this one");
    }
    if (plan.padded_rank == 16) return body(Mma<T, 16>{});
    if (plan.padded_rank == 32) return body(Mma<T, 32>{});
    return body(Mma<T, 64>{});
  } else {
    if (plan.padded_rank == 16) return body(Ffma<T, 16>{});
    if (plan.padded_rank == 32) return body(Ffma<T, 32>{});
    return body(Ffma<T, 64>{});
  }
}

// clang-format off
#define ALIGN_FOR_EACH_MATH(DO)                                             \
  DO(Ffma<float, 16>) DO(Ffma<float, 32>) DO(Ffma<float, 64>)               \
  DO(Ffma<float16, 16>)                                                     \
  DO(Mma<bfloat16, 16>) DO(Mma<bfloat16, 32>) DO(Mma<bfloat16, 64>)         \
  DO(Mma<float16, 16>) DO(Mma<float16, 32>) DO(Mma<float16, 64>)
// clang-format on
#define ALIGN_FOR_EACH_MATH_OF_THE_SWEEP(DO) DO(Ffma<float, 16>) DO(Mma<bfloat16, 16>) DO(Mma<float16, 16>)
#define ALIGN_COMPILED_ELSEWHERE(...)                                                                          \
  extern template void shrink<__VA_ARGS__>(const ShrinkJob<__VA_ARGS__::Element>&, int64_t, Stream);           \
  extern template void expand<__VA_ARGS__>(const ExpandJob<__VA_ARGS__::Element>&, const LatentRows&, Stream); \
  extern template void backward<__VA_ARGS__>(const BackwardJob<__VA_ARGS__, LatentRows>&, Stream);
ALIGN_FOR_EACH_MATH(ALIGN_COMPILED_ELSEWHERE)
#undef ALIGN_COMPILED_ELSEWHERE

}  // namespace align::cuda
