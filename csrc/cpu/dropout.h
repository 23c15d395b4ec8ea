// Dropout masks as bits: one bit for each element, set if the element is kept (ops/philox.h). A byte is one Philox
// block.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "ops/philox.h"

namespace align::cpu {

// Draws the bits of elements first .. first + count - 1. The bit of element first is bit first % 8 of byte 0.
class DropoutBits {
 public:
  DropoutBits() = default;
  DropoutBits(uint64_t seed, uint64_t offset, uint32_t threshold);  // dropout_threshold(p), at most 65535

  // The bytes that draw writes, and zero_dropped may read, for count elements.
  static constexpr int64_t bytes(int64_t count) { return (count + 7 + kUnit - 1) / kUnit * (kUnit / 8) + 8; }

  void draw(int64_t first, int64_t count, uint8_t* bytes) const;

 private:
  static constexpr int64_t kUnit = 64;  // elements of eight blocks, one for each lane of the widest vectors

  template <int W>
  void draw_units(uint64_t block, int64_t units, uint8_t* bytes) const;

  uint64_t offset_ = 0;
  uint32_t threshold_ = 0;
  uint64_t key_[kPhiloxRounds][2];  // the keys of every round
};

// The bits of a row: column c has bit (shift + c) % 8 of byte (shift + c) / 8.
struct MaskRow {
  const uint8_t* bytes;
  uint32_t shift;
};

// The row whose column 0 has bit number `bit` of bytes.
inline MaskRow mask_row(const uint8_t* bytes, int64_t bit) { return {bytes + bit / 8, uint32_t(bit % 8)}; }

// Sets the dropped elements of v to zero. v holds the columns of a row from c on; c is a multiple of the lanes.
template <int W, typename A>
ALIGN_INLINE Vec<A, W> zero_dropped(const Vec<A, W>& v, const MaskRow& row, int64_t c) {
  uint32_t window;
  std::memcpy(&window, row.bytes + c / 8, sizeof window);
  constexpr bool kWholeBytes = kLanes<A, W> % 8 == 0;
  return select_lanes<W, A>(v, window >> (kWholeBytes ? row.shift : row.shift + uint32_t(c % 8)));
}

}  // namespace align::cpu
