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

// Which ranks see which mask of the token matrix. Ranks i * ranks_each .. (i + 1) * ranks_each - 1 see mask i, in which
// element (row, c) has the dropout number (row * count + i) * cols + c. Ranks beyond all masks see the matrix unmasked.
struct RankMasks {
  DropoutArgs dropout;
  int count;
  int ranks_each;  // a multiple of 8, or kAllRanks
  float scale;     // multiplies the products of ranks that see a mask

  __device__ bool has(int rank) const { return rank < count * ranks_each; }
};
constexpr int kAllRanks = 1 << 30;
constexpr RankMasks kNoMasks = {{0, nullptr}, 1, kAllRanks, 1};

// Calls body(begin, end, mask) for the ranks of a chunk that see the same mask, and at last with mask -1 for the ranks
// that see none. The chunk has kRank ranks from first_rank on.
template <int kRank, typename Body>
__device__ __forceinline__ void for_each_mask(const RankMasks& masks, const Dropout& dropout, int first_rank,
                                              const Body& body) {
  const int count = dropout.threshold > 0 ? masks.count : 0;
#pragma unroll 1
  for (int index = 0; index <= count; ++index) {
    const int begin = max(index * masks.ranks_each - first_rank, 0);
    const int end = index < count ? min((index + 1) * masks.ranks_each - first_rank, kRank) : kRank;
    if (begin < end) body(begin, end, index < count ? index : -1);
  }
}

// Bit i of the result says whether element + i is kept, for i < count; the higher bits are undefined. The elements lie
// in one or two Philox blocks.
__device__ __forceinline__ uint32_t mask_bits(const Dropout& dropout, uint64_t element, int count) {
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

// Turns the low bits into a mask of a 32-bit word, which holds two elements of 16 bits or one of 32.
template <typename T>
__device__ __forceinline__ uint32_t word_mask(uint32_t bits) {
  if constexpr (sizeof(T) == 4) return bits & 1u ? ~0u : 0u;
  return (bits & 1u ? 0xFFFFu : 0u) | (bits & 2u ? 0xFFFF0000u : 0u);
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

// One mask for the 16 rows that a warp has of a tile. Lane 2 i + h holds the bits of half h of row i.
template <typename T>
struct TileMask {
  static constexpr int kHalf = kTileCols<T> / 2;
  bool keeps_all = true;
  uint32_t bits = 0;

  // first_row is the first row of the warp, col the first column. Mask -1 keeps all elements.
  __device__ TileMask(const Dropout& dropout, const RankMasks& masks, int index, const RowTile& tile, int first_row,
                      int64_t cols, int64_t col)
      : keeps_all(index < 0) {
    const int lane = int(threadIdx.x) % kWarp, row = first_row + lane / 2;
    if (keeps_all || row >= tile.count) return;
    bits = mask_bits(dropout, (tile.row(row) * masks.count + index) * cols + col + lane % 2 * kHalf, kHalf);
  }
  TileMask() = default;

  // Bit c of the result says whether column + c of a row is kept, within one half of the row. All lanes of the warp
  // must call it.
  __device__ __forceinline__ uint32_t word(int row, int column) const {
    return __shfl_sync(kAllLanes, bits, 2 * row + column / kHalf) >> column % kHalf;
  }
};

}  // namespace align::cuda
