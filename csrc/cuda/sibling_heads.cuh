// Several layers with heads (heads.cuh) and the same x. Their A, A0 and R are packed into one matrix, so that one pass
// over x computes all latents and logits, another one all dA and dR, and dx is written once.
//
// clang-format off
//   forward   pack, base, shrink (A, A0 and R of all), for each layer: combine_heads (z, w, u), expand (y)
//   backward  pack, for each layer: shrink ([B | B0]^T dy), combine_heads_backward (its columns of dz, u);
//             backward (dB of all, dx), backward (dA and dR of all), sum_chunks; base
// clang-format on
//
// The matrix has a block of ranks for each layer, A and A0, and then the R of all layers. With dropout on x a block is
// what sees one mask.
#pragma once

#include "cuda/heads.cuh"
#include "ops/sibling_lora.h"

namespace align::cuda {

constexpr int kPackedParts = 3 * kMaxSiblings;  // A, A0 and R of each layer

template <typename T, typename TA>
struct PackJob {
  struct Part {
    const TA* rows;  // [ranks, cols]
    int start, ranks;
  };
  Part parts[kPackedParts];
  T* packed;  // [ranks, cols], assigned; zero between the parts
  int64_t ranks, cols;
};

template <typename T, typename TA>
__global__ void __launch_bounds__(kThreads) pack_kernel(PackJob<T, TA> job) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x, rank = e / job.cols;
  if (rank >= job.ranks) return;
  T value{};
#pragma unroll
  for (int i = 0; i < kPackedParts; ++i) {
    const auto& part = job.parts[i];
    const int64_t row = rank - part.start;
    if (row >= 0 && row < part.ranks) value = to_element<T>(part.rows[row * job.cols + e % job.cols]);
  }
  job.packed[e] = value;
}

// The layers of SiblingLoraForwardArgs or SiblingLoraBackwardArgs.
template <typename T, typename TA>
struct SiblingHeads {
  int count;
  HeadsLayer<T, TA> layers[kMaxSiblings];
  PackJob<T, TA> pack = {};
  int first_logit;
  GroupedLoraShape of_x;  // the rank is that of the matrix
  RankMasks on_x;
  Plan plan;

  template <typename Args>
  explicit SiblingHeads(const Args& args) : count(args.count) {
    const auto& first = args.layers[0].projection.inputs;
    int block = 0, last = 0, logits = 0;
    for (int i = 0; i < count; ++i) {
      const HeadsShape& s = args.layers[i].projection.inputs.shape;
      last = int(s.latents() * s.rank + s.offset_rank);
      block = std::max<int>(block, int(ceil_div(last, kMaskedRanks)) * kMaskedRanks);
      logits += int(args.layers[i].routing.groups * s.heads);
    }
    first_logit = logits > 0 ? count * block : (count - 1) * block + last;
    const int width = first_logit + logits;
    int logit = first_logit;
    for (int i = 0; i < count; ++i) {
      const auto& layer = args.layers[i];
      HeadsInputs<T, TA> inputs = layer.projection.inputs;
      inputs.dropout = dropout_of(args, i);
      const HeadsShape& s = inputs.shape;
      const int start = i * block, ranks = int(s.latents() * s.rank), of_router = int(layer.routing.groups * s.heads);
      layers[i] = HeadsLayer<T, TA>(
          inputs, layer.routing,
          {.width = width, .first = start, .block = std::min(block, first_logit - start), .router = logit});
      pack.parts[3 * i] = {inputs.A, start, ranks};
      pack.parts[3 * i + 1] = {inputs.A0, start + ranks, int(s.offset_rank)};
      pack.parts[3 * i + 2] = {layer.R, logit, of_router};
      logit += of_router;
    }
    of_x = {first.shape.tokens, first.shape.in_dim, first.shape.out_dim, width, 1};
    pack.ranks = width, pack.cols = of_x.in_dim;
    const DropoutArgs dropout = masks_of_x(first.shape, first.dropout);
    on_x = dropout.p > 0 ? RankMasks{dropout, count, block, scale_of(dropout)} : kNoMasks;
    plan = layers[0].plan_of(width, 1);
  }

  int64_t width() const { return of_x.rank; }
  int64_t logits() const { return width() - first_logit; }
  int64_t packed_bytes() const { return ceil_div(width() * of_x.in_dim * int64_t(sizeof(T)), 16) * 16; }

  // The most of what a layer needs.
  template <typename Floats>
  int64_t most(const Floats& floats) const {
    int64_t largest = 0;
    for (int i = 0; i < count; ++i) largest = std::max(largest, floats(layers[i]));
    return largest;
  }
  int64_t partial_floats() const { return plan.shrink.splits * of_x.tokens * width(); }
  int64_t dy_partials() const {
    return most([](const auto& layer) { return layer.dy_partials(); });
  }
  int64_t forward_bytes() const {
    const int64_t u = most([](const auto& layer) { return layer.du_floats(); });
    return packed_bytes() + (partial_floats() + u) * int64_t(sizeof(float));
  }
  int64_t backward_bytes() const {
    int64_t floats = dy_partials() + of_x.tokens * width() + sums_of_x();
    for (int i = 0; i < count; ++i) {
      floats += layers[i].u_floats() + floats_of_sums(layers[i].shape, kNoMasks, layers[i].b, 0);
    }
    return packed_bytes() + floats * int64_t(sizeof(float));
  }
  // The floats of the sums of all chunks of rows, of one too, for dA and dR.
  int64_t sums_of_x() const {
    return outer_chunks(of_x.tokens, 1, std::min<int64_t>(on_x.ranks_each, width())) * width() * of_x.in_dim;
  }

  // Packs the matrix into memory; returns what lies behind it.
  float* pack_into(void* memory, Stream stream) {
    pack.packed = static_cast<T*>(memory);
    const int64_t elements = width() * of_x.in_dim;
    if (elements > 0) launch(pack_kernel<T, TA>, ceil_div(elements, kThreads), dim3(kThreads), 0, stream, pack);
    return reinterpret_cast<float*>(static_cast<char*>(memory) + packed_bytes());
  }
  // The rows of the matrix from one on, as one adapter.
  AdapterMatrix<T> rows_from(int64_t start, int64_t ranks) const {
    return stack<T>(of_x.in_dim, {pack.packed + start * of_x.in_dim, /*is_float=*/false, int(ranks),
                                  layout_of_a(ranks, of_x.in_dim), ranks * of_x.in_dim});
  }
};

template <typename T, typename TA>
void sibling_heads_forward(const SiblingLoraForwardArgs<T, TA>& args, Stream stream) {
  SiblingHeads<T, TA> l(args);
  float* partials = l.pack_into(args.workspace, stream);
  with_math<T>(l.plan, [&](auto math) {
    shrink<decltype(math)>({.shape = l.of_x,
                            .x = token_matrix(args.layers[0].projection.inputs.x, l.of_x.in_dim),
                            .m = l.rows_from(0, l.width()),
                            .masks = l.on_x,
                            .partials = partials,
                            .cut = l.plan.shrink},
                           l.plan.rank_chunks, stream);
  });
  for (int i = 0; i < args.count; ++i) {
    const auto& layer = args.layers[i];
    float* w = layer.routing.groups > 0 ? layer.w : nullptr;
    expand_heads(l.layers[i], layer.projection, w, partials, l.plan.shrink.splits, partials + l.partial_floats(),
                 stream);
  }
}

template <typename T, typename TA>
void sibling_heads_backward(const SiblingLoraBackwardArgs<T, TA>& args, Stream stream) {
  SiblingHeads<T, TA> l(args);
  const auto& first = args.layers[0].projection;
  const int64_t n = l.of_x.in_dim;
  const int width = int(l.width());
  float* partials = l.pack_into(args.workspace, stream);
  float *dz = partials + l.dy_partials(), *floats = dz + l.of_x.tokens * width;
  OuterJob<T> d_b[kMaxSiblings] = {};
  LatentRows u[kMaxSiblings] = {};
  int64_t ranks = width;  // the most of the launch of dB and dx
  for (int i = 0; i < args.count; ++i) {
    const auto& layer = args.layers[i];
    const float* w = layer.routing.groups > 0 ? layer.w : nullptr;
    latent_gradients(l.layers[i], layer.projection, {w, layer.dw_in, layer.dR}, partials, dz, floats, stream);
    u[i] = l.layers[i].latents(floats, l.layers[i].params.u_width(), w);
    d_b[i] = l.layers[i].d_b(layer.projection);
    floats = place_sums(d_b[i], floats + l.layers[i].u_floats());
    ranks = std::max<int64_t>(ranks, l.layers[i].b.ranks);
  }
  OuterJob<T> d_a{
      .shape = l.of_x, .x = token_matrix(first.inputs.x, n), .masks = l.on_x, .m = l.rows_from(0, width), .out = {}};
  d_a.chunk_rows = int(outer_rows(d_a.ranks_of_mask()));
  d_a.out[0] = d_a.sums[0] = floats;  // those of an only chunk too
  const LatentRows of_dz{dz, width, width};
  const ExpandJob<T> dx{.shape = l.of_x,
                        .in = token_matrix(first.dx_in, n),
                        .out = first.dx,
                        .out_aligned = rows_aligned(first.dx, n),
                        .m = d_a.m,
                        .masks = l.on_x,
                        .scale = 1,
                        .cut = l.plan.expand_dx};
  with_math<T>(l.layers[0].plan_of(ranks, 1), [&](auto math) {
    using Job = BackwardJob<decltype(math), LatentRows>;
    Job job{.outer = {}, .dx = dx, .dz = of_dz, .row_tiles = first.dx ? int(row_tiles(l.of_x.tokens, 1)) : 0};
    for (int i = 0; i < args.count; ++i) job.outer[i] = typename Job::Outer(d_b[i], u[i]);
    backward(job, stream);
  });
  with_math<T>(l.plan, [&](auto math) {
    using Job = BackwardJob<decltype(math), LatentRows>;
    backward(Job{.outer = {typename Job::Outer(d_a, of_dz)}, .dx = dx, .dz = of_dz, .row_tiles = 0}, stream);
  });
  ChunkSums sums = {l.of_x, {}, {}};
  for (int i = 0; i < args.count; ++i) {
    const auto& layer = args.layers[i];
    const HeadsParams& params = l.layers[i].params;
    const auto& [row, block, end, logit] = params.columns;
    sums.add(d_b[i]);
    sums.add(layer.projection.dA, d_a.sums[0] + block * n, params.z_width() * n, d_a.chunk_rows, width * n, true);
    if (params.groups == 0) continue;
    sums.add(layer.dR, d_a.sums[0] + logit * n, params.logits() * n, d_a.chunk_rows, width * n, true);
  }
  sum_chunks(sums, stream);
}

}  // namespace align::cuda
