// Dropout of the matrix that a kernel streams: which ranks see which masks, and the masks of a warp's rows of a tile.
#pragma once

#include "cuda/row_tile.cuh"
#include "ops/philox.h"

namespace align::cuda {

struct Dropout {
  uint32_t threshold;  // 0: none
  uint64_t seed, offset;

  __device__ explicit Dropout(const DropoutArgs& given) : threshold(dropout_threshold(given.p)), seed(0), offset(0) {
    if (threshold > 0) seed = given.rng[0], offset = given.rng[1];
  }
  __device__ float scale() const { return float(dropout_scale(threshold)); }
};

// Which ranks see which masks of the tall matrix: ranks i * per .. (i + 1) * per the i-th stream's, whose elements are
// number (row * streams + i) * cols + c; those beyond all streams see the matrix as it is.
struct RankMasks {
  DropoutArgs dropout;
  int streams;
  int per;     // a multiple of 8; or kAllRanks
  float kept;  // what products of ranks with masks are multiplied by

  __device__ bool has(int rank) const { return rank < streams * per; }
};
constexpr int kAllRanks = 1 << 30;
constexpr RankMasks kNoMasks = {{0, nullptr}, 1, kAllRanks, 1};

// Calls body(begin, end, stream) for the ranks of a chunk of kRank that see a stream, then for the others, stream -1.
template <int kRank, typename Body>
__device__ __forceinline__ void for_each_stream(const RankMasks& masks, const Dropout& dropout, int first_rank,
                                                const Body& body) {
  const int streams = dropout.threshold > 0 ? masks.streams : 0;
#pragma unroll 1
  for (int stream = 0; stream <= streams; ++stream) {
    const int begin = max(stream * masks.per - first_rank, 0);
    const int end = stream < streams ? min((stream + 1) * masks.per - first_rank, kRank) : kRank;
    if (begin < end) body(begin, end, stream < streams ? stream : -1);
  }
}

// Bit i: whether element + i is kept, for i < count (higher bits mean nothing); the elements lie in one Philox block or
// in two.
__device__ __forceinline__ uint32_t keep_bits(const Dropout& dropout, uint64_t element, int count) {
  const int first = int(element % kPhiloxLanes);
  uint32_t bits = 0;
#pragma unroll 1
  for (int done = 0; done < count; done += kPhiloxLanes - (done == 0 ? first : 0)) {
    const PhiloxBlock block = philox(dropout.seed, (element + done) / kPhiloxLanes, dropout.offset);
    uint32_t kept = 0;
#pragma unroll
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      const uint32_t value = (block.word[lane / 2] >> (16 * (lane % 2))) & 0xFFFFu;
      kept |= uint32_t(value >= dropout.threshold) << lane;
    }
    bits |= done == 0 ? kept >> first : kept << done;
  }
  return bits;
}

// The low bits of keep as a mask of a word: of two elements of 16 bits, or one of 32.
template <typename T>
__device__ __forceinline__ uint32_t word_mask(uint32_t keep) {
  if constexpr (sizeof(T) == 4) return keep & 1u ? ~0u : 0u;
  return (keep & 1u ? 0xFFFFu : 0u) | (keep & 2u ? 0xFFFF0000u : 0u);
}

// Zeroes the dropped elements of a unit in shared memory.
template <typename T>
__device__ __forceinline__ void mask_unit(T* unit, uint32_t bits) {
  constexpr int kPerWord = 4 / int(sizeof(T));  // elements of 32 bits
  uint4 four = *reinterpret_cast<uint4*>(unit);
  four.x &= word_mask<T>(bits), four.y &= word_mask<T>(bits >> kPerWord);
  four.z &= word_mask<T>(bits >> 2 * kPerWord), four.w &= word_mask<T>(bits >> 3 * kPerWord);
  *reinterpret_cast<uint4*>(unit) = four;
}

// What a stream keeps of a warp's 16 rows of a tile: lane 2 i + h holds half h of row i.
template <typename T>
struct KeepTile {
  static constexpr int kHalf = kTileCols<T> / 2;
  bool all = true;
  uint32_t bits = 0;

  // From the first of the warp's rows and column col on; stream -1 keeps all.
  __device__ KeepTile(const Dropout& dropout, const RankMasks& masks, int stream, const RowTile& tile, int first_row,
                      int64_t cols, int64_t col)
      : all(stream < 0) {
    const int lane = int(threadIdx.x) % kWarp, row = first_row + lane / 2;
    if (all || row >= tile.count) return;
    bits = keep_bits(dropout, (tile.row(row) * masks.streams + stream) * cols + col + lane % 2 * kHalf, kHalf);
  }
  KeepTile() = default;

  // Bit c: whether column + c of one of the rows is kept, in the same half of it. All lanes of the warp must call.
  __device__ __forceinline__ uint32_t word(int row, int column) const {
    return __shfl_sync(kAllLanes, bits, 2 * row + column / kHalf) >> column % kHalf;
  }
};

}  // namespace align::cuda
