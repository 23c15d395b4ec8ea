// The small matrix of a projection, [ranks, columns]: adapters, stacked. It stays in shared memory a piece
// of its columns at a time.
#pragma once

#include "cuda/tile.cuh"

namespace align::cuda {

// Where rank j, column c of an adapter lies. A: [ranks, cols]; B: [heads, cols, inner], rank j being the j % inner-th
// of head j / inner. Gradients lie as their adapters do. Heads may also share one matrix (head_stride 0).
struct Layout {
  int inner, held;  // ranks of a head; those from held on are zero
  int64_t rank_stride, head_stride, col_stride;

  __device__ int64_t offset(int j, int64_t c) const {
    const int head = j / inner;
    return head * head_stride + (j - head * inner) * rank_stride + c * col_stride;
  }
};

inline Layout layout_of_a(int64_t ranks, int64_t cols) { return {std::max(int(ranks), 1), int(ranks), cols, 0, 1}; }
inline Layout layout_of_b(int64_t inner, int64_t cols) {
  return {std::max(int(inner), 1), int(inner), 1, cols * inner, inner};
}

struct Adapter {
  const void* data;  // of group 0
  bool is_float;     // else T
  int ranks;
  Layout layout;
  int64_t group_stride;
  int start;  // its first rank in the small matrix

  __device__ bool has(int rank) const { return rank - start < ranks && (rank - start) % layout.inner < layout.held; }
};

constexpr int kAdapters = 3;

// Adapters stacked: A, A0 and R, or B and B0. Ranks between two of them are zero.
template <typename T>
struct SmallMatrix {
  Adapter adapters[kAdapters];  // the later ones may have no ranks
  int ranks;                    // the last one's end
  int64_t cols;
  bool vectors;  // kUnit<T> neighbours lie together, aligned to 16 bytes, all inside or all outside

  __device__ const Adapter& adapter_of(int rank) const {
    return adapters[rank < adapters[1].start ? 0 : rank < adapters[2].start ? 1 : 2];
  }
};

template <typename T>
bool has_vectors(const Adapter& a, int64_t cols) {
  const Layout& l = a.layout;
  const bool along_cols = l.col_stride == 1;
  const int64_t line = along_cols ? cols : l.inner, stride = along_cols ? l.rank_stride : l.col_stride;
  return a.ranks == 0 ||
         (line % kUnit<T> == 0 && stride % kUnit<T> == 0 && l.head_stride % kUnit<T> == 0 &&
          a.group_stride % kUnit<T> == 0 && a.start % kUnit<T> == 0 && reinterpret_cast<uintptr_t>(a.data) % 16 == 0);
}

// The third begins at a multiple of third_aligned.
template <typename T>
SmallMatrix<T> stack(int64_t cols, Adapter first, Adapter second = {}, Adapter third = {}, int third_aligned = 1) {
  second.start = first.start + first.ranks;
  third.start = int(ceil_div(second.start + second.ranks, third_aligned)) * third_aligned;
  const int ranks = third.ranks > 0 ? third.start + third.ranks : second.start + second.ranks;
  const bool vectors = has_vectors<T>(first, cols) && has_vectors<T>(second, cols) && has_vectors<T>(third, cols);
  return {{first, second, third}, ranks, cols, vectors};
}

// kUnit<T> neighbours of an adapter in S.
template <typename S, typename T>
__device__ __forceinline__ void load_unit(T (&to)[kUnit<T>], const S* from) {
  constexpr int kVector = 16 / int(sizeof(S));
#pragma unroll
  for (int e = 0; e < kUnit<T>; e += kVector) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from + e);
    S values[kVector];
    memcpy(values, &bits, sizeof(bits));
#pragma unroll
    for (int v = 0; v < kVector; ++v) to[e + v] = to_element<T>(values[v]);
  }
}

// Columns of a piece at col: so many tiles, but none beyond end.
template <typename T>
__device__ __forceinline__ int piece_width(int tiles, int64_t col, int64_t end) {
  const int64_t left = (end - col + kTileCols<T> - 1) / kTileCols<T>;
  return (left < tiles ? int(left) : tiles) * kTileCols<T>;
}

// All threads: ranks first_rank .. and columns first_col .. of the matrix, zeros beyond it and from column end on, as
// [kRank][cols].
template <typename T, int kRank>
__device__ __forceinline__ void load_piece(T* piece, const SmallMatrix<T>& m, int64_t group, int first_rank,
                                           int64_t first_col, int cols, int64_t end) {
  const bool along_cols = m.adapters[0].layout.col_stride == 1;
  const int step = m.vectors ? kUnit<T> : 1;
  const int across = (along_cols ? cols : kRank) / step;  // units, or elements, of a line
  const int lines = along_cols ? kRank : cols;
#pragma unroll 2
  for (int i = int(threadIdx.x); i < across * lines; i += kThreads) {
    const int line = i / across, at = i % across * step;
    const int j = along_cols ? line : at, c = along_cols ? at : line;
    const int rank = first_rank + j;
    const int64_t col = first_col + c;
    const Adapter& adapter = m.adapter_of(rank);
    const bool inside = adapter.has(rank) && col < end;
    const int64_t offset = inside ? adapter.layout.offset(rank - adapter.start, col) + group * adapter.group_stride : 0;
    T* to = piece + j * kPieceStride<T, kRank> + c;
    const int next = along_cols ? 1 : kPieceStride<T, kRank>;
    T unit[kUnit<T>] = {};
    if (!m.vectors) {
      if (inside && adapter.is_float) unit[0] = to_element<T>(static_cast<const float*>(adapter.data)[offset]);
      if (inside && !adapter.is_float) unit[0] = static_cast<const T*>(adapter.data)[offset];
      *to = unit[0];
      continue;
    }
    if (inside && adapter.is_float) load_unit(unit, static_cast<const float*>(adapter.data) + offset);
    if (inside && !adapter.is_float) load_unit(unit, static_cast<const T*>(adapter.data) + offset);
#pragma unroll
    for (int e = 0; e < kUnit<T>; ++e) to[e * next] = unit[e];
  }
}

}  // namespace align::cuda
