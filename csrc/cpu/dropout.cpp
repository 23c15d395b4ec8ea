#include "cpu/dropout.h"

namespace align::cpu {
namespace {

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

template <int W, typename A>
ALIGN_INLINE void drop_columns(A* row, int64_t columns, const KeptRow& kept, A scale) {
  constexpr int64_t kLane = kLanes<A, W>;
  int64_t c = 0;
  for (; c + kLane <= columns; c += kLane) store<W>(row + c, zero_dropped<W, A>(scale * load<W>(row + c), kept, c));
  if (c == columns) return;
  store_first<W>(row + c, zero_dropped<W, A>(scale * load_first<W>(row + c, columns - c), kept, c), columns - c);
}

}  // namespace

DropoutBits::DropoutBits(uint64_t seed, uint64_t offset, uint32_t threshold) : offset_(offset), threshold_(threshold) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    key_[round][0] = uint32_t(uint32_t(seed) + round * kPhiloxWeyl0);
    key_[round][1] = uint32_t(uint32_t(seed >> 32) + round * kPhiloxWeyl1);
  }
}

// Units from a block on. A 64-bit lane is a block: its words in the low halves, anything in the high ones.
template <int W>
ALIGN_INLINE void DropoutBits::draw_units(uint64_t block, int64_t units, uint8_t* bytes) const {
  using U = Vec<uint64_t, W>;
  using Lanes16 = Vec<uint16_t, W>;
  constexpr int kBlocks = W / 8;
  constexpr uint64_t kLow = 0xFFFFFFFFu, kLaneBits = 0x0008000400020001u;  // 16-bit lane l holds 1 << l
  U counter, multiplier0 = U{} + kPhiloxMultiplier0, multiplier1 = U{} + kPhiloxMultiplier1;
  for (int lane = 0; lane < kBlocks; ++lane) counter[lane] = block + lane;
  const Lanes16 limit = Lanes16{} + uint16_t(threshold_);
  const int64_t vectors = units * (kUnit / 8 / kBlocks);
  for (int64_t v = 0; v < vectors; ++v) {
    U c0 = counter, c1 = counter >> 32, c2 = U{} + offset_, c3 = c2 >> 32;
    counter += uint64_t(kBlocks);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const U product0 = low_product<W>(c0, multiplier0), product1 = low_product<W>(c2, multiplier1);
      c0 = (product1 >> 32) ^ c1 ^ key_[round][0];
      c1 = product1;
      c2 = (product0 >> 32) ^ c3 ^ key_[round][1];
      c3 = product0;
    }
    const U low = U(Lanes16((c0 & kLow) | c1 << 32) >= limit), high = U(Lanes16((c2 & kLow) | c3 << 32) >= limit);
    U bits = (low & kLaneBits) | (high & (kLaneBits << 4));
    bits |= bits >> 32;
    bits |= bits >> 16;
    const auto packed = __builtin_convertvector(bits, Vec<uint8_t, kBlocks>);
    std::memcpy(bytes + v * kBlocks, &packed, sizeof packed);
  }
}

void DropoutBits::draw(int64_t first, int64_t count, uint8_t* bytes) const {
  const int64_t units = (first % kPhiloxLanes + count + kUnit - 1) / kUnit;
  run_widest([&](auto width)
                 ALIGN_INLINE_LAMBDA { draw_units<width()>(uint64_t(first) / kPhiloxLanes, units, bytes); });
}

template <typename A>
void drop(A* row, int64_t columns, const KeptRow& kept, A scale) {
  run_widest([&](auto width) ALIGN_INLINE_LAMBDA { drop_columns<width()>(row, columns, kept, scale); });
}
template void drop(float*, int64_t, const KeptRow&, float);
template void drop(double*, int64_t, const KeptRow&, double);

}  // namespace align::cpu
