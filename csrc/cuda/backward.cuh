// backward: what depends on dz alone, in one launch whose blocks are of three kinds: outer products of x (dA), outer
// products of dy (dB, unless the sweep has them), and dx. Each kind by itself would leave a small GPU's
// multiprocessors idle at small widths.
#pragma once

#include "cuda/expand.cuh"
#include "cuda/outer.cuh"

namespace align::cuda {

template <class Math, class Mix>
struct BackwardJob {
  using T = typename Math::Element;
  OuterJob<T> x;   // dA
  OuterJob<T> dy;  // dB
  ExpandJob<T> dx;
  Mix dz, z;
  int64_t x_blocks, dy_blocks;  // of columns; 0: no such job
  int64_t row_tiles;
  int64_t rank_chunks;
};

template <class Math>
constexpr size_t kBackwardShared = std::max(kOuterShared<Math, false>, kExpandShared<Math>);

template <class Math, class Mix>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(BackwardJob<Math, Mix> job) {
  if (!compiled_here<Math>()) return;
  int64_t index = blockIdx.x;
  const int64_t repeats = job.x.shape.groups * job.rank_chunks;
  const int64_t outer_of_x = job.x_blocks * repeats, outer_of_dy = job.dy_blocks * repeats;
  if (index < outer_of_x + outer_of_dy) {
    const bool of_x = index < outer_of_x;
    if (!of_x) index -= outer_of_x;
    const int64_t block = index / repeats, group = index % repeats / job.rank_chunks, chunk = index % job.rank_chunks;
    outer_columns<Math, false>(of_x ? job.x : job.dy, of_x ? job.dz : job.z, block, group, chunk);
  } else {
    index -= outer_of_x + outer_of_dy;
    expand_tiles<Math>(job.dx, job.dz, index % job.row_tiles, index / job.row_tiles);
  }
}

template <class Math, class Mix>
void backward(const BackwardJob<Math, Mix>& job, Stream stream) {
  const int64_t outer = (job.x_blocks + job.dy_blocks) * job.x.shape.groups * job.rank_chunks;
  const int64_t blocks = outer + job.row_tiles * job.dx.cut.slabs;
  if (blocks > 0) {
    launch(backward_kernel<Math, Mix>, dim3(unsigned(blocks)), dim3(kThreads), kBackwardShared<Math>, stream, job);
  }
}

}  // namespace align::cuda
