// Every kernel processes all layers, which are the last dimension of the grid; their pointers and ranks are parameters
// of the kernel. Moments: a block of threads takes 256 rows and up to 32 dimensions. A thread takes one dimension of
// every k-th row and keeps its sums for 16 tasks at a time in its own column of shared memory, so that no two threads
// add to the same address; the columns are then added in a fixed order. A second kernel merges the moments of the
// blocks in their order (Chan), in double: the gradient is small where tasks are alike, and shows what the moments
// lost. Tables: one block for each layer, one thread for each dimension. Backward: one element at a time.
#include "ops/gaussian_kl.h"

#include <algorithm>

#include "cuda/launch.cuh"
#include "ops/convert.h"
#include "ops/sizes.h"

namespace align::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockRows = 256;
constexpr int kTaskTile = 16;  // 2 * 16 * 256 floats of shared memory: 32 KiB
constexpr int kTableThreads = 128;
constexpr int kMaxLayers = 256;  // layers of a launch: they take 3 of the 4 KiB of a kernel's parameters

// The threads along a row: the least power of two that is not less than rank, at most a warp.
int lanes_for(int64_t rank) {
  int lanes = 1;
  while (lanes < rank && lanes < kWarp) lanes *= 2;
  return lanes;
}

// Up to kMaxLayers layers of Latents, as a parameter of a kernel.
template <typename T>
struct Layers {
  const T* z[kMaxLayers];
  int ranks[kMaxLayers];
  int64_t tokens;
  int64_t rank;  // the largest rank
  const int64_t* task;
  int64_t tasks;
  int lanes;        // threads along a row
  int first_piece;  // first piece of `lanes` dimensions of a launch of the moments
};

// Calls body(layers, number of the first layer, count) for every launch, with up to kMaxLayers of the layers.
template <typename T, typename Body>
void for_launches(const Latents<T>& latents, int64_t tasks, const Body& body) {
  for (int64_t first = 0; first < latents.layers; first += kMaxLayers) {
    const int64_t count = std::min<int64_t>(kMaxLayers, latents.layers - first);
    Layers<T> layers = {};
    for (int64_t i = 0; i < count; ++i) {
      layers.z[i] = latents.z[first + i];
      layers.ranks[i] = int(latents.ranks[first + i]);
    }
    layers.tokens = latents.tokens;
    layers.rank = latents.rank;
    layers.task = latents.task;
    layers.tasks = tasks;
    layers.lanes = lanes_for(latents.rank);
    body(layers, first, unsigned(count));
  }
}

// ---- Moments

// The sum over all row groups of the block for one dimension, with what each addition rounds off given to the next one
// (Kahan).
__device__ float column_sum(const float* column, int lanes) {
  float sum = 0, lost = 0;
  for (int i = 0; i < kThreads; i += lanes) {
    const float added = column[i] - lost, next = sum + added;
    lost = (next - sum) - added;
    sum = next;
  }
  return sum;
}

// The first pass computes the count and the mean of each task of the tile. The second pass sums the differences from
// that mean and their squares; the former correct the rounding of the mean.
template <typename T>
__global__ void __launch_bounds__(kThreads) block_moments_kernel(Layers<T> layers, float* partials) {
  __shared__ float first[kTaskTile][kThreads];   // sums of z, then of differences
  __shared__ float second[kTaskTile][kThreads];  // counts, then sums of squares
  __shared__ float mean[kTaskTile][kWarp];
  __shared__ float count[kTaskTile];
  __shared__ int task[kBlockRows];  // number of the task within the tile, or -1

  const int64_t rank = layers.ranks[blockIdx.z], width = 2 * layers.rank + 1, tasks = layers.tasks;
  const int thread = threadIdx.x, lanes = layers.lanes, groups = kThreads / lanes;
  const int lane = thread % lanes, group = thread / lanes;
  const int64_t begin = int64_t(blockIdx.x) * kBlockRows;
  const int rows = int(layers.tokens - begin < kBlockRows ? layers.tokens - begin : kBlockRows);
  const int64_t first_dim = (int64_t(blockIdx.y) + layers.first_piece) * lanes, d = first_dim + lane;
  if (first_dim > 0 && first_dim >= rank) return;  // beyond the rank of this layer
  const T* z = layers.z[blockIdx.z] + begin * rank + d;
  partials += (int64_t(blockIdx.z) * gridDim.x + blockIdx.x) * tasks * width;

  for (int64_t tile = 0; tile < tasks; tile += kTaskTile) {
    const int tile_tasks = int(tasks - tile < kTaskTile ? tasks - tile : kTaskTile);
    if (thread < rows) {
      const int64_t id = layers.task[begin + thread] - tile;
      task[thread] = id >= 0 && id < tile_tasks ? int(id) : -1;
    }
    for (int i = 0; i < tile_tasks; ++i) first[i][thread] = second[i][thread] = 0;
    __syncthreads();  // task is complete
    for (int t = group; t < rows; t += groups) {
      if (task[t] < 0) continue;
      if (d < rank) first[task[t]][thread] += widen(z[t * rank]);
      second[task[t]][thread] += 1;
    }
    __syncthreads();  // all columns are complete
    for (int pair = thread; pair < tile_tasks * lanes; pair += kThreads) {
      const int i = pair / lanes, l = pair % lanes;
      const float n = column_sum(second[i] + l, lanes);
      mean[i][l] = column_sum(first[i] + l, lanes) / (n > 0 ? n : 1);
      if (l == 0) count[i] = n;
    }
    __syncthreads();  // the columns have been read, mean and count are complete
    for (int i = 0; i < tile_tasks; ++i) first[i][thread] = second[i][thread] = 0;
    for (int t = group; t < rows && d < rank; t += groups) {
      if (task[t] < 0) continue;
      const float difference = widen(z[t * rank]) - mean[task[t]][lane];
      first[task[t]][thread] += difference;
      second[task[t]][thread] += difference * difference;
    }
    __syncthreads();  // all columns are complete
    for (int pair = thread; pair < tile_tasks * lanes; pair += kThreads) {
      const int i = pair / lanes, l = pair % lanes;
      const int64_t dim = first_dim + l;
      const float n = count[i], residual = column_sum(first[i] + l, lanes) / (n > 0 ? n : 1);
      const float squares = column_sum(second[i] + l, lanes);
      float* out = partials + (tile + i) * width;
      if (dim == 0) out[0] = n;
      if (dim >= rank) continue;
      out[1 + dim] = mean[i][l] + residual;
      out[1 + layers.rank + dim] = squares - residual * residual * n;
    }
    __syncthreads();  // everything shared may be overwritten for the next tile
  }
}

// partials: [layers, blocks, tasks, 2 rank + 1]; moments: [layers, tasks, 2 rank + 1]. A thread computes one entry.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_moments_kernel(Layers<T> layers, int64_t blocks, const float* partials, float* moments) {
  const int64_t dims = layers.rank > 0 ? layers.rank : 1, width = 2 * layers.rank + 1, size = layers.tasks * width;
  const int64_t pair = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= layers.tasks * dims) return;
  const int64_t i = pair / dims, d = pair % dims;
  const bool has_dim = d < layers.ranks[blockIdx.z];
  double n = 0, mean = 0, m2 = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const float* of_block = partials + (int64_t(blockIdx.z) * blocks + block) * size + i * width;
    const double total = n + of_block[0];
    if (of_block[0] > 0 && has_dim) {
      // The fraction's rounding counts little, and a division in double is long.
      const double delta = of_block[1 + d] - mean, fraction = of_block[0] / float(total);
      mean += delta * fraction;
      m2 += of_block[1 + layers.rank + d] + delta * delta * n * fraction;
    }
    n = total;
  }
  float* out = moments + int64_t(blockIdx.z) * size + i * width;
  if (d == 0) out[0] = float(n);
  if (d < layers.rank) {
    out[1 + d] = float(mean);
    out[1 + layers.rank + d] = float(m2);
  }
}

// ---- Tables, in double, because they are small. Loops over tasks are not unrolled: divisions in double need
// registers.

template <typename A>
struct LayerMoments {
  const GaussianKlTablesArgs<A>& args;
  const A* moments;  // [tasks, 2 rank + 1]

  __device__ const A* task(int64_t i) const { return moments + i * (2 * args.rank + 1); }
  __device__ double n(int64_t i) const { return task(i)[0]; }
  __device__ double mu(int64_t i, int64_t d) const { return task(i)[1 + d]; }
  __device__ double v(int64_t i, int64_t d) const { return task(i)[1 + args.rank + d] / (n(i) - args.ddof) + args.eps; }
  __device__ bool active(int64_t i) const { return n(i) >= 2; }  // max(2, 1 + ddof), ddof being 0 or 1
};

// Sums over the active tasks for one dimension.
struct TaskSums {
  double v, mu;             // means
  double p, pc, c2;         // sums of p, p c, c^2
  double spread, weighted;  // sums of (v - mean v)^2 p, p c^2
};

template <typename A>
__device__ TaskSums sum_tasks(const LayerMoments<A>& layer, double active, int64_t d) {
  TaskSums s = {};
#pragma unroll 1
  for (int64_t i = 0; i < layer.args.tasks; ++i) {
    if (!layer.active(i)) continue;
    s.v += layer.v(i, d);
    s.mu += layer.mu(i, d);
  }
  s.v /= active;
  s.mu /= active;
#pragma unroll 1
  for (int64_t i = 0; i < layer.args.tasks; ++i) {
    if (!layer.active(i)) continue;
    const double v = layer.v(i, d), p = 1 / v, c = layer.mu(i, d) - s.mu;
    s.p += p;
    s.pc += p * c;
    s.c2 += c * c;
    s.spread += (v - s.v) * (v - s.v) * p;
    s.weighted += p * c * c;
  }
  return s;
}

template <typename A>
__global__ void __launch_bounds__(kTableThreads) tables_kernel(GaussianKlTablesArgs<A> args) {
  const int64_t rank = args.rank;
  const LayerMoments<A> layer{args, args.moments + blockIdx.x * args.tasks * (2 * rank + 1)};
  A* tables = args.tables + blockIdx.x * args.tasks * 3 * rank;
  double active = 0, loss = 0;
  for (int64_t i = 0; i < args.tasks; ++i) active += layer.active(i);
  const double scale = active < 2 ? 0 : args.mean_pairs ? 2 / (active * (active - 1)) : 1;
  for (int64_t d = threadIdx.x; d < rank; d += kTableThreads) {
    TaskSums s = {};
    if (active >= 2) {
      s = sum_tasks(layer, active, d);
      loss += active / s.v * s.spread + active * s.weighted + s.p * s.c2;
    }
#pragma unroll 1
    for (int64_t i = 0; i < args.tasks; ++i) {
      double a = 0, b = 0, mu = 0;
      if (active >= 2 && layer.active(i)) {
        mu = layer.mu(i, d);
        const double p = 1 / layer.v(i, d), c = mu - s.mu;
        const double d_mu = 0.5 * (active * p * c + c * s.p - s.pc);
        const double d_var = 0.25 * (s.p - p * p * (active * s.v + active * c * c + s.c2));
        a = d_mu / layer.n(i);
        b = 2 * d_var / (layer.n(i) - args.ddof);
      }
      A* table = tables + i * 3 * rank + d;
      table[0] = A(scale * a);
      table[rank] = A(scale * b);
      table[2 * rank] = A(mu);
    }
  }
  loss = block_sum(loss);
  if (threadIdx.x == 0) args.loss[blockIdx.x] = A(0.25 * scale * loss);
}

// ---- Backward

// tables: [layers, tasks, 3 rank]; layer l's dz begins at l * dz_stride.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Layers<T> layers, const float* tables, const float* d_loss, float scale, T* dz, int64_t dz_stride) {
  const int lanes = layers.lanes;
  const int64_t rank = layers.ranks[blockIdx.z], width = layers.rank;
  const int64_t t = int64_t(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  if (t >= layers.tokens) return;
  const int64_t id = layers.task[t];
  const bool counts = id >= 0 && id < layers.tasks;
  const float* a = tables + (blockIdx.z * layers.tasks + (counts ? id : 0)) * 3 * width;
  const float *b = a + width, *mu = b + width;
  const float factor = d_loss[0] * scale;
  const T* z = layers.z[blockIdx.z] + t * rank;
  dz += blockIdx.z * dz_stride + t * rank;
  for (int64_t d = threadIdx.x % lanes; d < rank; d += lanes) {
    float value = 0;
    if (counts) {
      const float of_a = a[d], of_b = b[d], gradient = factor * (of_a + of_b * (widen(z[d]) - mu[d]));
      value = of_a != 0 || of_b != 0 ? gradient : 0;  // z may be NaN where no gradient is
    }
    dz[d] = narrow<T>(value);
  }
}

}  // namespace

template <typename T>
int64_t task_moments_workspace(const Latents<T>& latents, int64_t tasks) {
  const int64_t blocks = ceil_div(latents.tokens, kBlockRows) * std::min<int64_t>(latents.layers, kMaxLayers);
  return product({blocks, tasks, 2 * latents.rank + 1, int64_t(sizeof(float))});
}

template <typename T>
void task_moments(const TaskMomentsArgs<T>& args, Stream stream) {
  if (args.tasks == 0) return;
  const int64_t blocks = ceil_div(args.latents.tokens, kBlockRows);
  const int64_t dims = args.latents.rank > 0 ? args.latents.rank : 1;
  const dim3 threads(kThreads);
  auto* const partials = static_cast<float*>(args.workspace);
  for_launches(args.latents, args.tasks, [&](Layers<T>& layers, int64_t first, unsigned count) {
    const int64_t pieces = ceil_div(dims, layers.lanes);
    for (int64_t first_piece = 0; first_piece < pieces && blocks > 0; first_piece += Grid::kMost) {
      layers.first_piece = int(first_piece);
      const Grid grid(blocks, std::min(pieces - first_piece, Grid::kMost), count);
      launch(block_moments_kernel<T>, grid, threads, 0, stream, layers, partials);
    }
    float* const moments = args.moments + first * args.tasks * (2 * args.latents.rank + 1);
    const Grid merge_grid(ceil_div(args.tasks * dims, kThreads), 1, count);
    launch(merge_moments_kernel<T>, merge_grid, threads, 0, stream, layers, blocks, partials, moments);
  });
}

template <typename A>
void gaussian_kl_tables(const GaussianKlTablesArgs<A>& args, Stream stream) {
  if (args.layers == 0) return;
  launch(tables_kernel<A>, args.layers, dim3(kTableThreads), 0, stream, args);
}

template <typename T>
void gaussian_kl_backward(const GaussianKlBackwardArgs<T>& args, Stream stream) {
  if (args.latents.tokens == 0 || args.latents.rank == 0) return;
  for_launches(args.latents, args.tasks, [&](const Layers<T>& layers, int64_t first, unsigned count) {
    const Grid grid(ceil_div(layers.tokens, kThreads / layers.lanes), 1, count);
    const float* const tables = args.tables + first * args.tasks * 3 * layers.rank;
    launch(backward_kernel<T>, grid, dim3(kThreads), 0, stream, layers, tables, args.d_loss, float(args.scale),
           args.dz + first * args.dz_stride, args.dz_stride);
  });
}

#define ALIGN_INSTANTIATE(T)                                           \
  template int64_t task_moments_workspace(const Latents<T>&, int64_t); \
  template void task_moments(const TaskMomentsArgs<T>&, Stream);       \
  template void gaussian_kl_backward(const GaussianKlBackwardArgs<T>&, Stream);
ALIGN_FOR_CUDA_TYPES(ALIGN_INSTANTIATE)
template void gaussian_kl_tables(const GaussianKlTablesArgs<float>&, Stream);

}  // namespace align::cuda
