// There are six launches, or five with given bandwidths: count the tokens of each task by blocks of 256; add up the
// counts and assign rows and tiles; choose the tokens and gather their z; compute the bandwidth; process the pairs; add
// up the splits. Only the device knows how many tokens take part, so the grids have the largest possible size, and
// blocks without work end at once.
//
// Pairs: a block processes 32 rows of one task with its split of the tiles of 32 rows, for 16 or 64 dimensions of the
// gradient. Distances need all dimensions: for larger ranks each 64 dimensions read the tiles again. Each of 128
// threads has 2 x 4 pairs while kernels are computed, then 4 dimensions of one or four rows for the gradient; h goes
// from one to the other through shared memory. Each block takes ordered pairs, so that no other block writes to its
// rows. Unordered pairs would save half of the arithmetic, a few microseconds, but need twice the partial sums.
#include "ops/mk_mmd.h"

#include "cuda/mmd_tiles.cuh"
#include "ops/convert.h"

namespace align::cuda {
namespace {

constexpr int kThreads = 256;  // also the tokens of a block
constexpr int kMaxSplits = 16;
constexpr int64_t kPairBlocks = 1024;  // the number of blocks to aim at: several for each multiprocessor

struct TaskRows {
  int count;   // tokens
  int chosen;  // tokens that take part
  int first;   // first row
  int tile;    // first tile
};

// Numbers that depend on the ids and on the values.
struct Layout {
  int64_t tiles, rows, tasks;  // those that take part
  double bandwidth;

  __device__ bool some(const MmdKernels& kernels) const {
    return tasks >= 2 && !(kernels.relative && bandwidth < kMmdMinBandwidth);
  }
};

// A call of the operator, without z, and its workspace. All kernels after the gathering do not depend on the type of z.
struct Job {
  MkMmdArgs<float> args;
  int64_t blocks;  // blocks of tokens
  int64_t most_rows, most_tiles;
  int splits;
  int lanes;        // threads along a row
  int chunks;       // chunks of dimensions of the pairs
  int first_chunk;  // first chunk of a launch
  int* before;      // [tasks, blocks]: tokens of a task in a block, later in all blocks before it
  TaskRows* task;   // [tasks]
  MmdTile* tile;    // [most_tiles]
  Layout* layout;   // [1]
  float* z;         // [most_rows, rank]: z of the tokens that take part
  float* partials;  // [splits, most_rows, rank]: sum_b omega h (z_a - z_b), up to a factor
  double* value;    // [most_tiles, splits]

  __device__ MmdTile tile_at(int64_t i) const { return {tile[i].task, tile[i].first, tile[i].rows}; }
  // omega for two different tokens of tasks i and j.
  __device__ double omega(int i, int j) const {
    const double ni = task[i].chosen, nj = task[j].chosen;
    return i != j ? -1 / (ni * nj) : double(layout->tasks - 1) / (ni * (args.u_statistic ? ni - 1 : ni));
  }
  __device__ double pairs_scale() const {
    return args.mean_pairs ? 2 / double(layout->tasks * (layout->tasks - 1)) : 1;
  }
};

template <typename P>
void allocate(intptr_t& end, P*& pointer, int64_t items) {
  constexpr int64_t kAlign = 256;
  pointer = reinterpret_cast<P*>(end);
  end += ceil_div(items * int64_t(sizeof(P)), kAlign) * kAlign;
}

template <typename T>
Job job_of(const MkMmdArgs<T>& args) {
  Job job = {};
  job.args = {.tokens = args.tokens,
              .rank = args.rank,
              .tasks = args.tasks,
              .n_max = args.n_max,
              .u_statistic = args.u_statistic,
              .mean_pairs = args.mean_pairs,
              .z = nullptr,
              .task = args.task,
              .loss = args.loss,
              .gradient = args.gradient,
              .slot = args.slot,
              .workspace = args.workspace,
              .kernels = args.kernels};
  return job;
}

// Assigns the workspace, which begins at an address, and returns its end.
intptr_t fill(Job& job, intptr_t workspace) {
  const auto& args = job.args;
  job.blocks = ceil_div(args.tokens, kThreads);
  job.most_rows = mmd_rows(args.tokens, args.tasks, args.n_max);
  job.most_tiles = mmd_tiles(job.most_rows, args.tasks);
  const int64_t most_splits = std::min<int64_t>(kMaxSplits, std::max<int64_t>(job.most_tiles, 1));
  job.splits = int(std::clamp<int64_t>(kPairBlocks / std::max<int64_t>(job.most_tiles, 1), 1, most_splits));
  for (job.lanes = 1; job.lanes < args.rank && job.lanes < kWarp;) job.lanes *= 2;
  allocate(workspace, job.before, args.tasks * job.blocks);
  allocate(workspace, job.task, args.tasks);
  allocate(workspace, job.tile, job.most_tiles);
  allocate(workspace, job.layout, 1);
  allocate(workspace, job.z, job.most_rows * args.rank);
  allocate(workspace, job.partials, job.splits * job.most_rows * args.rank);
  allocate(workspace, job.value, job.most_tiles * job.splits);
  return workspace;
}

// ---- The tokens that take part

// The task of token blockIdx.x * 256 + threadIdx.x, or -1.
__device__ int task_of(const MkMmdArgs<float>& args) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t id = t < args.tokens ? args.task[t] : -1;
  return id >= 0 && id < args.tasks ? int(id) : -1;
}

__global__ void __launch_bounds__(kThreads) count_kernel(Job job) {
  __shared__ int task[kThreads];
  task[threadIdx.x] = task_of(job.args);
  __syncthreads();  // task is complete
  for (int64_t i = threadIdx.x; i < job.args.tasks; i += kThreads) {
    int count = 0;
    for (int t = 0; t < kThreads; ++t) count += task[t] == i;
    job.before[i * job.blocks + blockIdx.x] = count;
  }
}

// The sum over the lanes up to this one.
__device__ int sum_to_lane(int value) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, value, offset);
    if (int(threadIdx.x % kWarp) >= offset) value += other;
  }
  return value;
}

__global__ void __launch_bounds__(kThreads) layout_kernel(Job job) {
  const auto& args = job.args;
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = threadIdx.x / kWarp; i < args.tasks; i += kThreads / kWarp) {  // one warp for each task
    int* before = job.before + i * job.blocks;
    int count = 0;
    for (int64_t first = 0; first < job.blocks; first += kWarp) {
      const int64_t block = first + lane;
      const int mine = block < job.blocks ? before[block] : 0, sum = sum_to_lane(mine);
      if (block < job.blocks) before[block] = count + sum - mine;
      count += __shfl_sync(0xffffffffu, sum, kWarp - 1);
    }
    const int most = int(args.n_max < args.tokens ? args.n_max : args.tokens);
    if (lane == 0) {
      job.task[i].count = count;
      job.task[i].chosen = count < 2 ? 0 : count < most ? count : most;
    }
  }
  __syncthreads();  // counts are complete
  if (threadIdx.x == 0) {
    int rows = 0, tiles = 0, tasks = 0;
    for (int64_t i = 0; i < args.tasks; ++i) {
      const int chosen = job.task[i].chosen;
      job.task[i].first = rows;
      job.task[i].tile = tiles;
      rows += chosen;
      tiles += (chosen + kMmdTileRows - 1) / kMmdTileRows;
      tasks += chosen > 0;
    }
    job.layout->tiles = tiles;
    job.layout->rows = rows;
    job.layout->tasks = tasks;
    job.layout->bandwidth = 1;
  }
  __syncthreads();  // first and tile are complete
  for (int64_t i = threadIdx.x; i < args.tasks; i += kThreads) {
    const int chosen = job.task[i].chosen, first = job.task[i].first;
    MmdTile* tile = job.tile + job.task[i].tile;
    for (int r = 0; r < chosen; r += kMmdTileRows, ++tile) {
      tile->task = int(i);
      tile->first = first + r;
      tile->rows = chosen - r < kMmdTileRows ? chosen - r : kMmdTileRows;
    }
  }
}

// Token o of a task's n is the j-th of its m chosen ones iff o = floor(j n / m); then j = ceil(o m / n).
__device__ int row_of(const TaskRows& task, int64_t o) {
  const int64_t n = task.count, m = task.chosen;
  if (m == 0) return -1;
  const int64_t j = n == m ? o : (o * m + n - 1) / n;
  return j < m && (n == m || j * n / m == o) ? int(task.first + j) : -1;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) choose_kernel(Job job, const T* z) {
  __shared__ int task[kThreads];
  __shared__ int row[kThreads];
  const auto& args = job.args;
  const int thread = threadIdx.x, id = task_of(args);
  const int64_t begin = int64_t(blockIdx.x) * kThreads;
  task[thread] = id;
  __syncthreads();  // task is complete
  int earlier = 0;
  for (int t = 0; t < thread; ++t) earlier += task[t] == id;
  row[thread] = id < 0 ? -1 : row_of(job.task[id], job.before[id * job.blocks + blockIdx.x] + earlier);
  if (begin + thread < args.tokens) args.slot[begin + thread] = row[thread];
  __syncthreads();  // row is complete
  for (int t = thread / job.lanes; t < kThreads; t += kThreads / job.lanes) {
    if (row[t] < 0) continue;
    const T* from = z + (begin + t) * args.rank;
    float* to = job.z + row[t] * args.rank;
    for (int64_t d = thread % job.lanes; d < args.rank; d += job.lanes) to[d] = widen(from[d]);
  }
}

// One block computes 2 sum |z - mean|^2 / (n - 1).
__global__ void __launch_bounds__(kThreads) bandwidth_kernel(Job job) {
  __shared__ double column[kThreads];
  const int64_t rank = job.args.rank, rows = job.layout->rows;
  const int lane = threadIdx.x % job.lanes, group = threadIdx.x / job.lanes, groups = kThreads / job.lanes;
  if (job.layout->tasks < 2) return;
  double squares = 0;
  for (int64_t first = 0; first < rank; first += job.lanes) {
    const int64_t d = first + lane;
    double sum = 0;
    for (int64_t r = group; r < rows && d < rank; r += groups) sum += double(job.z[r * rank + d]);
    column[threadIdx.x] = sum;
    __syncthreads();  // column is complete
    double mean = 0;
    for (int i = 0; i < groups; ++i) mean += column[i * job.lanes + lane];
    mean /= double(rows);
    for (int64_t r = group; r < rows && d < rank; r += groups) {
      const double difference = double(job.z[r * rank + d]) - mean;
      squares += difference * difference;
    }
    __syncthreads();  // column may be overwritten
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) job.layout->bandwidth = 2 * squares / double(rows - 1);
}

// ---- Pairs

template <int kDims>
__global__ void __launch_bounds__(kPairThreads, 4) pairs_kernel(Job job) {
  __shared__ __align__(16) TileRows<kDims> a, b;
  __shared__ TileWeights h;
  __shared__ Rates rates;
  const auto& args = job.args;
  const int64_t tiles = job.layout->tiles, rank = args.rank;
  if (blockIdx.x >= tiles || !job.layout->some(args.kernels)) return;

  const int chunk = int(blockIdx.z) + job.first_chunk, chunks = job.chunks;
  const MmdTile mine = job.tile_at(blockIdx.x);
  const double rows = double(job.layout->rows);
  fill_rates(rates, args.kernels, job.layout->bandwidth);
  double value = 0;
  GradientSums<kDims> gradient;
  const int64_t begin = tiles * blockIdx.y / job.splits, end = tiles * (blockIdx.y + 1) / job.splits;
  for (int64_t index = begin; index < end; ++index) {
    const MmdTile other = job.tile_at(index);
    float d2[2][4] = {};
    for (int i = 1; i <= chunks; ++i) {  // the block's dimensions come last and stay for the gradient
      const int64_t d = int64_t((chunk + i) % chunks) * kDims;
      __syncthreads();  // a, b and h have been read
      if (index == begin || chunks > 1) load_rows<kDims>(job.z, mine, d, rank, a);
      load_rows<kDims>(job.z, other, d, rank, b);
      __syncthreads();  // a, b, and in the first round rates, are complete
      add_distances<kDims>(a, b, d2);
    }
    const double omega = job.omega(mine.task, other.task);
    value += omega * double(add_kernels(rates, args.kernels.count, d2, mine, other, float(omega * rows * rows), h));
    __syncthreads();  // h is complete
    gradient.add(h, a, b);
  }
  const int64_t first = int64_t(chunk) * kDims;
  gradient.write(mine.rows, rank - first, rank,
                 job.partials + (int64_t(blockIdx.y) * job.most_rows + mine.first) * rank + first);
  value = block_sum(value);
  if (threadIdx.x == 0 && chunk == 0) job.value[blockIdx.x * int64_t(job.splits) + blockIdx.y] = value;
}

// ---- Sums over the splits

__global__ void __launch_bounds__(kThreads) finish_kernel(Job job) {
  const auto& args = job.args;
  const bool some = job.layout->some(args.kernels);
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x, size = job.most_rows * args.rank;
  if (e < size) {
    float sum = 0;
    if (some && e < job.layout->rows * args.rank) {
      for (int s = 0; s < job.splits; ++s) sum += job.partials[s * size + e];
      const double rows = double(job.layout->rows), beta = args.kernels.beta[0] / job.layout->bandwidth;
      sum *= float(-4 * beta / (rows * rows) * job.pairs_scale());
    }
    args.gradient[e] = sum;
  }
  if (blockIdx.x > 0) return;
  double value = 0;
  for (int64_t i = threadIdx.x; i < job.layout->tiles * job.splits && some; i += kThreads) value += job.value[i];
  for (int64_t i = threadIdx.x; i < args.tasks && some && !args.u_statistic; i += kThreads) {  // each token with itself
    const int chosen = job.task[i].chosen;
    if (chosen > 0) value += job.omega(int(i), int(i)) * chosen * args.kernels.count;
  }
  value = block_sum(value);
  if (threadIdx.x == 0) args.loss[0] = some ? float(value * job.pairs_scale()) : 0;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(MkMmdBackwardArgs<T> args) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= args.tokens * args.rank) return;
  const int64_t slot = args.slot[e / args.rank];
  require(slot < args.rows);
  args.dz[e] = narrow<T>(slot < 0 ? 0.f : args.d_loss[0] * args.gradient[slot * args.rank + e % args.rank]);
}

int64_t blocks_for(int64_t items) { return std::max<int64_t>(ceil_div(items, kThreads), 1); }

template <int kDims>
void launch_pairs(Job job, Stream stream) {
  job.chunks = int(std::max<int64_t>(ceil_div(job.args.rank, kDims), 1));
  for (; job.first_chunk < job.chunks; job.first_chunk += int(Grid::kMost)) {
    const Grid grid(job.most_tiles, job.splits, std::min<int64_t>(job.chunks - job.first_chunk, Grid::kMost));
    launch(pairs_kernel<kDims>, grid, dim3(kPairThreads), 0, stream, job);
  }
}

}  // namespace

template <typename T>
int64_t mk_mmd_workspace(const MkMmdArgs<T>& args) {
  Job job = job_of(args);
  return fill(job, 0);
}

template <typename T>
void mk_mmd(const MkMmdArgs<T>& args, Stream stream) {
  Job job = job_of(args);
  fill(job, reinterpret_cast<intptr_t>(args.workspace));
  const dim3 threads(kThreads);
  if (job.blocks > 0) launch(count_kernel, job.blocks, threads, 0, stream, job);
  launch(layout_kernel, 1, threads, 0, stream, job);
  if (job.blocks > 0) launch(choose_kernel<T>, job.blocks, threads, 0, stream, job, args.z);
  if (args.kernels.relative) launch(bandwidth_kernel, 1, threads, 0, stream, job);
  if (job.most_tiles > 0) {
    args.rank <= 16 ? launch_pairs<16>(job, stream) : launch_pairs<64>(job, stream);
  }
  launch(finish_kernel, blocks_for(job.most_rows * args.rank), threads, 0, stream, job);
}

template <typename T>
void mk_mmd_backward(const MkMmdBackwardArgs<T>& args, Stream stream) {
  if (args.tokens == 0 || args.rank == 0) return;
  launch(backward_kernel<T>, blocks_for(args.tokens * args.rank), dim3(kThreads), 0, stream, args);
}

#define ALIGN_INSTANTIATE(T)                                 \
  template int64_t mk_mmd_workspace<T>(const MkMmdArgs<T>&); \
  template void mk_mmd(const MkMmdArgs<T>&, Stream);         \
  template void mk_mmd_backward(const MkMmdBackwardArgs<T>&, Stream);
ALIGN_FOR_CUDA_TYPES(ALIGN_INSTANTIATE)

}  // namespace align::cuda
