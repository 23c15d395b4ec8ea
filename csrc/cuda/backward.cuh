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
    int blocks;   // 0: no such job
    int repeats;  // for each block of columns: the groups of rows times chunks
    int chunks;   // of ranks

    Outer() : blocks(0) {}
    Outer(const OuterJob<T>& outer, const Mix& mix)
        : job(outer),
          latents(mix),
          repeats(int(job.shape.groups) * job.chunks(Math::kRank)),
          chunks(job.chunks(Math::kRank)) {
      blocks = int(Grid(int64_t(job.blocks()) * repeats).x);
    }
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
  int index = int(blockIdx.x), kind = 0;
  while (kind < kOuterJobs && index >= job.outer[kind].blocks) index -= job.outer[kind++].blocks;
  if (kind < kOuterJobs) {
    const auto& outer = job.outer[kind];
    const int repeat = index % outer.repeats;
    outer_columns<Math, false>(outer.job, outer.latents, index / outer.repeats, repeat / outer.chunks,
                               repeat % outer.chunks);
  } else {
    expand_tiles<Math>(job.dx, job.dz, index % job.row_tiles, index / job.row_tiles);
  }
}

template <class Math, class Mix>
void backward(const BackwardJob<Math, Mix>& job, Stream stream) {
  int64_t blocks = job.row_tiles * job.dx.cut.slabs;
  for (const auto& outer : job.outer) blocks += outer.blocks;
  if (blocks > 0) {
    launch(backward_kernel<Math, Mix>, blocks, dim3(kThreads), kBackwardShared<Math>, stream, job);
  }
}

}  // namespace align::cuda
