// The kernels that several projection operators use, compiled once.
#include "cuda/projection.cuh"

#include "cuda/heads.cuh"

namespace align::cuda {
namespace {

// The mask of column i * rank + d of the latents of a row.
__device__ float latent_mask(const HeadsParams& params, const Dropout& masks, int64_t row, int column) {
  if (masks.threshold == 0) return 1;
  return mask_bits(masks, row * params.u_width() + column, 1) & 1u ? masks.scale() : 0.f;
}

// Writes a column of z to all columns of u that are made of it, with the mask of each head.
__device__ void write_u(const HeadsParams& params, int64_t row, int column, float z, float* u) {
  const Dropout masks(params.masks);
  for (int j = column; j < params.u_width(); j += params.z_width()) {
    u[j] = params.scaling * latent_mask(params, masks, row, j) * z;
  }
}

// Replaces the logits w of a group by the softmax of the top_k largest; the others become 0. Of equal logits the lowest
// head is chosen.
__device__ void softmax(const HeadsParams& params, float* w) {
  float largest = w[0], least = -INFINITY;
  int last = params.heads;  // logits above `least` are chosen, and those equal to it up to this head
  for (int i = 1; i < params.heads; ++i) largest = fmaxf(largest, w[i]);
  for (int chosen = 0; chosen < params.top_k && params.top_k < params.heads; ++chosen) {
    const float bound = chosen == 0 ? INFINITY : least;
    const int after = chosen == 0 ? -1 : last;
    least = -INFINITY, last = params.heads;
    for (int i = 0; i < params.heads; ++i) {
      const bool left = w[i] < bound || (w[i] == bound && i > after);
      if (left && (last == params.heads || w[i] > least)) least = w[i], last = i;
    }
  }
  float total = 0;
  for (int i = 0; i < params.heads; ++i) {
    const bool chosen = !(w[i] < least) && (w[i] != least || i <= last);
    w[i] = chosen ? expf(w[i] - largest) : 0.f;
    total += w[i];
  }
  for (int i = 0; i < params.heads; ++i) w[i] /= total;
}

// Grid: blocks of elements for each group, of one gradient after the other.
__global__ void __launch_bounds__(kThreads) sum_chunks_kernel(ChunkSums job) {
  int index = int(blockIdx.x), kind = 0;
  while (index >= job.gradients[kind].blocks) index -= job.gradients[kind++].blocks;
  const ChunkSums::Gradient& gradient = job.gradients[kind];
  const int groups = int(job.shape.groups), group = index % groups;
  int begin, end;
  group_bounds(job.groups, job.shape.tokens, group, &begin, &end);
  const int chunks = count_chunks(end - begin, gradient.chunk_rows);
  const int64_t e = int64_t(index / groups) * kThreads + threadIdx.x, elements = gradient.elements;
  if (chunks == 1 || e >= elements) return;
  const float* sums = gradient.sums + first_chunk(begin, group, gradient.chunk_rows) * elements;
  gradient.out[group * elements + e] = sum_of_partials(sums, chunks, elements, e);
}

constexpr int kRowsOfBlock = 8;

// Calls body(row, column) for all columns of the rows of this block, which its threads share.
template <typename Body>
__device__ __forceinline__ void for_each_column(int64_t tokens, int columns, const Body& body) {
  const int64_t first = int64_t(blockIdx.x) * kRowsOfBlock;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kRowsOfBlock * columns; i += kThreads) {
    const int64_t row = first + i / columns;
    if (row < tokens) body(row, i % columns);
  }
}

// Computes, for one row, the logits of a group (column < 0), a column of z, or a latent of the offset path.
__device__ void combine_column(const CombineHeadsJob& job, int64_t row, int column) {
  const HeadsParams& params = job.params;
  const int u_width = params.u_width() + (job.partials ? params.offset_rank : 0);
  const auto sum = [&](int column) {
    return sum_of_partials(job.partials, job.splits, params.tokens * params.width(), row * params.width() + column);
  };
  const int offset = column - params.z_width();
  float* u = job.u + row * u_width;
  if (column < 0) {
    const int first = (column + params.groups) * params.heads;
    float* w = job.w + row * params.logits() + first;
    for (int i = 0; i < params.heads; ++i) w[i] = __fmul_rn(params.logit_scale, sum(params.router + first + i));
    softmax(params, w);
  } else if (offset < 0) {
    float* z = job.z + row * params.z_width() + column;
    if (job.partials) *z = sum(column / params.rank * params.stride + column % params.rank);
    write_u(params, row, column, *z, u);
  } else {
    u[params.u_width() + offset] = params.offset_scaling * sum(params.offset_start() + offset);
  }
}

__global__ void __launch_bounds__(kThreads) combine_heads_kernel(CombineHeadsJob job) {
  const int groups = job.partials ? job.params.groups : 0, offset_rank = job.partials ? job.params.offset_rank : 0;
  for_each_column(job.params.tokens, groups + job.params.z_width() + offset_rank,
                  [&](int64_t row, int column) { combine_column(job, row, column - groups); });
}

// Computes dl_i = w_i (dw_i - sum_j w_j dw_j) / tau for the logits of a group of a row, with dw_i from its segments.
__device__ void logit_gradients(const CombineHeadsBackwardJob& job, int split_cols, int64_t row, int group) {
  const HeadsParams& params = job.params;
  const int64_t first = (row * params.groups + group) * params.heads;
  const int begin = group * params.group, end = begin + params.group;
  const int64_t segments = job.router_weights.segments_of_chunk(job.cut.splits);
  const float* w = job.router_weights.w + first;
  float* dl = job.dz + row * params.width() + params.router + group * params.heads;
  float mean = 0;
  for (int i = 0; i < params.heads; ++i) {
    float dw = job.dw_in ? job.dw_in[first + i] : 0.f;
    for (int64_t chunk = 0; chunk < job.rank_chunks; ++chunk) {
      for (int split = begin / split_cols; split * split_cols < end; ++split) {
        const int64_t segment = chunk * segments + group + split;
        dw += job.router_weights.segments[(segment * params.tokens + row) * params.heads + i];
      }
    }
    dl[i] = dw;
    mean += w[i] * dw;
  }
  for (int i = 0; i < params.heads; ++i) dl[i] = params.logit_scale * w[i] * (dl[i] - mean);
}

// Computes, for one row, the gradient of the logits of a group (column < 0), or another column of dz: the sum of the
// gradients of all heads that use it.
__device__ void combine_column_backward(const CombineHeadsBackwardJob& job, int split_cols, int64_t row, int column) {
  const HeadsParams& params = job.params;
  const int offset = column - params.offset_start();
  const auto du = [&](int j) {
    return sum_of_partials(job.partials, job.cut.splits, params.tokens * params.du_width(),
                           row * params.du_width() + j);
  };
  if (column < 0) return logit_gradients(job, split_cols, row, column + params.groups);
  float* dz = job.dz + row * params.width() + column;
  if (offset >= params.offset_rank || (offset < 0 && column % params.stride >= params.rank)) {
    *dz = 0;
  } else if (offset >= 0) {
    *dz = params.offset_scaling * du(params.u_width() + offset);
  } else {
    const int z_column = column / params.stride * params.rank + column % params.stride;
    const int64_t element = row * params.z_width() + z_column;
    const Dropout masks(params.masks);
    float total = 0;
#pragma unroll 1
    for (int j = z_column; j < params.u_width(); j += params.z_width())
      total += latent_mask(params, masks, row, j) * du(j);
    *dz = params.scaling * total + (job.dz_in ? job.dz_in[element] : 0.f);
    if (params.groups == 0) write_u(params, row, z_column, job.z[element], job.u + row * params.u_width());
  }
}

__global__ void __launch_bounds__(kThreads) combine_heads_backward_kernel(CombineHeadsBackwardJob job, int split_cols) {
  const HeadsParams& params = job.params;
  for_each_column(params.tokens, params.width() - params.logits() + params.groups, [&](int64_t row, int column) {
    combine_column_backward(job, split_cols, row, column - params.groups);
  });
}

template <typename... Job>
void for_each_row(void (*kernel)(Job...), int64_t tokens, Stream stream, Job... job) {
  if (tokens > 0) launch(kernel, ceil_div(tokens, kRowsOfBlock), dim3(kThreads), 0, stream, job...);
}

}  // namespace

void sum_chunks(const ChunkSums& job, Stream stream) {
  int64_t blocks = 0;
  for (const ChunkSums::Gradient& gradient : job.gradients) blocks += gradient.blocks;
  launch(sum_chunks_kernel, blocks, dim3(kThreads), 0, stream, job);
}

void combine_heads(const CombineHeadsJob& job, Stream stream) {
  for_each_row(combine_heads_kernel, job.params.tokens, stream, job);
}

void combine_heads_backward(const CombineHeadsBackwardJob& job, int64_t tile_cols, Stream stream) {
  for_each_row(combine_heads_backward_kernel, job.params.tokens, stream, job, int(job.cut.split_tiles * tile_cols));
}

#define ALIGN_INSTANTIATE(...)                                                                \
  template void shrink<__VA_ARGS__>(const ShrinkJob<__VA_ARGS__::Element>&, int64_t, Stream); \
  template void backward<__VA_ARGS__>(const BackwardJob<__VA_ARGS__, LatentRows>&, Stream);   \
  template void expand<__VA_ARGS__>(const ExpandJob<__VA_ARGS__::Element>&, const LatentRows&, Stream);
ALIGN_FOR_EACH_MATH(ALIGN_INSTANTIATE)

}  // namespace align::cuda
