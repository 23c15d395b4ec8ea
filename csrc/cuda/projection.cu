// The kernels that several projection ops share, compiled once.
#include "cuda/projection.cuh"

#include "cuda/heads.cuh"

namespace align::cuda {
namespace {

// Mask of column i * rank + d of a row's latents.
__device__ float latent_mask(const Heads& heads, const Dropout& masks, int64_t row, int column) {
  if (masks.threshold == 0) return 1;
  return keep_bits(masks, row * heads.u_width() + column, 1) & 1u ? masks.scale() : 0.f;
}

// The row of latents that a column of z is in, masked for each head that has it.
__device__ void write_heads(const Heads& heads, int64_t row, int column, float z, float* u) {
  const Dropout masks(heads.masks);
  for (int j = column; j < heads.u_width(); j += heads.z_width()) {
    u[j] = heads.scaling * latent_mask(heads, masks, row, j) * z;
  }
}

// w = softmax of the top_k largest of a group's logits, in place; 0 elsewhere. Of equal ones the lowest head is chosen.
__device__ void softmax(const Heads& heads, float* w) {
  float largest = w[0], least = -INFINITY;
  int last = heads.heads;  // chosen are the logits above the least, and its equals up to this head
  for (int i = 1; i < heads.heads; ++i) largest = fmaxf(largest, w[i]);
  for (int chosen = 0; chosen < heads.top_k && heads.top_k < heads.heads; ++chosen) {
    const float bound = chosen == 0 ? INFINITY : least;
    const int after = chosen == 0 ? -1 : last;
    least = -INFINITY, last = heads.heads;
    for (int i = 0; i < heads.heads; ++i) {
      const bool left = w[i] < bound || (w[i] == bound && i > after);
      if (left && (last == heads.heads || w[i] > least)) least = w[i], last = i;
    }
  }
  float total = 0;
  for (int i = 0; i < heads.heads; ++i) {
    const bool chosen = !(w[i] < least) && (w[i] != least || i <= last);
    w[i] = chosen ? expf(w[i] - largest) : 0.f;
    total += w[i];
  }
  for (int i = 0; i < heads.heads; ++i) w[i] /= total;
}

constexpr int kRowsOfBlock = 8;

// Calls body(row, column), column < columns, for the rows of this block: a thread one of them at a time.
template <typename Body>
__device__ __forceinline__ void for_each_column(int64_t tokens, int columns, const Body& body) {
  const int64_t first = int64_t(blockIdx.x) * kRowsOfBlock;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kRowsOfBlock * columns; i += kThreads) {
    const int64_t row = first + i / columns;
    if (row < tokens) body(row, i % columns);
  }
}

// A group of a row's logits (column < 0), a column of its z, or a latent of its offset path.
__device__ void mix_column(const MixJob& job, int64_t row, int column) {
  const Heads& heads = job.heads;
  const int u_width = heads.u_width() + (job.parts ? heads.offset_rank : 0);
  const auto sum = [&](int column) {
    return sum_of_parts(job.parts, job.slabs, heads.tokens * heads.width(), row * heads.width() + column);
  };
  const int offset = column - heads.z_width();
  float* u = job.u + row * u_width;
  if (column < 0) {
    const int first = (column + heads.groups) * heads.heads;
    float* w = job.w + row * heads.logits() + first;
    for (int i = 0; i < heads.heads; ++i) w[i] = __fmul_rn(heads.logit_scale, sum(heads.router + first + i));
    softmax(heads, w);
  } else if (offset < 0) {
    float* z = job.z + row * heads.z_width() + column;
    if (job.parts) *z = sum(column / heads.rank * heads.stride + column % heads.rank);
    write_heads(heads, row, column, *z, u);
  } else {
    u[heads.u_width() + offset] = heads.offset_scaling * sum(heads.offset_start() + offset);
  }
}

__global__ void __launch_bounds__(kThreads) mix_kernel(MixJob job) {
  const int groups = job.parts ? job.heads.groups : 0, offset_rank = job.parts ? job.heads.offset_rank : 0;
  for_each_column(job.heads.tokens, groups + job.heads.z_width() + offset_rank,
                  [&](int64_t row, int column) { mix_column(job, row, column - groups); });
}

// dl_i = w_i (dw_i - sum_j w_j dw_j) / tau for the logits of a group of a row, dw_i in segments.
__device__ void unmix_logits(const UnmixJob& job, int slab_cols, int64_t row, int group) {
  const Heads& heads = job.heads;
  const int64_t first = (row * heads.groups + group) * heads.heads;
  const int begin = group * heads.group, end = begin + heads.group;
  const int64_t segments = job.weighing.segments_of_chunk(job.cut.slabs);
  const float* w = job.weighing.w + first;
  float* dl = job.dz + row * heads.width() + heads.router + group * heads.heads;
  float mean = 0;
  for (int i = 0; i < heads.heads; ++i) {
    float dw = job.dw_in ? job.dw_in[first + i] : 0.f;
    for (int64_t chunk = 0; chunk < job.rank_chunks; ++chunk) {
      for (int slab = begin / slab_cols; slab * slab_cols < end; ++slab) {
        const int64_t segment = chunk * segments + group + slab;
        dw += job.weighing.segments[(segment * heads.tokens + row) * heads.heads + i];
      }
    }
    dl[i] = dw;
    mean += w[i] * dw;
  }
  for (int i = 0; i < heads.heads; ++i) dl[i] = heads.logit_scale * w[i] * (dl[i] - mean);
}

// A group of a row's logits (place < 0), or another place of its dz, which gathers what the heads give back.
__device__ void unmix_place(const UnmixJob& job, int slab_cols, int64_t row, int place) {
  const Heads& heads = job.heads;
  const int offset = place - heads.offset_start();
  const auto du = [&](int j) {
    return sum_of_parts(job.parts, job.cut.slabs, heads.tokens * heads.du_width(), row * heads.du_width() + j);
  };
  if (place < 0) return unmix_logits(job, slab_cols, row, place + heads.groups);
  float* dz = job.dz + row * heads.width() + place;
  if (offset >= heads.offset_rank || (offset < 0 && place % heads.stride >= heads.rank)) {
    *dz = 0;
  } else if (offset >= 0) {
    *dz = heads.offset_scaling * du(heads.u_width() + offset);
  } else {
    const int column = place / heads.stride * heads.rank + place % heads.stride;
    const int64_t element = row * heads.z_width() + column;
    const Dropout masks(heads.masks);
    float total = 0;
#pragma unroll 1
    for (int j = column; j < heads.u_width(); j += heads.z_width()) total += latent_mask(heads, masks, row, j) * du(j);
    *dz = heads.scaling * total + (job.dz_in ? job.dz_in[element] : 0.f);
    if (heads.groups == 0) write_heads(heads, row, column, job.z[element], job.u + row * heads.u_width());
  }
}

__global__ void __launch_bounds__(kThreads) unmix_kernel(UnmixJob job, int slab_cols) {
  const Heads& heads = job.heads;
  for_each_column(heads.tokens, heads.width() - heads.logits() + heads.groups,
                  [&](int64_t row, int column) { unmix_place(job, slab_cols, row, column - heads.groups); });
}

template <typename... Job>
void for_each_row(void (*kernel)(Job...), int64_t tokens, Stream stream, Job... job) {
  if (tokens > 0) launch(kernel, ceil_div(tokens, kRowsOfBlock), dim3(kThreads), 0, stream, job...);
}

}  // namespace

void mix(const MixJob& job, Stream stream) { for_each_row(mix_kernel, job.heads.tokens, stream, job); }

void unmix(const UnmixJob& job, int64_t tile_cols, Stream stream) {
  for_each_row(unmix_kernel, job.heads.tokens, stream, job, int(job.cut.slab_tiles * tile_cols));
}

#define ALIGN_INSTANTIATE(...)                                                                \
  template void shrink<__VA_ARGS__>(const ShrinkJob<__VA_ARGS__::Element>&, int64_t, Stream); \
  template void backward<__VA_ARGS__>(const BackwardJob<__VA_ARGS__, LatentRows>&, Stream);   \
  template void expand<__VA_ARGS__>(const ExpandJob<__VA_ARGS__::Element>&, const LatentRows&, Stream);
ALIGN_FOR_EACH_MATH(ALIGN_INSTANTIATE)
#undef ALIGN_INSTANTIATE

}  // namespace align::cuda
