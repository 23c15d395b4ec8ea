// backward computes everything that depends only on the gradients of the latents, in one launch with several kinds of
// blocks: outer products of x (dA, and dR of a router), outer products of dy (dB, unless the sweep computes it), and
// dx. At small widths a launch for each kind would leave multiprocessors idle.
#pragma once

#include "cuda/expand.cuh"
#include "cuda/outer.cuh"

namespace align::cuda {

constexpr int kOuterJobs = 3;

template <class Math, class LatentSource>
struct BackwardJob {
  using T = typename Math::Element;
  struct Outer {
    OuterJob<T> job;
    LatentSource latents;
    int blocks;   // 0: there is no such job
    int repeats;  // blocks for the same columns: one for each chunk of rows and chunk of ranks
    int chunks;   // chunks of ranks

    Outer() : blocks(0) {}
    Outer(const OuterJob<T>& outer, const LatentSource& source)
        : job(outer),
          latents(source),
          repeats(int(Grid(job.row_chunks() * job.chunks(Math::kRank)).x)),
          chunks(job.chunks(Math::kRank)) {
      blocks = int(Grid(int64_t(job.template blocks<false>()) * repeats).x);
    }
  };
  Outer outer[kOuterJobs];
  ExpandJob<T> dx;
  LatentSource dz;
  int row_tiles;  // row tiles of dx; 0: dx is not wanted
};

template <class Math>
constexpr size_t kBackwardShared = std::max(kOuterShared<Math, false>, kExpandShared<Math>);

template <class Math, class LatentSource>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(BackwardJob<Math, LatentSource> job) {
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

template <class Math, class LatentSource>
void backward(const BackwardJob<Math, LatentSource>& job, Stream stream) {
  int64_t blocks = job.row_tiles * job.dx.cut.splits;
  for (const auto& outer : job.outer) blocks += outer.blocks;
  if (blocks > 0) {
    launch(backward_kernel<Math, LatentSource>, blocks, dim3(kThreads), kBackwardShared<Math>, stream, job);
  }
}

}  // namespace align::cuda
