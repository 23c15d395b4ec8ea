// The arithmetic of a pair of tiles of 32 rows of the latent, by a block of 128 threads: their kernels, and the
// gradient of the rows of the first tile. Tiles lie in shared memory, kDims dimensions at a time.
#pragma once

#include "cuda/launch.cuh"
#include "ops/mk_mmd.h"

namespace align::cuda {

constexpr int kPairThreads = 128;

template <int kDims>
using TileRows = float[kMmdTileRows][kDims + 4];  // the padding lets rows start at different banks
using TileWeights = float[kMmdTileRows][kMmdTileRows + 1];

// Rows of one task.
struct MmdTile {
  int task;
  int first;  // first row
  int rows;
};

// e_k = 2^(-rate_k d^2), or the square of e_(k-1). h = sum_k weight_k e_k, with weights in units of the widest beta.
struct Rates {
  float rate[kMaxMmdKernels], weight[kMaxMmdKernels];
  float rest[kMaxMmdKernels];  // the rounding error of the rate, which would be the same for all pairs
  int squared[kMaxMmdKernels];
};

// Each thread computes the rates of one kernel.
__device__ inline void fill_rates(Rates& rates, const MmdKernels& kernels, double bandwidth) {
  constexpr double kLog2E = 1.4426950408889634;
  const int k = threadIdx.x;
  if (k >= kernels.count) return;
  const double exact = kernels.beta[k] / bandwidth * kLog2E;
  rates.rate[k] = float(exact);
  rates.rest[k] = float(exact - double(rates.rate[k]));
  rates.weight[k] = float(kernels.beta[k] / kernels.beta[0]);
  rates.squared[k] = kernels.squared[k];
}

// Loads kDims dimensions from d on of the rows of a tile; zeros beyond the tile and beyond the rank.
template <int kDims>
__device__ void load_rows(const float* z, const MmdTile& tile, int64_t d, int64_t rank, TileRows<kDims>& rows) {
  for (int i = threadIdx.x; i < kMmdTileRows * kDims; i += kPairThreads) {
    const int r = i / kDims, l = i % kDims;
    rows[r][l] = r < tile.rows && d + l < rank ? z[(tile.first + r) * rank + d + l] : 0;
  }
}

// Adds the squared distances of kDims dimensions to the 2 x 4 pairs of this thread.
template <int kDims>
__device__ void add_distances(const TileRows<kDims>& a, const TileRows<kDims>& b, float (&d2)[2][4]) {
  const int row = 2 * (threadIdx.x / 8), column = threadIdx.x % 8;
#pragma unroll 4
  for (int l = 0; l < kDims; l += 4) {
    float4 za[2], zb[4];
    for (int i = 0; i < 2; ++i) za[i] = *reinterpret_cast<const float4*>(&a[row + i][l]);
    for (int j = 0; j < 4; ++j) zb[j] = *reinterpret_cast<const float4*>(&b[column + 8 * j][l]);
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        const float x = za[i].x - zb[j].x, y = za[i].y - zb[j].y, z = za[i].z - zb[j].z, w = za[i].w - zb[j].w;
        d2[i][j] += x * x;
        d2[i][j] += y * y;
        d2[i][j] += z * z;
        d2[i][j] += w * w;
      }
    }
  }
}

// Writes weight * h for the pairs of this thread, and returns the sum of k over its pairs of two different rows.
__device__ inline float add_kernels(const Rates& rates, int count, const float (&d2)[2][4], const MmdTile& a,
                                    const MmdTile& b, float weight, TileWeights& h) {
  const int row = 2 * (threadIdx.x / 8), column = threadIdx.x % 8;
  float e[2][4] = {}, sum[2][4] = {}, weighted[2][4] = {};
  for (int k = 0; k < count; ++k) {
    const float rate = rates.rate[k], rest = rates.rest[k], kernel_weight = rates.weight[k];
    const bool squared = rates.squared[k];
#pragma unroll
    for (int p = 0; p < 8; ++p) {
      float& value = e[p / 4][p % 4];
      value = squared ? value * value : exp2f(-rest * d2[p / 4][p % 4] - rate * d2[p / 4][p % 4]);
      sum[p / 4][p % 4] += value;
      weighted[p / 4][p % 4] += kernel_weight * value;
    }
  }
  float total = 0;
#pragma unroll
  for (int p = 0; p < 8; ++p) {
    const int i = row + p / 4, j = column + 8 * (p % 4);
    const bool exists = i < a.rows && j < b.rows;
    h[i][j] = exists ? weight * weighted[p / 4][p % 4] : 0;
    if (exists && a.first + i != b.first + j) total += sum[p / 4][p % 4];
  }
  return total;
}

// The sums of one thread, for four dimensions of kRows rows: sum_o h[row][o] (a[row] - b[o]).
template <int kDims>
struct GradientSums {
  static constexpr int kLanes = kDims / 4, kGroups = kPairThreads / kLanes, kRows = kMmdTileRows / kGroups;
  float4 sum[kRows] = {};

  __device__ int dim() const { return threadIdx.x % kLanes * 4; }
  __device__ int row(int i) const { return threadIdx.x / kLanes + i * kGroups; }

  __device__ void add(const TileWeights& h, const TileRows<kDims>& a, const TileRows<kDims>& b) {
#pragma unroll 4
    for (int o = 0; o < kMmdTileRows; ++o) {
      const float4 from = *reinterpret_cast<const float4*>(&b[o][dim()]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float weight_of_pair = h[row(i)][o];
        const float4 to = *reinterpret_cast<const float4*>(&a[row(i)][dim()]);
        sum[i].x += weight_of_pair * (to.x - from.x);
        sum[i].y += weight_of_pair * (to.y - from.y);
        sum[i].z += weight_of_pair * (to.z - from.z);
        sum[i].w += weight_of_pair * (to.w - from.w);
      }
    }
  }

  __device__ void add(const GradientSums& other) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i].x += other.sum[i].x;
      sum[i].y += other.sum[i].y;
      sum[i].z += other.sum[i].z;
      sum[i].w += other.sum[i].w;
    }
  }

  // Writes the sums to the rows of the tile in out [rows, rank], which begins at the first of the kDims dimensions;
  // only `dims` of these exist.
  __device__ void write(int rows, int64_t dims, int64_t rank, float* out) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float sums[4] = {sum[i].x, sum[i].y, sum[i].z, sum[i].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (row(i) < rows && dim() + e < dims) out[row(i) * rank + dim() + e] = sums[e];
      }
    }
  }
};

}  // namespace align::cuda
