// Philox4x32-10 (Salmon et al., SC 2011) and the dropout decision built on it: one generator for the CPU,
// CUDA and the Python reference (align_ext/reference/philox.py), keyed by element and never by thread.
//
//   key     = seed                        64 bits
//   counter = (block, offset)             64 + 64 bits, low words first
//   element e -> block e / 8, 16-bit lane e % 8 (word (e % 8) / 2, low half first)
//   keep element e  iff  lane >= t16,  t16 = round(p * 65536);  kept values are scaled by 1 / (1 - t16 / 65536)
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ALIGN_HOST_DEVICE __host__ __device__
#else
#define ALIGN_HOST_DEVICE
#endif

namespace align {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
constexpr int kPhiloxLanes = 8;  // 16-bit lanes of one block

struct PhiloxBlock {
  uint32_t word[4];
};

struct PhiloxKey {
  uint32_t k0, k1;

  ALIGN_HOST_DEVICE explicit PhiloxKey(uint64_t seed) : k0(uint32_t(seed)), k1(uint32_t(seed >> 32)) {}
  ALIGN_HOST_DEVICE void next() { k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1; }
};

ALIGN_HOST_DEVICE inline PhiloxBlock philox_counter(uint64_t block, uint64_t offset) {
  return {{uint32_t(block), uint32_t(block >> 32), uint32_t(offset), uint32_t(offset >> 32)}};
}

ALIGN_HOST_DEVICE inline void philox_round(PhiloxBlock& c, const PhiloxKey& key) {
  const uint64_t product0 = uint64_t(kPhiloxMultiplier0) * c.word[0];
  const uint64_t product1 = uint64_t(kPhiloxMultiplier1) * c.word[2];
  c = {{uint32_t(product1 >> 32) ^ c.word[1] ^ key.k0, uint32_t(product1),
        uint32_t(product0 >> 32) ^ c.word[3] ^ key.k1, uint32_t(product0)}};
}

ALIGN_HOST_DEVICE inline PhiloxBlock philox(uint64_t seed, uint64_t block, uint64_t offset) {
  PhiloxBlock c = philox_counter(block, offset);
  PhiloxKey key(seed);
#ifdef __CUDACC__
#pragma unroll 2
#endif
  for (int round = 0; round < kPhiloxRounds; ++round, key.next()) philox_round(c, key);
  return c;
}

// Elements whose lane is below the threshold are dropped.
ALIGN_HOST_DEVICE inline uint32_t dropout_threshold(double p) { return uint32_t(p * 65536.0 + 0.5); }

// Kept elements are multiplied by this. It depends on the threshold, not on p, so that the expectation is exact.
ALIGN_HOST_DEVICE inline double dropout_scale(uint32_t threshold) { return 65536.0 / (65536.0 - threshold); }

ALIGN_HOST_DEVICE inline bool dropout_keep(uint64_t seed, uint64_t offset, uint64_t element, uint32_t threshold) {
  const PhiloxBlock block = philox(seed, element / kPhiloxLanes, offset);
  const uint32_t lane = uint32_t(element % kPhiloxLanes);
  return ((block.word[lane / 2] >> (16 * (lane % 2))) & 0xFFFFu) >= threshold;
}

// The dropout arguments of a kernel.
struct DropoutArgs {
  double p;             // 0: no dropout, rng is not read
  const uint64_t* rng;  // [2] seed, offset
  // Where rows share their numbers with the masks of other layers: the number of the first element of row 0, and how
  // many numbers a row has; 0: those of its own masks. Masks of x are numbered like this on a CPU alone.
  int64_t first = 0, row_numbers = 0;
};

}  // namespace align
