// Dropout decisions as bits, one for an element, set iff it is kept (ops/philox.h). A byte is one Philox block.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "ops/philox.h"

namespace align::cpu {

// The bits of elements first .. first + count - 1: that of the first of them is bit first % 8 of byte 0.
class DropoutBits {
 public:
  DropoutBits() = default;
  DropoutBits(uint64_t seed, uint64_t offset, uint32_t threshold);  // dropout_threshold(p), at most 65535

  // Bytes that draw writes for count elements, and zero_dropped may read.
  static constexpr int64_t bytes(int64_t count) { return (count + 7 + kUnit - 1) / kUnit * (kUnit / 8) + 8; }

  void draw(int64_t first, int64_t count, uint8_t* bytes) const;

 private:
  static constexpr int64_t kUnit = 64;  // elements: eight blocks, for the eight lanes of the widest vectors

  template <int W>
  void draw_units(uint64_t block, int64_t units, uint8_t* bytes) const;

  uint64_t offset_ = 0;
  uint32_t threshold_ = 0;
  uint64_t key_[kPhiloxRounds][2];  // of every round
};

// The bits of a row: that of column c is bit (shift + c) % 8 of byte (shift + c) / 8.
struct KeptRow {
  const uint8_t* bytes;
  uint32_t shift;
};

// Of a row whose column 0 has that bit of bytes.
inline KeptRow kept_row(const uint8_t* bytes, int64_t bit) { return {bytes + bit / 8, uint32_t(bit % 8)}; }

// v, columns c .. of a row, with the dropped ones zeroed; c is a multiple of the lanes.
template <int W, typename A>
ALIGN_INLINE Vec<A, W> zero_dropped(const Vec<A, W>& v, const KeptRow& row, int64_t c) {
  uint32_t window;
  std::memcpy(&window, row.bytes + c / 8, sizeof window);
  constexpr bool kWholeBytes = kLanes<A, W> % 8 == 0;
  return keep_lanes<W, A>(v, window >> (kWholeBytes ? row.shift : row.shift + uint32_t(c % 8)));
}

// Rows a stride apart, whose elements are numbered on from row to row: scale times what is kept, 0 elsewhere.
template <typename A>
void drop_rows(A* data, int64_t stride, int64_t rows, int64_t columns, const KeptRow& first, A scale);

}  // namespace align::cpu
