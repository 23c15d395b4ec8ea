// The arithmetic of two tiles of 32 rows of the latent: their kernels, and how they pull each other. A tile is
// [rank, 32], so that a vector holds one dimension of several rows.
#pragma once

#include <cmath>

#include "cpu/simd.h"
#include "ops/mk_mmd.h"

namespace align::cpu {

constexpr int kTilePairs = kMmdTileRows * kMmdTileRows;

// ---- Kernels

// e_k = 2^(-rate_k d^2), or the square of e_(k-1);  h = sum_k weight_k e_k, weights in units of the widest beta.
template <typename A>
struct Rates {
  int count;
  A rate[kMaxMmdKernels];
  A weight[kMaxMmdKernels];
  bool squared[kMaxMmdKernels];

  Rates(const MmdKernels& kernels, double bandwidth) : count(kernels.count) {
    constexpr double kLog2E = 1.4426950408889634;
    for (int k = 0; k < count; ++k) {
      rate[k] = A(kernels.beta[k] / bandwidth * kLog2E);
      weight[k] = A(kernels.beta[k] / kernels.beta[0]);
      squared[k] = kernels.squared[k];
    }
  }
};

// 2^t for t <= 0, exact at 0: two to the nearest integer times a polynomial of the rest (relative error 2e-9).
template <int W>
ALIGN_INLINE Vec<float, W> exp2_of(const Vec<float, W>& t) {
  using V = Vec<float, W>;
  constexpr float kRound = 0x1.8p23f;  // a float this large has no fraction
  const V clamped = t < -126.f ? V{} - 126.f : t;
  const V shifted = clamped + kRound, f = clamped - (shifted - kRound);
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
ALIGN_INLINE Vec<double, W> exp2_of(const Vec<double, W>& t) {
  Vec<double, W> v;
  for (int l = 0; l < kLanes<double, W>; ++l) v[l] = std::exp2(t[l]);
  return v;
}

// Rows a of one tile against rows b of another, or of the same.
template <typename A>
struct TilePair {
  const A *a, *b;  // [rank, kMmdTileRows]
  int64_t rows_a, rows_b, rank;
  bool same;
};

// h of all pairs, [a][b]; returns the sum of k over pairs of different rows.
template <int W, typename A>
ALIGN_INLINE double kernels_of(const TilePair<A>& pair, const Rates<A>& rates, A* h) {
  using V = Vec<A, W>;
  constexpr int kGroup = W == 64 ? 8 : 4, kLane = kLanes<A, W>;  // rows a whose sums stay in registers
  V total = {};
  for (int first = 0; first < pair.rows_b; first += kLane) {
    V counts;
    for (int l = 0; l < kLane; ++l) counts[l] = first + l < pair.rows_b ? A(1) : A(0);
    for (int64_t a = 0; a < pair.rows_a; a += kGroup) {
      V d2[kGroup] = {}, e[kGroup] = {}, sum[kGroup] = {}, weighted[kGroup] = {};
      for (int64_t d = 0; d < pair.rank; ++d) {
        const V zb = load<W>(pair.b + d * kMmdTileRows + first);
        for (int i = 0; i < kGroup; ++i) {
          const V difference = zb - pair.a[d * kMmdTileRows + a + i];
          d2[i] += difference * difference;
        }
      }
      for (int k = 0; k < rates.count; ++k) {
        for (int i = 0; i < kGroup; ++i) {
          e[i] = rates.squared[k] ? e[i] * e[i] : exp2_of<W>(-rates.rate[k] * d2[i]);
          sum[i] += e[i];
          weighted[i] += rates.weight[k] * e[i];
        }
      }
      for (int i = 0; i < kGroup; ++i) {
        store<W>(h + (a + i) * kMmdTileRows + first, weighted[i] * counts);
        if (a + i >= pair.rows_a) continue;
        V others = counts;
        if (pair.same && a + i >= first && a + i < first + kLane) others[a + i - first] = 0;
        total += sum[i] * others;
      }
    }
  }
  double value = 0;
  for (int l = 0; l < kLane; ++l) value += double(total[l]);
  return value;
}

// ---- Pulls

// Blocks of vectors, transposed in registers: lane l of vector i becomes lane i of vector l.
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

// pull[d][b] += weight sum_a h[a][b] (b[d] - a[d]) for the rows b of a pair, dimensions d .. d + kDims. Differences,
// not products' difference: narrow kernels give near rows, whose difference is small, the largest weights.
template <int W, int kDims, typename A>
ALIGN_INLINE void pull_dims(const A* h, const TilePair<A>& pair, int64_t d, A weight, A* pull) {
  const A *from = pair.a + d * kMmdTileRows, *to = pair.b + d * kMmdTileRows;
  for (int64_t b = 0; b < pair.rows_b; b += kLanes<A, W>) {
    Vec<A, W> z[kDims], sum[kDims] = {};
    for (int i = 0; i < kDims; ++i) z[i] = load<W>(to + i * kMmdTileRows + b);
    for (int64_t a = 0; a < pair.rows_a; ++a) {
      const Vec<A, W> share = load<W>(h + a * kMmdTileRows + b);
      for (int i = 0; i < kDims; ++i) sum[i] += share * (z[i] - from[i * kMmdTileRows + a]);
    }
    for (int i = 0; i < kDims; ++i) {
      A* out = pull + (d + i) * kMmdTileRows + b;
      store<W>(out, load<W>(out) + weight * sum[i]);
    }
  }
}

template <int W, typename A>
ALIGN_INLINE void pull_tile(const A* h, const TilePair<A>& pair, A weight, A* pull) {
  constexpr int kDims = W == 64 ? 8 : 4;
  int64_t d = 0;
  for (; d + kDims <= pair.rank; d += kDims) pull_dims<W, kDims>(h, pair, d, weight, pull);
  for (; d < pair.rank; ++d) pull_dims<W, 1>(h, pair, d, weight, pull);
}

}  // namespace align::cpu
