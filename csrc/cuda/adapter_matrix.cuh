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

// The second adapter begins at a multiple of second_aligned, and the third one of third_aligned.
template <typename T>
AdapterMatrix<T> stack(int64_t cols, Adapter first, Adapter second = {}, Adapter third = {}, int third_aligned = 1,
                       int second_aligned = 1) {
  second.start = int(ceil_div(first.ranks, second_aligned)) * second_aligned;
  third.start = int(ceil_div(second.start + second.ranks, third_aligned)) * third_aligned;
  const int ranks = third.ranks > 0 ? third.start + third.ranks : second.start + second.ranks;
  const bool vectors = has_vectors<T>(first, cols) && has_vectors<T>(second, cols) && has_vectors<T>(third, cols);
  return {{first, second, third}, ranks, cols, vectors};
}

// kUnit<T> contiguous elements of an adapter of type S.
template <typename T, typename S>
__device__ __forceinline__ uint4 load_unit(const S* from) {
  if constexpr (std::is_same_v<S, T>) {
    return *reinterpret_cast<const uint4*>(from);
  } else {
    constexpr int kVector = 16 / int(sizeof(S));
    T unit[kUnit<T>];
#pragma unroll
    for (int e = 0; e < kUnit<T>; e += kVector) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + e);
      S values[kVector];
      memcpy(values, &bits, sizeof(bits));
#pragma unroll
      for (int v = 0; v < kVector; ++v) unit[e + v] = to_element<T>(values[v]);
    }
    uint4 all;
    memcpy(&all, unit, sizeof(all));
    return all;
  }
}

// The columns of a piece that begins at col: as many as `tiles` tiles have, without tiles beyond end.
template <typename T>
__device__ __forceinline__ int piece_width(int tiles, int64_t col, int64_t end) {
  const int64_t left = (end - col + kTileCols<T> - 1) / kTileCols<T>;
  return (left < tiles ? int(left) : tiles) * kTileCols<T>;
}

// Where a piece holds column c. With kFragments the columns of a tile are in the order in which Mma::add reads them: a
// fragment of 8 columns has a word of each of 4 units.
template <typename T, bool kFragments>
__device__ __forceinline__ int place_in_piece(int c) {
  if (!kFragments) return c;
  const int unit = c / kUnit<T> % 8, e = c % kUnit<T>;
  return c / kTileCols<T> * kTileCols<T> + unit / 4 * (kTileCols<T> / 2) + e / 2 * 8 + unit % 4 * 2 + e % 2;
}

// Loads [kRank][cols] of the matrix, from rank first_rank and column first_col on, cols a multiple of kTileCols<T>.
// Elements beyond the matrix or from column end on are zero. All threads must call it.
template <typename T, int kRank, bool kFragments>
__device__ __forceinline__ void load_piece(T* piece, const AdapterMatrix<T>& m, int64_t group, int first_rank,
                                           int64_t first_col, int cols, int64_t end) {
  constexpr int kStride = kPieceStride<T, kRank>, kSize = kUnit<T>, kUnits = kTileCols<T> / kSize;
  const int thread = thread_again();
  const bool along_cols = m.adapters[0].layout.col_stride == 1;
  const auto place = [](int c) { return place_in_piece<T, kFragments>(c); };
  const auto offset_of = [&](const Adapter& adapter, int rank, int64_t col) {
    return group * adapter.group_stride + adapter.layout.offset(rank - adapter.start, col);
  };
  if (!m.vectors) {
#pragma unroll 1
    for (int i = thread; i < kRank * cols; i += kThreads) {
      const int j = along_cols ? i / cols : i % kRank, c = along_cols ? i % cols : i / kRank, rank = first_rank + j;
      const Adapter& adapter = m.adapter_of(rank);
      T value{};
      if (adapter.has(rank) && first_col + c < end) {
        const int64_t offset = offset_of(adapter, rank, first_col + c);
        value = adapter.is_float ? to_element<T>(static_cast<const float*>(adapter.data)[offset])
                                 : static_cast<const T*>(adapter.data)[offset];
      }
      piece[j * kStride + place(c)] = value;
    }
    return;
  }
  const auto load = [](const Adapter& adapter, bool inside, int64_t offset) {
    if (!inside) return make_uint4(0, 0, 0, 0);
    return adapter.is_float ? load_unit<T>(static_cast<const float*>(adapter.data) + offset)
                            : load_unit<T>(static_cast<const T*>(adapter.data) + offset);
  };
  if (along_cols) {  // a thread has the same unit of its ranks in all tiles
    constexpr int kLines = kRank < kThreads / kUnits ? kRank : kThreads / kUnits,
                  kAtOnce = kThreads / (kLines * kUnits) * kTileCols<T>;
#pragma unroll
    for (int line = 0; line < kRank; line += kLines) {
      const int j = line + thread / kUnits % kLines, rank = first_rank + j;
      const int first = thread / (kUnits * kLines) * kTileCols<T> + thread % kUnits * kSize;
      const Adapter& adapter = m.adapter_of(rank);
      const bool has = adapter.has(rank);
      const int64_t offset = has ? offset_of(adapter, rank, first_col + first) : 0;
      T* to = piece + j * kStride + place(first);
#pragma unroll 1
      for (int c = first; c < cols; c += kAtOnce) {
        const uint4 unit = load(adapter, has && first_col + c < end, offset + (c - first));
        if constexpr (kFragments) {
          uint32_t* words = reinterpret_cast<uint32_t*>(to + (c - first));
          words[0] = unit.x, words[4] = unit.y, words[8] = unit.z, words[12] = unit.w;
        } else {
          *reinterpret_cast<uint4*>(to + (c - first)) = unit;
        }
      }
    }
  } else {  // a thread has the same ranks of its columns
    constexpr int kAcross = kRank / kSize, kAtOnce = kThreads / kAcross;
    const int j = thread % kAcross * kSize, first = thread / kAcross, rank = first_rank + j;
    const Adapter& adapter = m.adapter_of(rank);
    const bool has = adapter.has(rank);
    const int64_t offset = has ? offset_of(adapter, rank, first_col + first) : 0;
#pragma unroll 1
    for (int c = first; c < cols; c += kAtOnce) {
      const uint4 bits = load(adapter, has && first_col + c < end, offset + (c - first) * adapter.layout.col_stride);
      T unit[kSize];
      memcpy(unit, &bits, sizeof(bits));
#pragma unroll
      for (int e = 0; e < kSize; ++e) piece[(j + e) * kStride + place(c)] = unit[e];
    }
  }
}

}  // namespace align::cuda
