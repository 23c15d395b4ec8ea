// backward: what depends on the latents' gradients alone, in one launch whose blocks are of several kinds: outer
// products of x (dA, a router's dR), outer products of dy (dB, unless the sweep has them), and dx. Each kind by itself
// would leave a small GPU's multiprocessors idle at small widths.
#pragma once

#include "cuda/expand.cuh"
#include "cuda/outer.cuh"

namespace align::cuda {

constexpr int kOuterJobs = 3;

template <class Math, class Mix>
struct BackwardJob {
  using T = typename Math::Element;
  struct Outer {
    OuterJob<T> job;
    Mix latents;
    bool wanted;

    __host__ __device__ int chunks() const { return (job.m.ranks + Math::kRank - 1) / Math::kRank; }
    // For each block of columns: a thread block for each group of rows and chunk of ranks.
    __host__ __device__ int repeats() const { return int(job.shape.groups) * chunks(); }
    __host__ __device__ int64_t blocks() const { return wanted ? int64_t(job.blocks()) * repeats() : 0; }
  };
  Outer outer[kOuterJobs];
  ExpandJob<T> dx;
  Mix dz;
  int row_tiles;  // of dx; 0: not wanted
};

template <class Math>
constexpr size_t kBackwardShared = std::max(kOuterShared<Math, false>, kExpandShared<Math>);

template <class Math, class Mix>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(BackwardJob<Math, Mix> job) {
  require(compiled_here<Math>());
  if (!compiled_here<Math>()) return;
  int64_t index = blockIdx.x;
  int kind = 0;
  while (kind < kOuterJobs && index >= job.outer[kind].blocks()) index -= job.outer[kind++].blocks();
  if (kind < kOuterJobs) {
    const int repeats = job.outer[kind].repeats(), chunks = job.outer[kind].chunks(), repeat = int(index % repeats);
    outer_columns<Math, false>(job.outer[kind].job, job.outer[kind].latents, int(index / repeats), repeat / chunks,
                               repeat % chunks);
  } else {
    expand_tiles<Math>(job.dx, job.dz, int(index % job.row_tiles), int(index / job.row_tiles));
  }
}

template <class Math, class Mix>
void backward(const BackwardJob<Math, Mix>& job, Stream stream) {
  int64_t blocks = job.row_tiles * job.dx.cut.slabs;
  for (const auto& outer : job.outer) blocks += outer.blocks();
  if (blocks > 0) {
    launch(backward_kernel<Math, Mix>, dim3(unsigned(blocks)), dim3(kThreads), kBackwardShared<Math>, stream, job);
  }
}

}  // namespace align::cuda
