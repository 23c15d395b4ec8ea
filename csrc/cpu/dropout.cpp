#include "cpu/dropout.h"

#include "cpu/parallel.h"

namespace align::cpu {
namespace {

struct DropoutJob {
  uint64_t offset;
  uint32_t threshold;
  uint8_t* bits;
  uint64_t key[kPhiloxRounds][2];  // of every round
};

// Products of the lanes' low halves. GCC 12 knows no expression for this instruction: it multiplies 64 by 64 bits,
// three times as slow.
template <int W>
ALIGN_INLINE Vec<uint64_t, W> low_product(const Vec<uint64_t, W>& a, const Vec<uint64_t, W>& b) {
#ifdef ALIGN_X86_LEVELS
  if constexpr (W > 16) {
    Vec<uint64_t, W> product;
    asm("vpmuludq %1, %2, %0" : "=v"(product) : "v"(a), "v"(b));
    return product;
  }
#endif
  return (a & uint64_t(0xFFFFFFFFu)) * b;
}

// Multipliers and threshold in every lane.
template <int W>
struct PhiloxConstants {
  Vec<uint64_t, W> multiplier0, multiplier1;
  Vec<uint16_t, W> limit;
};

// One Philox block a 64-bit lane: words in the low halves, anything in the high ones.
template <int W>
ALIGN_INLINE void philox_blocks(const DropoutJob& job, const PhiloxConstants<W>& constants,
                                const Vec<uint64_t, W>& block, Vec<uint64_t, W> (&word)[4]) {
  using U = Vec<uint64_t, W>;
  U c0 = block, c1 = block >> 32;
  U c2 = U{} + job.offset, c3 = c2 >> 32;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const U product0 = low_product<W>(c0, constants.multiplier0);
    const U product1 = low_product<W>(c2, constants.multiplier1);
    c0 = (product1 >> 32) ^ c1 ^ job.key[round][0];
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ job.key[round][1];
    c3 = product0;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

// Keep bits of W / 8 blocks.
template <int W>
ALIGN_INLINE void keep_bytes(const DropoutJob& job, const PhiloxConstants<W>& constants, const Vec<uint64_t, W>& block,
                             uint8_t* bytes) {
  using U = Vec<uint64_t, W>;
  using Lanes16 = Vec<uint16_t, W>;
  constexpr uint64_t kLaneBits = 0x0008000400020001u;  // 16-bit lane l holds 1 << l
  U word[4];
  philox_blocks<W>(job, constants, block, word);
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  const U low = U(Lanes16((word[0] & kLow) | word[1] << 32) >= constants.limit);
  const U high = U(Lanes16((word[2] & kLow) | word[3] << 32) >= constants.limit);
  U bits = (low & kLaneBits) | (high & (kLaneBits << 4));
  bits |= bits >> 32;
  bits |= bits >> 16;
  const auto packed = __builtin_convertvector(bits, Vec<uint8_t, W / 8>);
  std::memcpy(bytes, &packed, sizeof packed);
}

void fill_chunks(const DropoutJob& job, int64_t begin, int64_t end) {
  run_widest([&](auto width) ALIGN_INLINE_LAMBDA {
    constexpr int W = width;
    constexpr int kBlocks = W / 8;
    const int64_t first = begin * kDropoutChunkBytes, last = end * kDropoutChunkBytes;
    Vec<uint64_t, W> block;
    PhiloxConstants<W> constants;
    for (int lane = 0; lane < kBlocks; ++lane) {
      block[lane] = uint64_t(first + lane);
      constants.multiplier0[lane] = kPhiloxMultiplier0;
      constants.multiplier1[lane] = kPhiloxMultiplier1;
    }
    for (int lane = 0; lane < W / 2; ++lane) constants.limit[lane] = uint16_t(job.threshold);
    // Two independent vectors hide the latency of the multiplications.
    for (int64_t b = first; b < last; b += 2 * kBlocks) {
      keep_bytes<W>(job, constants, block, job.bits + b);
      block += uint64_t(kBlocks);
      keep_bytes<W>(job, constants, block, job.bits + b + kBlocks);
      block += uint64_t(kBlocks);
    }
  });
}

}  // namespace

void fill_dropout_bits(uint64_t seed, uint64_t offset, uint32_t threshold, int64_t count, uint8_t* bits) {
  DropoutJob job{offset, threshold, bits, {}};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    job.key[round][0] = uint32_t(uint32_t(seed) + round * kPhiloxWeyl0);
    job.key[round][1] = uint32_t(uint32_t(seed >> 32) + round * kPhiloxWeyl1);
  }
  parallel_for(0, (count + kDropoutChunk - 1) / kDropoutChunk, 256,
               [&job](int64_t begin, int64_t end) { fill_chunks(job, begin, end); });
}

double draw_dropout(double p, const uint64_t* rng, int64_t count, uint8_t* bits) {
  if (p <= 0) return 1;
  const uint32_t threshold = dropout_threshold(p);
  fill_dropout_bits(rng[0], rng[1], threshold, count, bits);
  return dropout_scale(threshold);
}

}  // namespace align::cpu
