#include "cpu/dropout.h"

namespace align::cpu {
namespace {

// Multiplies the low halves of the lanes. GCC 12 has no expression for this instruction: it multiplies 64 by 64 bits,
// which takes three times as long.
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

// Moves the high half of each lane to its low half by a shuffle, because a shift would need the port of the products.
template <int W, int... word>
ALIGN_INLINE Vec<uint64_t, W> high_words(const Vec<uint64_t, W>& v, std::integer_sequence<int, word...>) {
  using Words = Vec<uint32_t, W>;
  return Vec<uint64_t, W>(__builtin_shufflevector(Words(v), Words(v), (word | 1)...));
}
template <int W>
ALIGN_INLINE Vec<uint64_t, W> high_words(const Vec<uint64_t, W>& v) {
  return high_words<W>(v, std::make_integer_sequence<int, W / 4>{});
}

// a ^ b ^ key in one instruction; GCC 12 makes two.
template <int W>
ALIGN_INLINE Vec<uint64_t, W> exclusive_or(const Vec<uint64_t, W>& a, const Vec<uint64_t, W>& b, uint64_t key) {
#ifdef ALIGN_X86_LEVELS
  if constexpr (W == 64) {
    Vec<uint64_t, W> result = a;
    asm("vpternlogq $0x96, %2, %1, %0" : "+v"(result) : "v"(b), "v"(Vec<uint64_t, W>{} + key));
    return result;
  }
#endif
  return a ^ b ^ key;
}

// The bytes of a vector of blocks, which words01 and words23 hold: 16-bit lanes 0 to 3 of each block, and 4 to 7. A bit
// is set if its lane is at least `limit`.
template <int W>
ALIGN_INLINE Vec<uint8_t, W / 8> bytes_of(const Vec<uint16_t, W>& words01, const Vec<uint16_t, W>& words23,
                                          const Vec<uint16_t, W>& limit) {
#ifdef ALIGN_X86_LEVELS
  if constexpr (W == 64) {  // GCC 12 makes vectors of the comparisons below
    uint32_t low, high;
    uint64_t low_nibbles, high_nibbles;
    asm("vpcmpuw $5, %2, %1, %0" : "=Yk"(low) : "v"(words01), "v"(limit));
    asm("vpcmpuw $5, %2, %1, %0" : "=Yk"(high) : "v"(words23), "v"(limit));
    asm("pdep %2, %1, %0" : "=r"(low_nibbles) : "r"(uint64_t(low)), "r"(0x0F0F0F0F0F0F0F0Fu));
    asm("pdep %2, %1, %0" : "=r"(high_nibbles) : "r"(uint64_t(high)), "r"(0xF0F0F0F0F0F0F0F0u));
    return Vec<uint8_t, 8>(low_nibbles | high_nibbles);
  }
#endif
  using U = Vec<uint64_t, W>;
  constexpr uint64_t kLaneBits = 0x0008000400020001u;  // 16-bit lane l holds 1 << l
  U bits = (U(words01 >= limit) & kLaneBits) | (U(words23 >= limit) & (kLaneBits << 4));
  bits |= bits >> 32;
  bits |= bits >> 16;
  return __builtin_convertvector(bits, Vec<uint8_t, W / 8>);
}

// The low half of each lane of `low`, and above it that of `high`.
template <int W, int... word>
ALIGN_INLINE Vec<uint16_t, W> low_words(const Vec<uint64_t, W>& low, const Vec<uint64_t, W>& high,
                                        std::integer_sequence<int, word...>) {
  using Words = Vec<uint32_t, W>;
  constexpr int kWords = sizeof...(word);
  return Vec<uint16_t, W>(__builtin_shufflevector(Words(low), Words(high), (word % 2 ? kWords + word - 1 : word)...));
}
template <int W>
ALIGN_INLINE Vec<uint16_t, W> low_words(const Vec<uint64_t, W>& low, const Vec<uint64_t, W>& high) {
  return low_words<W>(low, high, std::make_integer_sequence<int, W / 4>{});
}

}  // namespace

DropoutBits::DropoutBits(uint64_t seed, uint64_t offset, uint32_t threshold) : offset_(offset), threshold_(threshold) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    key_[round][0] = uint32_t(uint32_t(seed) + round * kPhiloxWeyl0);
    key_[round][1] = uint32_t(uint32_t(seed >> 32) + round * kPhiloxWeyl1);
  }
}

// Draws units from a block on. A 64-bit lane is a block: the low halves hold its words, the high halves are undefined.
template <int W>
ALIGN_INLINE void DropoutBits::draw_units(uint64_t block, int64_t units, uint8_t* bytes) const {
  using U = Vec<uint64_t, W>;
  using Lanes16 = Vec<uint16_t, W>;
  constexpr int kBlocks = W / 8;
  const U multiplier0 = U{} + kPhiloxMultiplier0, multiplier1 = U{} + kPhiloxMultiplier1;
  U counter;
  for (int lane = 0; lane < kBlocks; ++lane) counter[lane] = block + lane;
  const Lanes16 limit = Lanes16{} + uint16_t(threshold_);
  // Draws kMany vectors. A round depends on the one before, so several vectors at a time hide its latency.
  const auto draw_vectors = [&](auto many, int64_t v) ALIGN_INLINE_LAMBDA {
    constexpr int kMany = many();
    U c0[kMany], c1[kMany], c2[kMany], c3[kMany];
    for (int k = 0; k < kMany; ++k, counter += uint64_t(kBlocks)) {
      c0[k] = counter;
      c1[k] = counter >> 32;
      c2[k] = U{} + offset_;
      c3[k] = c2[k] >> 32;
    }
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int k = 0; k < kMany; ++k) {
        const U product0 = low_product<W>(c0[k], multiplier0), product1 = low_product<W>(c2[k], multiplier1);
        c0[k] = exclusive_or<W>(high_words<W>(product1), c1[k], key_[round][0]);
        c1[k] = product1;
        c2[k] = exclusive_or<W>(high_words<W>(product0), c3[k], key_[round][1]);
        c3[k] = product0;
      }
    }
    for (int k = 0; k < kMany; ++k) {
      const auto packed = bytes_of<W>(low_words<W>(c0[k], c1[k]), low_words<W>(c2[k], c3[k]), limit);
      std::memcpy(bytes + (v + k) * kBlocks, &packed, sizeof packed);
    }
  };
  const int64_t vectors = units * (kUnit / 8 / kBlocks);
  int64_t v = 0;
  for (; W == 64 && v + 6 <= vectors; v += 6) draw_vectors(std::integral_constant<int, 6>{}, v);  // 24 of 32 registers
  for (; v + 2 <= vectors; v += 2) draw_vectors(std::integral_constant<int, 2>{}, v);
  if (v < vectors) draw_vectors(std::integral_constant<int, 1>{}, v);
}

void DropoutBits::draw(int64_t first, int64_t count, uint8_t* bytes) const {
  const int64_t units = (first % kPhiloxLanes + count + kUnit - 1) / kUnit;
  run_widest([&](auto width)
                 ALIGN_INLINE_LAMBDA { draw_units<width()>(uint64_t(first) / kPhiloxLanes, units, bytes); });
}

}  // namespace align::cpu
