// A call of mk_mmd: what its kernels get, and its workspace.
#pragma once

#include <algorithm>

#include "cuda/mmd_tiles.cuh"

namespace align::cuda {

constexpr int kMmdThreads = 256;  // also the tokens of a block
constexpr int kMaxMmdSplits = 16;
constexpr int64_t kMmdPairBlocks = 1024;  // the number of blocks to aim at: several for each multiprocessor
constexpr int kMaxMmdLayers = 240;        // layers of a launch: they take 3.75 of the 4 KiB of a kernel's parameters

struct MmdTaskRows {
  int count;   // tokens
  int chosen;  // tokens that take part
  int first;   // first row
  int tile;    // first tile
};

// How many tiles, rows and tasks take part.
struct MmdLayout {
  int64_t tiles, rows, tasks;
};

// A call of the operator, without z, and its workspace. All kernels after the gathering do not depend on the type of z.
struct MmdJob {
  int64_t tokens, rank, tasks, n_max;
  bool u_statistic, mean_pairs;
  const int64_t* ids;  // [tokens], of the tasks
  float* loss;         // [layers], from the first layer of a launch on, and so is gradient
  float* gradient;
  int32_t* slot;
  MmdKernels kernels;
  int64_t blocks;  // blocks of tokens
  int64_t most_rows, most_tiles;
  int splits;
  int parts;          // blocks that share the splits of one tile: 1 or splits
  int chunks;         // chunks of dimensions of the pairs
  int first_chunk;    // first (layer, chunk) of a launch
  int* before;        // [tasks, blocks]: tokens of a task in a block, later in all blocks before it
  MmdTaskRows* task;  // [tasks]
  MmdTile* tile;      // [most_tiles]
  MmdLayout* layout;  // [1]
  int* token;         // [most_rows]: the token of each row
  double* bandwidth;  // [layers]
  float* z;           // [layers, most_rows, rank]: z of the tokens that take part, zero where a layer's rank is smaller
  float* partials;    // [layers, parts, most_rows, rank]: sum_b omega h (z_a - z_b), up to a factor
  double* value;      // [layers, most_tiles, splits]

  __device__ MmdTile tile_at(int64_t i) const { return {tile[i].task, tile[i].first, tile[i].rows}; }
  __device__ const float* z_of(int64_t layer) const { return z + layer * most_rows * rank; }
  __device__ double* value_of(int64_t layer) const { return value + layer * most_tiles * splits; }
  __device__ double bandwidth_of(int64_t layer) const { return kernels.relative ? bandwidth[layer] : 1; }
  // Whether a layer's loss is not 0.
  __device__ bool some(int64_t layer) const {
    return layout->tasks >= 2 && !(kernels.relative && bandwidth[layer] < kMmdMinBandwidth);
  }
  // omega for two different tokens of tasks i and j.
  __device__ double omega(int i, int j) const {
    const double ni = task[i].chosen, nj = task[j].chosen;
    return i != j ? -1 / (ni * nj) : double(layout->tasks - 1) / (ni * (u_statistic ? ni - 1 : ni));
  }
  __device__ double pairs_scale() const { return mean_pairs ? 2 / double(layout->tasks * (layout->tasks - 1)) : 1; }
};

// Up to kMaxMmdLayers layers of z, as a parameter of a kernel.
template <typename T>
struct MmdLayers {
  const T* z[kMaxMmdLayers];
  int ranks[kMaxMmdLayers];
  int strides[kMaxMmdLayers];  // from one row to the next
};

template <typename P>
void allocate(intptr_t& end, P*& pointer, int64_t items) {
  constexpr int64_t kAlign = 256;
  pointer = reinterpret_cast<P*>(end);
  end += ceil_div(items * int64_t(sizeof(P)), kAlign) * kAlign;
}

template <typename T>
MmdJob job_of(const MkMmdArgs<T>& args) {
  MmdJob job = {};
  job.tokens = args.tokens;
  job.rank = args.rank;
  job.tasks = args.tasks;
  job.n_max = args.n_max;
  job.u_statistic = args.u_statistic;
  job.mean_pairs = args.mean_pairs;
  job.ids = args.task;
  job.slot = args.slot;
  job.kernels = args.kernels;
  return job;
}

// Assigns the workspace, which begins at an address, and returns its end.
inline intptr_t fill(MmdJob& job, int64_t all_layers, intptr_t workspace) {
  const int64_t layers = std::min<int64_t>(all_layers, kMaxMmdLayers);
  job.blocks = ceil_div(job.tokens, kMmdThreads);
  job.most_rows = mmd_rows(job.tokens, job.tasks, job.n_max);
  job.most_tiles = mmd_tiles(job.most_rows, job.tasks);
  const int64_t tiles = std::max<int64_t>(job.most_tiles, 1);
  job.splits = int(std::clamp<int64_t>(kMmdPairBlocks / tiles, 1, std::min<int64_t>(kMaxMmdSplits, tiles)));
  job.parts = layers * tiles < kMmdPairBlocks ? job.splits : 1;
  allocate(workspace, job.before, job.tasks * job.blocks);
  allocate(workspace, job.task, job.tasks);
  allocate(workspace, job.tile, job.most_tiles);
  allocate(workspace, job.layout, 1);
  allocate(workspace, job.token, job.most_rows);
  allocate(workspace, job.bandwidth, layers);
  allocate(workspace, job.z, layers * job.most_rows * job.rank);
  allocate(workspace, job.partials, layers * job.parts * job.most_rows * job.rank);
  allocate(workspace, job.value, layers * job.most_tiles * job.splits);
  return workspace;
}

}  // namespace align::cuda
