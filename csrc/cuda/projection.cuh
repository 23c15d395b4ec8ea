// What every projection op's launcher uses: the products that a plan names, and the kernels that do not depend on the
// op, which projection.cu compiles once.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/ffma.cuh"
#include "cuda/mma.cuh"
#include "cuda/shrink.cuh"

namespace align::cuda {

// Sum of the parts of one element that shrink's slabs, or the sweep's blocks, left; in order.
__device__ inline float sum_of_parts(const float* parts, int64_t count, int64_t stride, int64_t element) {
  float total = 0;
#pragma unroll 4
  for (int64_t i = 0; i < count; ++i) total += parts[i * stride + element];
  return total;
}

// Latent rows that are complete but for a router's weights.
struct LatentRows {
  const float* latent;  // rank 0 of row 0
  int64_t width;        // from row to row
  int ranks;
  int weighted = 0;          // ranks below are multiplied by their head's weight, w[row, band, j / rank]
  const float* w = nullptr;  // [tokens, bands, heads]
  int bands = 0;
  int heads = 0, rank = 0;

  __device__ float operator()(int64_t row, int j, int band) const {
    if (j >= ranks) return 0;
    const float value = latent[row * width + j];
    return j < weighted ? w[(row * bands + band) * heads + j / rank] * value : value;
  }
  __device__ void save(const RowTile&, int, int, int, int) const {}
};

// Calls body(Math{}) with the products that the plan names.
template <typename T, typename Body>
void with_math(const Plan& plan, const Body& body) {
  if constexpr (sizeof(T) == 2) {
    if (!plan.tensor_cores) return body(Ffma<T, 16>{});
    if (plan.padded_rank == 16) return body(Mma<T, 16>{});
    if (plan.padded_rank == 32) return body(Mma<T, 32>{});
    return body(Mma<T, 64>{});
  } else {
    if (plan.padded_rank == 16) return body(Ffma<T, 16>{});
    if (plan.padded_rank == 32) return body(Ffma<T, 32>{});
    return body(Ffma<T, 64>{});
  }
}

#define ALIGN_FOR_EACH_MATH(DO) \
  DO(Ffma<float, 16>)           \
  DO(Ffma<float, 32>)           \
  DO(Ffma<float, 64>)           \
  DO(Ffma<bfloat16, 16>)        \
  DO(Ffma<float16, 16>)         \
  DO(Mma<bfloat16, 16>)         \
  DO(Mma<bfloat16, 32>) DO(Mma<bfloat16, 64>) DO(Mma<float16, 16>) DO(Mma<float16, 32>) DO(Mma<float16, 64>)
#define ALIGN_COMPILED_ELSEWHERE(...)                                                                          \
  extern template void shrink<__VA_ARGS__>(const ShrinkJob<__VA_ARGS__::Element>&, int64_t, Stream);           \
  extern template void expand<__VA_ARGS__>(const ExpandJob<__VA_ARGS__::Element>&, const LatentRows&, Stream); \
  extern template void backward<__VA_ARGS__>(const BackwardJob<__VA_ARGS__, LatentRows>&, Stream);
ALIGN_FOR_EACH_MATH(ALIGN_COMPILED_ELSEWHERE)
#undef ALIGN_COMPILED_ELSEWHERE

}  // namespace align::cuda
