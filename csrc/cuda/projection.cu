// The kernels that several projection ops share, compiled once.
#include "cuda/projection.cuh"

#include "cuda/heads.cuh"

namespace align::cuda {
namespace {

// Gradient of head i's weight in a row: scaling * u_i . q_i without the weight itself, and what came in.
__device__ float weight_gradient(const UnmixJob& job, const Dropout& masks, int64_t row, int head, const float* du) {
  const Heads& heads = job.heads;
  const int64_t stride = heads.tokens * heads.du_width();
  float sum = 0;
  for (int d = 0; d < heads.rank; ++d) {
    const int column = head * heads.rank + d;
    const float u = latent_mask(heads, masks, row, column) * job.z[row * heads.z_width() + heads.z_column(column)];
    sum += u * sum_of_parts(du, job.slabs, stride, column);
  }
  return heads.scaling * sum + (job.dw_in ? job.dw_in[row * heads.heads + head] : 0.f);
}

// dl_i = w_i (dw_i - sum_j w_j dw_j) / tau
__device__ float logit_gradient(const UnmixJob& job, const Dropout& masks, int64_t row, int head, const float* du) {
  const Heads& heads = job.heads;
  const float* w = job.w + row * heads.heads;
  float mean = 0;
  for (int j = 0; j < heads.heads; ++j) mean += w[j] * weight_gradient(job, masks, row, j, du);
  return heads.logit_scale * w[head] * (weight_gradient(job, masks, row, head, du) - mean);
}

// A thread a column of dz: it gathers what the heads give back, and writes their latents again.
__global__ void __launch_bounds__(kThreads) unmix_kernel(UnmixJob job) {
  const Heads& heads = job.heads;
  const int64_t element = int64_t(blockIdx.x) * kThreads + threadIdx.x, stride = heads.tokens * heads.du_width();
  if (element >= heads.tokens * heads.width()) return;
  const int64_t row = element / heads.width();
  const int column = int(element % heads.width()), offset = column - heads.z_width();
  const float* du = job.parts + row * heads.du_width();
  const Dropout masks(heads.masks);
  if (heads.router > 0 && column >= heads.router) {
    job.dz[element] = logit_gradient(job, masks, row, column - heads.router, du);
  } else if (offset >= heads.offset_rank) {
    job.dz[element] = 0;
  } else if (offset >= 0) {
    job.dz[element] = heads.offset_scaling * sum_of_parts(du, job.slabs, stride, heads.u_width() + offset);
  } else {
    const float z = job.z[row * heads.z_width() + column];
    float dz = 0;
    for (int j = column; j < heads.u_width(); j += heads.z_width()) {
      const float weight = job.w ? job.w[row * heads.heads + j / heads.rank] : 1.f;
      const float mask = weight * latent_mask(heads, masks, row, j);
      job.u[row * heads.u_width() + j] = mask * z;
      dz += mask * sum_of_parts(du, job.slabs, stride, j);
    }
    job.dz[element] = heads.scaling * dz + (job.dz_in ? job.dz_in[row * heads.z_width() + column] : 0.f);
  }
}

}  // namespace

void unmix(const UnmixJob& job, Stream stream) {
  const int64_t elements = job.heads.tokens * job.heads.width();
  if (elements > 0) {
    launch(unmix_kernel, dim3(unsigned(ceil_div(elements, kThreads))), dim3(kThreads), 0, stream, job);
  }
}

#define ALIGN_INSTANTIATE(...)                                                                \
  template void shrink<__VA_ARGS__>(const ShrinkJob<__VA_ARGS__::Element>&, int64_t, Stream); \
  template void backward<__VA_ARGS__>(const BackwardJob<__VA_ARGS__, LatentRows>&, Stream);   \
  template void expand<__VA_ARGS__>(const ExpandJob<__VA_ARGS__::Element>&, const HeadMix&, Stream);
ALIGN_FOR_EACH_MATH(ALIGN_INSTANTIATE)
#undef ALIGN_INSTANTIATE

}  // namespace align::cuda
