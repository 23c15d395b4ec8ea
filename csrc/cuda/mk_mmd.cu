// There are seven launches, or six with given bandwidths: count the tokens of each task by blocks of 256; add up the
// counts and assign rows and tiles; choose the tokens; then, for up to 240 layers at a time, gather their z; compute
// the bandwidths; process the pairs; add up the splits. Only the device knows how many tokens take part, so the grids
// have the largest possible size, and blocks without work end at once.
//
// Pairs: a block processes 32 rows of one task with a split of the tiles of 32 rows, for 16 or 64 dimensions of the
// gradient of one layer. Distances need all dimensions: for larger ranks each 64 dimensions read the tiles again. Each
// of 128 threads has 2 x 4 pairs while kernels are computed, then 4 dimensions of one or four rows for the gradient; h
// goes from one to the other through shared memory. Each block takes ordered pairs, so that no other block writes to
// its rows. Unordered pairs would save half of the arithmetic, a few microseconds, but need twice the partial sums.
// Where few layers leave the device idle every split has a block of its own, else one block takes all splits of its
// rows in turn: sums are added in the same order, so that a layer's bits do not depend on how many there are.
#include "ops/mk_mmd.h"

#include "cuda/mmd_job.cuh"
#include "ops/convert.h"

namespace align::cuda {
namespace {

constexpr int kThreads = kMmdThreads;
using Job = MmdJob;

// ---- The tokens that take part

// The task of token blockIdx.x * 256 + threadIdx.x, or -1.
__device__ int task_of(const Job& job) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t id = t < job.tokens ? job.ids[t] : -1;
  return id >= 0 && id < job.tasks ? int(id) : -1;
}

__global__ void __launch_bounds__(kThreads) count_kernel(Job job) {
  __shared__ int task[kThreads];
  task[threadIdx.x] = task_of(job);
  __syncthreads();  // task is complete
  for (int64_t i = threadIdx.x; i < job.tasks; i += kThreads) {
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
  const int lane = threadIdx.x % kWarp;
  for (int64_t i = threadIdx.x / kWarp; i < job.tasks; i += kThreads / kWarp) {  // one warp for each task
    int* before = job.before + i * job.blocks;
    int count = 0;
    for (int64_t first = 0; first < job.blocks; first += kWarp) {
      const int64_t block = first + lane;
      const int mine = block < job.blocks ? before[block] : 0, sum = sum_to_lane(mine);
      if (block < job.blocks) before[block] = count + sum - mine;
      count += __shfl_sync(0xffffffffu, sum, kWarp - 1);
    }
    const int most = int(job.n_max < job.tokens ? job.n_max : job.tokens);
    if (lane == 0) {
      job.task[i].count = count;
      job.task[i].chosen = count < 2 ? 0 : count < most ? count : most;
    }
  }
  __syncthreads();  // counts are complete
  if (threadIdx.x == 0) {
    int rows = 0, tiles = 0, tasks = 0;
    for (int64_t i = 0; i < job.tasks; ++i) {
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
  }
  __syncthreads();  // first and tile are complete
  for (int64_t i = threadIdx.x; i < job.tasks; i += kThreads) {
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
__device__ int row_of(const MmdTaskRows& task, int64_t o) {
  const int64_t n = task.count, m = task.chosen;
  if (m == 0) return -1;
  const int64_t j = n == m ? o : (o * m + n - 1) / n;
  return j < m && (n == m || j * n / m == o) ? int(task.first + j) : -1;
}

__global__ void __launch_bounds__(kThreads) choose_kernel(Job job) {
  __shared__ int task[kThreads];
  const int thread = threadIdx.x, id = task_of(job);
  const int64_t token = int64_t(blockIdx.x) * kThreads + thread;
  task[thread] = id;
  __syncthreads();  // task is complete
  int earlier = 0;
  for (int t = 0; t < thread; ++t) earlier += task[t] == id;
  const int row = id < 0 ? -1 : row_of(job.task[id], job.before[id * job.blocks + blockIdx.x] + earlier);
  if (token < job.tokens) job.slot[token] = row;
  if (row >= 0) job.token[row] = int(token);
}

// What gather_kernel needs of a job, whose other half would not fit beside the layers.
struct Gather {
  int64_t most_rows, rank;
  const MmdLayout* layout;
  const int* token;
  float* z;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) gather_kernel(MmdLayers<T> layers, Gather to) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x, layer = blockIdx.y;
  if (e >= to.layout->rows * to.rank) return;
  const int64_t row = e / to.rank, d = e % to.rank;
  const T* z = layers.z[layer] + int64_t(to.token[row]) * layers.strides[layer];
  to.z[layer * to.most_rows * to.rank + e] = d < layers.ranks[layer] ? widen(z[d]) : 0;
}

// One block computes 2 sum |z - mean|^2 / (n - 1) of a layer.
__global__ void __launch_bounds__(kThreads) bandwidth_kernel(Job job) {
  __shared__ double column[kThreads];
  const int64_t rank = job.rank, rows = job.layout->rows;
  const float* z = job.z_of(blockIdx.x);
  int lanes = 1;  // threads along a row
  while (lanes < rank && lanes < kWarp) lanes *= 2;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;
  if (job.layout->tasks < 2) return;
  double squares = 0;
  for (int64_t first = 0; first < rank; first += lanes) {
    const int64_t d = first + lane;
    double sum = 0;
    for (int64_t r = group; r < rows && d < rank; r += groups) sum += double(z[r * rank + d]);
    column[threadIdx.x] = sum;
    __syncthreads();  // column is complete
    double mean = 0;
    for (int i = 0; i < groups; ++i) mean += column[i * lanes + lane];
    mean /= double(rows);
    for (int64_t r = group; r < rows && d < rank; r += groups) {
      const double difference = double(z[r * rank + d]) - mean;
      squares += difference * difference;
    }
    __syncthreads();  // column may be overwritten
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) job.bandwidth[blockIdx.x] = 2 * squares / double(rows - 1);
}

// ---- Pairs

template <int kDims>
__global__ void __launch_bounds__(kPairThreads, 4) pairs_kernel(Job job) {
  __shared__ __align__(16) TileRows<kDims> a, b;
  __shared__ TileWeights h;
  __shared__ Rates rates;
  const int chunks = job.chunks, index_z = int(blockIdx.z) + job.first_chunk;
  const int layer = index_z / chunks, chunk = index_z % chunks;
  const int64_t tiles = job.layout->tiles, rank = job.rank;
  if (blockIdx.x >= tiles || !job.some(layer)) return;

  const float* z = job.z_of(layer);
  const MmdTile mine = job.tile_at(blockIdx.x);
  const double rows = double(job.layout->rows);
  fill_rates(rates, job.kernels, job.bandwidth_of(layer));
  GradientSums<kDims> total;
  const int splits = job.splits / job.parts, first_split = int(blockIdx.y) * splits;
  for (int split = first_split; split < first_split + splits; ++split) {
    double value = 0;
    GradientSums<kDims> gradient;
    const int64_t begin = tiles * split / job.splits, end = tiles * (split + 1) / job.splits;
    for (int64_t index = begin; index < end; ++index) {
      const MmdTile other = job.tile_at(index);
      float d2[2][4] = {};
      for (int i = 1; i <= chunks; ++i) {  // the block's dimensions come last and stay for the gradient
        const int64_t d = int64_t((chunk + i) % chunks) * kDims;
        __syncthreads();  // a, b and h have been read
        if (index == begin || chunks > 1) load_rows<kDims>(z, mine, d, rank, a);
        load_rows<kDims>(z, other, d, rank, b);
        __syncthreads();  // a, b, and in the first round rates, are complete
        add_distances<kDims>(a, b, d2);
      }
      const double omega = job.omega(mine.task, other.task);
      value += omega * double(add_kernels(rates, job.kernels.count, d2, mine, other, float(omega * rows * rows), h));
      __syncthreads();  // h is complete
      gradient.add(h, a, b);
    }
    total.add(gradient);
    value = block_sum(value);
    if (threadIdx.x == 0 && chunk == 0) job.value_of(layer)[blockIdx.x * int64_t(job.splits) + split] = value;
  }
  const int64_t first = int64_t(chunk) * kDims, part = int64_t(layer) * job.parts + blockIdx.y;
  total.write(mine.rows, rank - first, rank, job.partials + (part * job.most_rows + mine.first) * rank + first);
}

// ---- Sums over the splits

__global__ void __launch_bounds__(kThreads) finish_kernel(Job job) {
  const int64_t layer = blockIdx.y;
  const bool some = job.some(layer);
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x, size = job.most_rows * job.rank;
  if (e < size) {
    float sum = 0;
    if (some && e < job.layout->rows * job.rank) {
      for (int part = 0; part < job.parts; ++part) sum += job.partials[(layer * job.parts + part) * size + e];
      const double rows = double(job.layout->rows), beta = job.kernels.beta[0] / job.bandwidth_of(layer);
      sum *= float(-4 * beta / (rows * rows) * job.pairs_scale());
    }
    job.gradient[layer * size + e] = sum;
  }
  if (blockIdx.x > 0) return;
  double value = 0;
  for (int64_t i = threadIdx.x; i < job.layout->tiles * job.splits && some; i += kThreads) {
    value += job.value_of(layer)[i];
  }
  for (int64_t i = threadIdx.x; i < job.tasks && some && !job.u_statistic; i += kThreads) {  // each token with itself
    const int chosen = job.task[i].chosen;
    if (chosen > 0) value += job.omega(int(i), int(i)) * chosen * job.kernels.count;
  }
  value = block_sum(value);
  if (threadIdx.x == 0) job.loss[layer] = some ? float(value * job.pairs_scale()) : 0;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(MkMmdBackwardArgs<T> args) {
  const int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= args.tokens * args.rank) return;
  const int64_t slot = args.slot[e / args.rank];
  require(slot < args.rows);
  for (int64_t layer = blockIdx.y; layer < args.layers; layer += gridDim.y) {
    const float* row = args.gradient + (layer * args.rows + slot) * args.rank;
    args.dz[layer * args.tokens * args.rank + e] = narrow<T>(slot < 0 ? 0.f : args.d_loss[layer] * row[e % args.rank]);
  }
}

int64_t blocks_for(int64_t items) { return std::max<int64_t>(ceil_div(items, kThreads), 1); }

template <int kDims>
void launch_pairs(Job job, int layers, Stream stream) {
  job.chunks = int(std::max<int64_t>(ceil_div(job.rank, kDims), 1));
  for (int64_t first = 0, all = int64_t(layers) * job.chunks; first < all; first += Grid::kMost) {
    job.first_chunk = int(first);
    const Grid grid(job.most_tiles, job.parts, std::min<int64_t>(all - first, Grid::kMost));
    launch(pairs_kernel<kDims>, grid, dim3(kPairThreads), 0, stream, job);
  }
}

// The launches for layers first .. first + layers - 1.
template <typename T>
void launch_layers(const MkMmdArgs<T>& args, Job job, int64_t first, int layers, Stream stream) {
  MmdLayers<T> of = {};
  for (int i = 0; i < layers; ++i) {
    of.z[i] = args.z[first + i];
    of.ranks[i] = int(args.ranks[first + i]);
    of.strides[i] = int(args.strides[first + i]);
  }
  job.loss = args.loss + first;
  job.gradient = args.gradient + first * job.most_rows * job.rank;
  const dim3 threads(kThreads);
  const Grid elements(blocks_for(job.most_rows * job.rank), layers);
  const Gather gather{job.most_rows, job.rank, job.layout, job.token, job.z};
  launch(gather_kernel<T>, elements, threads, 0, stream, of, gather);
  if (job.kernels.relative) launch(bandwidth_kernel, layers, threads, 0, stream, job);
  if (job.most_tiles > 0) {
    job.rank <= 16 ? launch_pairs<16>(job, layers, stream) : launch_pairs<64>(job, layers, stream);
  }
  launch(finish_kernel, elements, threads, 0, stream, job);
}

}  // namespace

template <typename T>
int64_t mk_mmd_workspace(const MkMmdArgs<T>& args) {
  Job job = job_of(args);
  return fill(job, args.layers, 0);
}

template <typename T>
void mk_mmd(const MkMmdArgs<T>& args, Stream stream) {
  Job job = job_of(args);
  fill(job, args.layers, reinterpret_cast<intptr_t>(args.workspace));
  const dim3 threads(kThreads);
  if (job.blocks > 0) launch(count_kernel, job.blocks, threads, 0, stream, job);
  launch(layout_kernel, 1, threads, 0, stream, job);
  if (job.blocks > 0) launch(choose_kernel, job.blocks, threads, 0, stream, job);
  for (int64_t first = 0; first < args.layers; first += kMaxMmdLayers) {
    launch_layers(args, job, first, int(std::min<int64_t>(args.layers - first, kMaxMmdLayers)), stream);
  }
}

template <typename T>
void mk_mmd_backward(const MkMmdBackwardArgs<T>& args, Stream stream) {
  if (args.layers == 0 || args.tokens == 0 || args.rank == 0) return;
  const Grid grid(blocks_for(args.tokens * args.rank), std::min<int64_t>(args.layers, Grid::kMost));
  launch(backward_kernel<T>, grid, dim3(kThreads), 0, stream, args);
}

#define ALIGN_INSTANTIATE(T)                                 \
  template int64_t mk_mmd_workspace<T>(const MkMmdArgs<T>&); \
  template void mk_mmd(const MkMmdArgs<T>&, Stream);         \
  template void mk_mmd_backward(const MkMmdBackwardArgs<T>&, Stream);
ALIGN_FOR_CUDA_TYPES(ALIGN_INSTANTIATE)

}  // namespace align::cuda
