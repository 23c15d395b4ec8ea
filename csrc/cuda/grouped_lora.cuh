// Shared by the launchers of grouped_lora and sibling_lora, which have one head: the latent rows of expand are z or dz
// as shrink has computed them. grouped_lora.cu compiles the kernels.
#pragma once

#include "cuda/projection.cuh"
#include "ops/sibling_lora.h"

namespace align::cuda {

// Latent rows that are given as partials, one for each split, which are added in order.
struct SumOfPartials {
  const float* partials;  // [count, tokens, width], from the first rank on
  int64_t count, tokens, width, rank;
  float* sum;  // [tokens, rank], written by save; or null

  __device__ float operator()(int64_t row, int64_t j, int = 0) const {
    return j < rank ? sum_of_partials(partials, count, tokens * width, row * width + j) : 0;
  }

  // Writes the sums of rows first .. first + rows - 1 of a tile.
  __device__ void save(const RowTile& tile, int first, int rows, int thread, int threads) const {
    if (sum == nullptr) return;
    for (int64_t i = thread; i < rows * rank; i += threads) {
      const int at = first + int(i / rank);
      if (at < tile.count) sum[tile.row(at) * rank + i % rank] = (*this)(tile.row(at), i % rank);
    }
  }
};

// dz of several layers side by side: their partials, added in order, + dz_in. Ranks between two layers are zero.
struct SumDzJob {
  SumOfPartials layers[kMaxSiblings];
  const float* dz_in[kMaxSiblings];  // [tokens, rank of the layer], or null: zero
  float* dz;                         // [tokens, width], assigned
  int width, stride;                 // stride: from one layer's first rank to the next one's
};
void sum_dz(const SumDzJob& job, Stream stream);

template <typename T, typename TA>
Adapter adapter_a(const GroupedLoraShape& shape, const TA* A) {
  return {A, std::is_same_v<TA, float>, int(shape.rank), layout_of_a(shape.rank, shape.in_dim),
          shape.rank * shape.in_dim};
}
template <typename T, typename TA>
AdapterMatrix<T> matrix_of_b(const GroupedLoraShape& shape, const TA* B) {
  const Layout layout = layout_of_b(shape.rank, shape.out_dim);
  return stack<T>(shape.out_dim, {B, std::is_same_v<TA, float>, int(shape.rank), layout, shape.rank * shape.out_dim});
}

inline Plan plan_for(const GroupedLoraShape& shape, int64_t element_bytes) {
  return plan(shape.tokens, shape.in_dim, shape.out_dim, shape.rank, shape.groups, element_bytes, current_device());
}

// How many partials dz has: one for each block of columns of the sweep, or for each split of shrink.
inline int64_t dz_partials(const Plan& plan, const GroupedLoraShape& shape, int64_t element_bytes) {
  return plan.one_pass ? sweep_blocks(shape.out_dim, element_bytes) : plan.shrink_dy.splits;
}

// y of a layer from its latents.
template <typename T, typename TA>
void expand_y(const GroupedLoraForwardArgs<T, TA>& args, const Plan& plan, const SumOfPartials& z, Stream stream) {
  const GroupedLoraShape& shape = args.shape;
  with_math<T>(plan, [&](auto math) {
    expand<decltype(math)>({.shape = shape,
                            .groups = args.row_groups,
                            .in = token_matrix(args.y_in, shape.out_dim),
                            .out = args.y,
                            .out_aligned = rows_aligned(args.y, shape.out_dim),
                            .bias = args.bias,
                            .m = matrix_of_b<T>(shape, args.B),
                            .masks = kNoMasks,
                            .scale = float(args.scaling),
                            .cut = plan.expand},
                           z, stream);
  });
}

// The gradient dB of a layer, not yet cut into chunks, and the partials of its dz.
template <typename T, typename TA>
OuterJob<T> d_b_of(const GroupedLoraBackwardArgs<T, TA>& args, float* partials) {
  const RankMasks scaled{{0, nullptr}, 1, kAllRanks, float(args.scaling)};
  return {.shape = args.shape,
          .groups = args.row_groups,
          .x = token_matrix(args.dy, args.shape.out_dim),
          .masks = scaled,
          .m = matrix_of_b<T>(args.shape, args.B),
          .out = {args.dB},
          .partials = partials};
}

// The partials of dz of a layer, and in one pass over dy also dB.
template <typename T>
void pass_over_dy(const OuterJob<T>& d_b, const LatentRows& z, const Plan& plan, Stream stream) {
  with_math<T>(plan, [&](auto math) {
    using Math = decltype(math);
    if constexpr (Math::kRank == 16 && (Math::kTensorCores || std::is_same_v<T, float>)) {
      if (plan.one_pass) return sweep<Math>(d_b, z, stream);
    }
    shrink<Math>({.shape = d_b.shape,
                  .groups = d_b.groups,
                  .x = d_b.x,
                  .m = d_b.m,
                  .masks = d_b.masks,
                  .partials = d_b.partials,
                  .cut = plan.shrink_dy},
                 plan.rank_chunks, stream);
  });
}

#define ALIGN_COMPILED_ELSEWHERE(...) \
  extern template void expand<__VA_ARGS__>(const ExpandJob<__VA_ARGS__::Element>&, const SumOfPartials&, Stream);
ALIGN_FOR_EACH_MATH(ALIGN_COMPILED_ELSEWHERE)
#undef ALIGN_COMPILED_ELSEWHERE
#define ALIGN_COMPILED_ELSEWHERE(...) \
  extern template void sweep<__VA_ARGS__>(const OuterJob<__VA_ARGS__::Element>&, const LatentRows&, Stream);
ALIGN_FOR_EACH_MATH_OF_THE_SWEEP(ALIGN_COMPILED_ELSEWHERE)
#undef ALIGN_COMPILED_ELSEWHERE

}  // namespace align::cuda
