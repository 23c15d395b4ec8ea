// Dropout decisions as a bit array: bit e % 8 of byte e / 8 is set iff element e is kept (ops/philox.h).
// A byte is one Philox block, so the array is the generator's output compared with the threshold.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "ops/philox.h"

namespace align::cpu {

constexpr int64_t kDropoutChunkBytes = 16;  // the unit of work of fill_dropout_bits
constexpr int64_t kDropoutChunk = kDropoutChunkBytes * kPhiloxLanes;

// Bytes of the bit array of count elements, with room for whole chunks and for zero_dropped's 32-bit loads.
constexpr int64_t dropout_bits_bytes(int64_t count) {
  return (count + kDropoutChunk - 1) / kDropoutChunk * kDropoutChunkBytes + int64_t(sizeof(uint32_t));
}

// Bits of elements 0 .. count-1, on all threads. threshold is dropout_threshold(p), at most 65535.
void fill_dropout_bits(uint64_t seed, uint64_t offset, uint32_t threshold, int64_t count, uint8_t* bits);

// The same for p and rng (seed, offset); returns the scale of kept elements. p = 0: reads and fills nothing, returns 1.
double draw_dropout(double p, const uint64_t* rng, int64_t count, uint8_t* bits);

// v with the lanes of dropped elements zeroed; lane l is element first_element + l.
template <int W, typename A>
ALIGN_INLINE Vec<A, W> zero_dropped(const Vec<A, W>& v, const uint8_t* bits, int64_t first_element) {
  uint32_t window;  // 25 bits or more from first_element on
  std::memcpy(&window, bits + uint64_t(first_element) / 8, sizeof window);
  Vec<UInt<A>, W> lane_bit;
  for (int lane = 0; lane < kLanes<A, W>; ++lane) lane_bit[lane] = UInt<A>(1) << lane;
  return (lane_bit & UInt<A>(window >> (uint64_t(first_element) % 8))) != 0 ? v : Vec<A, W>{};
}

}  // namespace align::cpu
