// The arithmetic of a pair of tiles of 32 rows of the latent: their kernels, and the gradient of their rows. A tile is
// [rank, 32], so that a vector holds one dimension of several rows.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/simd.h"
#include "ops/mk_mmd.h"

namespace align::cpu {

constexpr int kTilePairs = kMmdTileRows * kMmdTileRows;

// ---- Kernels

// e_k = 2^(-rate_k d^2), or the square of e_(k-1). h = sum_k weight_k e_k, with weights in units of the widest beta.
template <typename A>
struct Rates {
  int count;
  A rate[kMaxMmdKernels];
  A rest[kMaxMmdKernels];  // the rounding error of the rate, which would be the same for all pairs
  A weight[kMaxMmdKernels];
  bool squared[kMaxMmdKernels];

  Rates(const MmdKernels& kernels, double bandwidth) : count(kernels.count) {
    constexpr double kLog2E = 1.4426950408889634;
    for (int k = 0; k < count; ++k) {
      const double exact = kernels.beta[k] / bandwidth * kLog2E;
      rate[k] = A(exact);
      rest[k] = A(exact - double(rate[k]));
      weight[k] = A(kernels.beta[k] / kernels.beta[0]);
      squared[k] = kernels.squared[k];
    }
  }
};

// 2^(-(rate + rest) d2), exact at 0: two to the power of an integer times a polynomial (relative error 2e-9).
template <int W>
ALIGN_INLINE Vec<float, W> exp2_of(float rate, float rest, const Vec<float, W>& d2) {
  using V = Vec<float, W>;
  constexpr float kRound = 0x1.8p23f;                            // a float this large has no fraction
  const V most = V{} + 126.f / rate, x = most < d2 ? most : d2;  // a NaN stays one
  const V shifted = kRound - rate * x, f = ((kRound - shifted) - rate * x) - rest * x;
  V p = f * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.f;
  using U = Vec<uint32_t, W>;
  return bit_cast<V>(bit_cast<U>(p) + (bit_cast<U>(shifted) << 23));
}
template <int W>
ALIGN_INLINE Vec<double, W> exp2_of(double rate, double, const Vec<double, W>& d2) {
  Vec<double, W> v;
  for (int l = 0; l < kLanes<double, W>; ++l) v[l] = std::exp2(-rate * d2[l]);
  return v;
}

// The rows of a tile, dimension by dimension.
template <typename A>
struct TileRows {
  const A *z, *centered;  // [rank, kMmdTileRows]: z and z - center
  const A* center;        // [rank], approximately the mean of the rows
  int64_t rows;
};

// The rows a of one tile and the rows b of another, or of the same tile.
template <typename A>
struct TilePair {
  TileRows<A> a, b;
  int64_t rank;
  A weight;  // multiplies the gradient
  bool same;
};

// Calls body(number of vectors, first row) for all rows, with two vectors at a time or one.
template <int W, typename A, typename Body>
ALIGN_INLINE void for_vectors(int64_t rows, const Body& body) {
  constexpr int kLane = kLanes<A, W>;
  for (int64_t first = 0; first < rows; first += 2 * kLane) {
    if (rows - first > kLane) {
      body(std::integral_constant<int, 2>{}, first);
    } else {
      body(std::integral_constant<int, 1>{}, first);
    }
  }
}

// Computes |a - b|^2 for all pairs, [a][b]. Dimensions are added up kChain at a time, because longer sums round more.
template <int W, typename A>
ALIGN_INLINE void squared_distances(const TilePair<A>& pair, A* d2) {
  using V = Vec<A, W>;
  constexpr int kGroup = W == 64 ? 8 : 4, kLane = kLanes<A, W>;  // rows a whose sums stay in registers
  constexpr int64_t kChain = 32;
  for_vectors<W, A>(pair.b.rows, [&](auto vectors, int64_t b) ALIGN_INLINE_LAMBDA {
    for (int64_t a = 0; a < pair.a.rows; a += kGroup) {
      for (int64_t first = 0; first < std::max<int64_t>(pair.rank, 1); first += kChain) {
        V sum[kGroup][vectors()] = {};
        for (int64_t d = first; d < std::min(first + kChain, pair.rank); ++d) {
          const A *from = pair.a.z + d * kMmdTileRows + a, *to = pair.b.z + d * kMmdTileRows + b;
          V z[vectors()];
          for (int l = 0; l < vectors(); ++l) z[l] = load<W>(to + l * kLane);
          for (int i = 0; i < kGroup; ++i) {
            for (int l = 0; l < vectors(); ++l) {
              const V difference = z[l] - from[i];
              sum[i][l] += difference * difference;
            }
          }
        }
        for (int i = 0; i < kGroup; ++i) {
          for (int l = 0; l < vectors(); ++l) {
            A* out = d2 + (a + i) * kMmdTileRows + b + l * kLane;
            store<W>(out, first == 0 ? sum[i][l] : load<W>(out) + sum[i][l]);
          }
        }
      }
    }
  });
}

// Replaces the squared distances of all pairs by h, and adds omega k for pairs of different rows to value, one number
// for each lane. A row has h = 0 with itself.
template <int W, typename A>
ALIGN_INLINE void kernels_of(const TilePair<A>& pair, const Rates<A>& rates, double omega, A* h, double* value) {
  using V = Vec<A, W>;
  constexpr int kGroup = W == 64 ? 4 : 2, kLane = kLanes<A, W>;  // rows a that hide each other's latency
  V total = {}, lane;
  for (int l = 0; l < kLane; ++l) lane[l] = A(l);
  for (int64_t b = 0; b < pair.b.rows; b += kLane) {
    const V exists = lane < A(pair.b.rows - b) ? V{} + A(1) : V{};
    for (int64_t a = 0; a < pair.a.rows; a += kGroup) {
      A* at = h + a * kMmdTileRows + b;
      V d2[kGroup], e[kGroup], sum[kGroup], weighted[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        d2[i] = load<W>(at + i * kMmdTileRows);
        e[i] = sum[i] = weighted[i] = exp2_of<W>(rates.rate[0], rates.rest[0], d2[i]);  // it has weight 1
      }
      for (int k = 1; k < rates.count; ++k) {
        for (int i = 0; i < kGroup; ++i) {
          e[i] = rates.squared[k] ? e[i] * e[i] : exp2_of<W>(rates.rate[k], rates.rest[k], d2[i]);
          sum[i] += e[i];
          weighted[i] += rates.weight[k] * e[i];
        }
      }
      for (int i = 0; i < kGroup && a + i < pair.a.rows; ++i) {
        const V counts = pair.same ? (lane == A(a + i - b) ? V{} : exists) : exists;
        total += sum[i] * counts;
        store<W>(at + i * kMmdTileRows, weighted[i] * counts);
      }
    }
  }
  A lanes[kLane];
  store<W>(lanes, total);
  for (int l = 0; l < kLane; ++l) value[l] += omega * double(lanes[l]);
}

// ---- Gradients

// Transposes blocks of vectors in registers: lane l of vector i becomes lane i of vector l.
template <int kDistance, typename V, int... lane>
ALIGN_INLINE void exchange(V& low, V& high, std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
  const V first = __builtin_shufflevector(low, high, ((lane & kDistance) ? n + lane - kDistance : lane)...);
  high = __builtin_shufflevector(low, high, ((lane & kDistance) ? n + lane : lane + kDistance)...);
  low = first;
}
template <int kDistance, int kLane, typename V>
ALIGN_INLINE void transpose_lanes(V* v) {
  if constexpr (kDistance > 0) {
    for (int i = 0; i < kLane; ++i) {
      if (!(i & kDistance)) exchange<kDistance>(v[i], v[i + kDistance], std::make_integer_sequence<int, kLane>{});
    }
    transpose_lanes<kDistance / 2, kLane>(v);
  }
}

template <int W, typename A>
ALIGN_INLINE void transpose(const A* from, A* to) {
  constexpr int kLane = kLanes<A, W>;
  for (int i = 0; i < kMmdTileRows; i += kLane) {
    for (int j = 0; j < kMmdTileRows; j += kLane) {
      Vec<A, W> v[kLane];
      for (int l = 0; l < kLane; ++l) v[l] = load<W>(from + (i + l) * kMmdTileRows + j);
      transpose_lanes<kLane / 2, kLane>(v);
      for (int l = 0; l < kLane; ++l) store<W>(to + (j + l) * kMmdTileRows + i, v[l]);
    }
  }
}

// dz[d][b] += weight sum_a h[a][b] (b[d] - a[d]) for the rows of a pair from b on and kDims dimensions from d on. A
// narrow kernel gives the largest weights to near rows, whose differences are small: then the differences are added up
// (kDifferences). Otherwise (b - c) sum_a h - sum_a h (a - c), where c is the center of the rows a, takes half of the
// operations; total is sum_a h.
template <int W, int kDims, int kVectors, bool kDifferences, typename A>
ALIGN_INLINE void add_gradient_dims(const A* h, const TilePair<A>& pair, const Vec<A, W>* total, int64_t b, int64_t d,
                                    A* dz) {
  using V = Vec<A, W>;
  constexpr int kLane = kLanes<A, W>;
  const A *from = (kDifferences ? pair.a.z : pair.a.centered) + d * kMmdTileRows, *to = pair.b.z + d * kMmdTileRows + b;
  V z[kDims][kVectors], sum[kDims][kVectors] = {};
  for (int i = 0; i < kDims; ++i) {
    for (int l = 0; l < kVectors; ++l) z[i][l] = load<W>(to + i * kMmdTileRows + l * kLane);
  }
  for (int64_t a = 0; a < pair.a.rows; ++a) {
    V weights[kVectors];
    for (int l = 0; l < kVectors; ++l) weights[l] = load<W>(h + a * kMmdTileRows + b + l * kLane);
    for (int i = 0; i < kDims; ++i) {
      const V row = from[i * kMmdTileRows + a] - V{};  // one number in all lanes
      for (int l = 0; l < kVectors; ++l) sum[i][l] += weights[l] * (kDifferences ? z[i][l] - row : row);
    }
  }
  for (int i = 0; i < kDims; ++i) {
    for (int l = 0; l < kVectors; ++l) {
      A* out = dz + (d + i) * kMmdTileRows + b + l * kLane;
      const V all = kDifferences ? sum[i][l] : (z[i][l] - pair.a.center[d + i]) * total[l] - sum[i][l];
      store<W>(out, load<W>(out) + pair.weight * all);
    }
  }
}

// sum_a h[a]. Its rounding error is multiplied by a distance from the center: at most four rows are added up in float.
template <int W, typename A>
ALIGN_INLINE Vec<A, W> sum_rows(const A* h, int64_t rows) {
  typedef double Wide __attribute__((vector_size(W / sizeof(A) * sizeof(double))));
  constexpr int kRow = kMmdTileRows;
  Wide sum = {};
  int64_t a = 0;
  for (; a + 4 <= rows; a += 4) {
    const A* at = h + a * kRow;
    const auto four = (load<W>(at) + load<W>(at + kRow)) + (load<W>(at + 2 * kRow) + load<W>(at + 3 * kRow));
    sum += __builtin_convertvector(four, Wide);
  }
  for (; a < rows; ++a) sum += __builtin_convertvector(load<W>(h + a * kRow), Wide);
  return __builtin_convertvector(sum, Vec<A, W>);
}

template <int W, bool kDifferences, typename A>
ALIGN_INLINE void add_gradients(const A* h, const TilePair<A>& pair, A* dz) {
  constexpr int kDims = W == 64 ? 8 : 4, kLane = kLanes<A, W>;
  for_vectors<W, A>(pair.b.rows, [&](auto vectors, int64_t b) ALIGN_INLINE_LAMBDA {
    Vec<A, W> total[vectors()] = {};
    for (int l = 0; l < vectors() && !kDifferences; ++l) total[l] = sum_rows<W>(h + b + l * kLane, pair.a.rows);
    int64_t d = 0;
    for (; d + kDims <= pair.rank; d += kDims)
      add_gradient_dims<W, kDims, vectors(), kDifferences>(h, pair, total, b, d, dz);
    for (; d < pair.rank; ++d) add_gradient_dims<W, 1, vectors(), kDifferences>(h, pair, total, b, d, dz);
  });
}

}  // namespace align::cpu
