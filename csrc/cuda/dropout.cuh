// Dropout of the matrix that a kernel streams: which ranks see which masks, and the masks of a warp's rows of a tile.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/row_tile.cuh"
#include "ops/philox.h"

namespace align::cuda {

struct Dropout {
  uint32_t threshold;  // 0: none
  bool whole;          // whether the masks of every 8 elements, from multiples of 8 columns on, are one Philox block
  uint64_t seed, offset;

  // cols: the columns of a mask.
  __device__ Dropout(const DropoutArgs& given, int64_t cols)
      : threshold(dropout_threshold(given.p)), whole(cols % kPhiloxLanes == 0), seed(0), offset(0) {
    if (threshold > 0) seed = given.rng[0], offset = given.rng[1];
  }
  __device__ float scale() const { return float(dropout_scale(threshold)); }

  // Whether the elements of the upper and the lower lane of a word are kept.
  __device__ bool keeps_high(uint32_t word) const { return word > (threshold << 16) - 1; }
  __device__ bool keeps_low(uint32_t word) const { return keeps_high(word << 16); }
  // All bits of the lanes of a word whose elements are kept. Both are compared at once: bit 15 of a lane's sum says
  // whether its other bits reach those of the threshold; with bit 15 of the lane itself it decides.
  __device__ uint32_t mask(uint32_t word) const {
    const uint32_t low = uint32_t(int(threshold - 0x8001) >> 31);  // all bits: the threshold is at most 0x8000
    const uint32_t reach = (word & 0x7FFF7FFFu) + ((0x10000u - (low & 0x8000u)) - threshold) * 0x10001u;
    return spread_signs((word & reach) | ((word | reach) & low));
  }
};

constexpr int kMaskedRanks = 8;  // the ranks that see a mask begin at a multiple of this

// Which ranks see which mask of the token matrix. Ranks i * ranks_each .. (i + 1) * ranks_each - 1 see mask i, in which
// element (row, c) has the dropout number (row * count + i) * cols + c. Ranks beyond all masks see the matrix unmasked.
struct RankMasks {
  DropoutArgs dropout;
  int count;
  int ranks_each;  // a multiple of kMaskedRanks, or kAllRanks
  float scale;     // multiplies the products of ranks that see a mask

  __device__ bool has(int rank) const { return rank < count * ranks_each; }
  // The masks that are drawn.
  __device__ int drawn(const Dropout& of) const { return of.threshold > 0 ? count : 0; }
};
constexpr int kAllRanks = 1 << 30;
constexpr RankMasks kNoMasks = {{0, nullptr}, 1, kAllRanks, 1};

// Calls body(begin, end, mask) for the ranks of a chunk that see the same one of `count` masks, and at last with mask
// -1 for the ranks that see none. The chunk has so many ranks from first_rank on.
template <typename Body>
__device__ __forceinline__ void for_each_mask(const RankMasks& masks, int count, int first_rank, int ranks,
                                              const Body& body) {
#pragma unroll 1
  for (int index = 0; index <= count; ++index) {
    const int begin = max(index * masks.ranks_each - first_rank, 0);
    const int end = index < count ? min((index + 1) * masks.ranks_each - first_rank, ranks) : ranks;
    if (begin < end) body(begin, end, index < count ? index : -1);
  }
}

// The 16-bit lanes of the 8 elements from `element` on, for N times 8 elements at once: their rounds are interleaved
// and share the keys. With N < 4, where registers are scarce, the keys are computed for every call; otherwise the
// compiler may keep those of all rounds.
template <int N>
__device__ __forceinline__ void draw(const Dropout& dropout, const uint64_t (&element)[N], PhiloxBlock (&lanes)[N]) {
  PhiloxKey key(N < 4 ? opaque(dropout.seed) : dropout.seed);
#pragma unroll
  for (int n = 0; n < N; ++n) lanes[n] = philox_counter(element[n] / kPhiloxLanes, dropout.offset);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma unroll
    for (int n = 0; n < N; ++n) philox_round(lanes[n], key);
    key.next();
  }
  if (dropout.whole) return;
#pragma unroll
  for (int n = 0; n < N; ++n) {  // elements that begin within a block end in the next one
    const int first = int(element[n] % kPhiloxLanes);
    const PhiloxBlock next = philox(dropout.seed, element[n] / kPhiloxLanes + 1, dropout.offset);
    uint32_t both[2 * 4];
#pragma unroll
    for (int w = 0; w < 4; ++w) both[w] = lanes[n].word[w], both[w + 4] = next.word[w];
#pragma unroll
    for (int words = 2; words > 0; words /= 2) {
#pragma unroll
      for (int w = 0; w + words < 8; ++w) both[w] = first & 2 * words ? both[w + words] : both[w];
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) lanes[n].word[w] = first & 1 ? both[w] >> 16 | both[w + 1] << 16 : both[w];
  }
}

}  // namespace align::cuda
