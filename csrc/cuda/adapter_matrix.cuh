// The adapter matrix of a projection, [ranks, columns]: several adapters, one below the other. A kernel holds one piece
// of its columns in shared memory at a time.
#pragma once

#include "cuda/tile.cuh"

namespace align::cuda {

// Where an adapter has its element (rank j, column c). A is [ranks, cols]. B is [heads, cols, inner]: rank j belongs to
// head j / inner, in which it is number j % inner. Gradients have the layout of their adapters. With head_stride 0 all
// heads use one matrix.
struct Layout {
  int inner;   // ranks of a head
  int stored;  // how many of them are stored; the others are zero
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
  const void* data;  // the matrix of group 0
  bool is_float;     // whether its type is float; otherwise it is T
  int ranks;
  Layout layout;
  int64_t group_stride = 0;  // elements of a group
  int start = 0;             // its first rank in the adapter matrix

  __device__ bool has(int rank) const { return rank - start < ranks && (rank - start) % layout.inner < layout.stored; }
};

constexpr int kAdapters = 3;

// A, A0 and R one below the other, or B and B0. Ranks between two adapters are zero.
template <typename T>
struct AdapterMatrix {
  Adapter adapters[kAdapters];  // the last ones may have no ranks
  int ranks;                    // where the last adapter ends
  int64_t cols;
  bool vectors;  // whether all units of kUnit<T> elements are contiguous, 16-byte aligned and whole

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

// The third adapter begins at a multiple of third_aligned.
template <typename T>
AdapterMatrix<T> stack(int64_t cols, Adapter first, Adapter second = {}, Adapter third = {}, int third_aligned = 1) {
  second.start = first.start + first.ranks;
  third.start = int(ceil_div(second.start + second.ranks, third_aligned)) * third_aligned;
  const int ranks = third.ranks > 0 ? third.start + third.ranks : second.start + second.ranks;
  const bool vectors = has_vectors<T>(first, cols) && has_vectors<T>(second, cols) && has_vectors<T>(third, cols);
  return {{first, second, third}, ranks, cols, vectors};
}

// Loads kUnit<T> contiguous elements of an adapter of type S.
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

// The columns of a piece that begins at col: as many as `tiles` tiles have, without tiles beyond end.
template <typename T>
__device__ __forceinline__ int piece_width(int tiles, int64_t col, int64_t end) {
  const int64_t left = (end - col + kTileCols<T> - 1) / kTileCols<T>;
  return (left < tiles ? int(left) : tiles) * kTileCols<T>;
}

// Loads [kRank][cols] of the matrix, from rank first_rank and column first_col on. Elements beyond the matrix or from
// column end on are zero. All threads must call it.
template <typename T, int kRank>
__device__ __forceinline__ void load_piece(T* piece, const AdapterMatrix<T>& m, int64_t group, int first_rank,
                                           int64_t first_col, int cols, int64_t end) {
  const bool along_cols = m.adapters[0].layout.col_stride == 1;
  const int step = m.vectors ? kUnit<T> : 1;
  const int across = (along_cols ? cols : kRank) / step;  // units, or elements, in a line
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
