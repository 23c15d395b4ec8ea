// The kernels that several projection operators use, compiled once.
#include "cuda/projection.cuh"

#include "cuda/heads.cuh"

namespace align::cuda {
namespace {

// The mask of column i * rank + d of the latents of a row.
__device__ float latent_mask(const HeadsParams& params, const Dropout& masks, int64_t row, int column) {
  if (masks.threshold == 0) return 1;
  const uint64_t element = row * params.row_numbers + (params.first_number + column);
  const PhiloxBlock block = philox(masks.seed, element / kPhiloxLanes, masks.offset);
  const int lane = int(element % kPhiloxLanes);  // no index that is computed: the block would lie in memory
  const uint32_t first = lane < 2 ? block.word[0] : block.word[1], second = lane < 6 ? block.word[2] : block.word[3];
  const uint32_t word = lane < 4 ? first : second;
  return (lane % 2 ? masks.keeps_high(word) : masks.keeps_low(word)) ? masks.scale() : 0.f;
}

// Writes a column of z to all columns of u that are made of it, with the mask of each head.
__device__ void write_u(const HeadsParams& params, int64_t row, int column, float z, float* u) {
  const Dropout masks(params.masks, params.u_width());
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
  if ((chunks == 1 && !gradient.of_only_chunks) || e >= elements) return;
  const float* sums = gradient.sums + first_chunk(begin, group, gradient.chunk_rows) * gradient.stride;
  gradient.out[group * elements + e] = sum_of_partials(sums, chunks, gradient.stride, e);
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
  const HeadsColumns& columns = params.columns;
  const auto sum = [&](int column) {
    return sum_of_partials(job.partials, job.splits, params.tokens * columns.width, row * columns.width + column);
  };
  const int offset = column - params.z_width();
  float* u = job.u + row * params.du_width();
  if (column < 0) {
    const int first = (column + params.groups) * params.heads;
    float* w = job.w + row * params.logits() + first;
    for (int i = 0; i < params.heads; ++i) w[i] = __fmul_rn(params.logit_scale, sum(columns.router + first + i));
    softmax(params, w);
  } else if (offset < 0) {
    float* z = job.z + row * params.z_width() + column;
    *z = sum(columns.first + column / params.rank * params.stride + column % params.rank);
    write_u(params, row, column, *z, u);
  } else {
    u[params.u_width() + offset] = params.offset_scaling * sum(columns.first + params.offset_start() + offset);
  }
}

__global__ void __launch_bounds__(kThreads) combine_heads_kernel(CombineHeadsJob job) {
  const HeadsParams& params = job.params;
  for_each_column(params.tokens, params.groups + params.z_width() + params.offset_rank,
                  [&](int64_t row, int column) { combine_column(job, row, column - params.groups); });
}

// The sum that add_partials has left for column j of a row and a group of outputs.
__device__ float& group_sum(const CombineHeadsBackwardJob& job, int64_t row, int group, int j) {
  const HeadsParams& params = job.params;
  return job.partials[(group * job.splits * params.tokens + row) * params.du_width() + j];
}

// Adds the partials of a column of a row in the place of the first ones, and writes the columns of u.
__device__ void add_partials(const CombineHeadsBackwardJob& job, int64_t row, int j) {
  const HeadsParams& params = job.params;
  for (int group = 0; group < params.output_groups(); ++group) {
    float& sum = group_sum(job, row, group, j);
    sum = sum_of_partials(&sum, job.splits, params.tokens * params.du_width(), 0);
  }
  if (j < params.z_width()) {
    write_u(params, row, j, job.z[row * params.z_width() + j], job.u + row * params.u_width());
  }
}

// Computes dl_i = w_i (dw_i - sum_j w_j dw_j) / tau for the logits of a group of a row, with dw_i = <u_i, du_i>.
__device__ void logit_gradients(const CombineHeadsBackwardJob& job, int64_t row, int group) {
  const HeadsParams& params = job.params;
  const int64_t first = (row * params.groups + group) * params.heads;
  const float *w = job.w + first, *u = job.u + row * params.u_width();
  float* dl = job.dz + row * params.columns.width + params.columns.router + group * params.heads;
  float mean = 0;
  for (int i = 0; i < params.heads; ++i) {
    float dw = job.dw_in ? job.dw_in[first + i] : 0.f;
    for (int j = i * params.rank; j < (i + 1) * params.rank; ++j) dw += u[j] * group_sum(job, row, group, j);
    dl[i] = dw;
    mean += w[i] * dw;
  }
  for (int i = 0; i < params.heads; ++i) dl[i] = params.logit_scale * w[i] * (dl[i] - mean);
}

// Computes, for one row, the gradient of the logits of a group (column < 0), or a column of the block in dz: the sum of
// the gradients of all heads that use it.
__device__ void combine_column_backward(const CombineHeadsBackwardJob& job, int64_t row, int column) {
  const HeadsParams& params = job.params;
  if (column < 0) return logit_gradients(job, row, column + params.groups);
  const int offset = column - params.offset_start();
  const auto du = [&](int j) {
    float total = 0;
    for (int group = 0; group < params.output_groups(); ++group) {
      const bool weighted = params.groups > 0 && j < params.u_width();
      const float w = weighted ? job.w[(row * params.groups + group) * params.heads + j / params.rank] : 1.f;
      total += w * group_sum(job, row, group, j);
    }
    return total;
  };
  float* dz = job.dz + row * params.columns.width + params.columns.first + column;
  if (offset >= params.offset_rank || (offset < 0 && column % params.stride >= params.rank)) {
    *dz = 0;
  } else if (offset >= 0) {
    *dz = params.offset_scaling * du(params.u_width() + offset);
  } else {
    const int z_column = column / params.stride * params.rank + column % params.stride;
    const Dropout masks(params.masks, params.u_width());
    float total = 0;
#pragma unroll 1
    for (int j = z_column; j < params.u_width(); j += params.z_width())
      total += latent_mask(params, masks, row, j) * du(j);
    *dz = params.scaling * total + (job.dz_in ? job.dz_in[row * params.z_width() + z_column] : 0.f);
  }
}

__global__ void __launch_bounds__(kThreads) combine_heads_backward_kernel(CombineHeadsBackwardJob job) {
  const HeadsParams& params = job.params;
  for_each_column(params.tokens, params.du_width(), [&](int64_t row, int j) { add_partials(job, row, j); });
  __syncthreads();  // the sums and u of the block's rows are complete
  for_each_column(params.tokens, params.columns.block + params.groups,
                  [&](int64_t row, int column) { combine_column_backward(job, row, column - params.groups); });
}

template <typename... Job>
void for_each_row(void (*kernel)(Job...), int64_t tokens, Stream stream, Job... job) {
  if (tokens > 0) launch(kernel, ceil_div(tokens, kRowsOfBlock), dim3(kThreads), 0, stream, job...);
}

}  // namespace

void sum_chunks(const ChunkSums& job, Stream stream) {
  int64_t blocks = 0;
  for (const ChunkSums::Gradient& gradient : job.gradients) blocks += gradient.blocks;
  if (blocks > 0) launch(sum_chunks_kernel, blocks, dim3(kThreads), 0, stream, job);
}

void combine_heads(const CombineHeadsJob& job, Stream stream) {
  for_each_row(combine_heads_kernel, job.params.tokens, stream, job);
}

void combine_heads_backward(const CombineHeadsBackwardJob& job, Stream stream) {
  for_each_row(combine_heads_backward_kernel, job.params.tokens, stream, job);
}

#define ALIGN_INSTANTIATE(...)                                                                \
  template void shrink<__VA_ARGS__>(const ShrinkJob<__VA_ARGS__::Element>&, int64_t, Stream); \
  template void backward<__VA_ARGS__>(const BackwardJob<__VA_ARGS__, LatentRows>&, Stream);   \
  template void expand<__VA_ARGS__>(const ExpandJob<__VA_ARGS__::Element>&, const LatentRows&, Stream);
ALIGN_FOR_EACH_MATH(ALIGN_INSTANTIATE)

}  // namespace align::cuda
