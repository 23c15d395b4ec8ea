#include <cmath>
#include <cstring>

#include "check.h"
#include "cpu/dropout.h"
#include "ops/philox.h"
#include "support.h"

using namespace align;

namespace {

bool equals(const PhiloxBlock& block, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  return block.word[0] == w0 && block.word[1] == w1 && block.word[2] == w2 && block.word[3] == w3;
}

}  // namespace

// Random123's kat_vectors, "philox4x32 10": counter words 0-1 are our block, 2-3 our offset.
TEST(philox_gives_the_published_known_answers) {
  CHECK(equals(philox(0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8));
  CHECK(equals(philox(~0ull, ~0ull, ~0ull), 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd));
  CHECK(equals(philox(0x299f31d0a4093822ull, 0x85a308d3243f6a88ull, 0x0370734413198a2eull), 0xd16cfe09, 0x94fdcceb,
               0x5001e420, 0x24126ea1));
}

TEST(a_threshold_of_p_keeps_one_minus_p) {
  CHECK(dropout_threshold(0) == 0 && dropout_threshold(0.5) == 32768 && dropout_threshold(0.1) == 6554);
  CHECK(dropout_scale(32768) == 2 && dropout_scale(0) == 1);
  int64_t kept = 0;
  const int64_t count = 1 << 18;
  for (int64_t e = 0; e < count; ++e) kept += dropout_keep(7, 3, e, dropout_threshold(0.25));
  CHECK(std::fabs(double(kept) / count - 0.75) < 5 * std::sqrt(0.25 * 0.75 / count));
}

TEST(vectorised_bits_are_philox_s_decisions) {
  const uint64_t seed = 0x123456789abcdef0ull, offset = 0xfedcba9876543210ull;
  test::for_each_vector_width([&] {
    for (int64_t first : {int64_t(0), int64_t(3), int64_t(64), (int64_t(1) << 40) + 7}) {
      for (int64_t count : {0, 1, 7, 8, 57, 64, 65, 129, 5000}) {
        for (uint32_t threshold : {0u, 1u, 6554u, 32768u, 65535u}) {
          std::vector<uint8_t> bits(cpu::DropoutBits::bytes(count) + 1, 0xA5);
          cpu::DropoutBits(seed, offset, threshold).draw(first, count, bits.data());
          for (int64_t e = 0; e < count; ++e) {
            const int64_t bit = first % 8 + e;
            CHECK((bits[bit / 8] >> (bit % 8) & 1) == dropout_keep(seed, offset, first + e, threshold));
          }
          CHECK(bits.back() == 0xA5);
        }
      }
    }
  });
}

TEST(a_lane_equal_to_the_threshold_is_kept) {
  for (int64_t e = 0; e < 64; ++e) {
    const uint32_t word = philox(9, e / 8, 10).word[e % 8 / 2];
    const uint32_t lane = e % 2 ? word >> 16 : word & 0xFFFF;
    std::vector<uint8_t> bits(cpu::DropoutBits::bytes(64));
    test::for_each_vector_width([&] {
      cpu::DropoutBits(9, 10, lane).draw(0, 64, bits.data());
      CHECK(bits[e / 8] >> (e % 8) & 1);
      cpu::DropoutBits(9, 10, lane + 1).draw(0, 64, bits.data());
      CHECK(!(bits[e / 8] >> (e % 8) & 1));
    });
  }
}

// Lanes of a vector of threes from column c of the row on, against the decisions.
template <int TA, typename A>
ALIGN_INLINE void check_masked(const std::vector<uint8_t>& bits, int64_t start, int64_t first, int64_t columns) {
  const cpu::MaskRow row = cpu::mask_row(bits.data(), start % 8 + first);
  for (int64_t c = 0; c < columns; c += cpu::kLanes<A, TA>) {
    const auto masked = cpu::zero_dropped<TA, A>(cpu::Vec<A, TA>{} + A(3), row, c);
    for (int lane = 0; lane < cpu::kLanes<A, TA>; ++lane) {
      CHECK(masked[lane] == (dropout_keep(1, 2, start + first + c + lane, 30000) ? 3 : 0));
    }
  }
}

TEST(masks_are_right_at_every_bit_offset) {
  const int64_t count = 512;
  for (int64_t start = 0; start < 20; ++start) {
    std::vector<uint8_t> bits(cpu::DropoutBits::bytes(count));
    cpu::DropoutBits(1, 2, 30000).draw(start, count, bits.data());
    for (int64_t first = 0; first < 20; ++first) {
      test::for_each_vector_width([&] {
        cpu::run_widest([&](auto width) ALIGN_INLINE_LAMBDA { check_masked<width(), float>(bits, start, first, 128); });
      });
      check_masked<16, double>(bits, start, first, 128);
    }
  }
}

TEST(every_float16_and_bfloat16_survives_widening_and_narrowing) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float half = widen(float16{uint16_t(bits)}), brain = widen(bfloat16{uint16_t(bits)});
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    if (std::isnan(magnitude)) {
      CHECK(std::isnan(half) && std::isnan(widen(narrow<float16>(half))));
    } else {
      CHECK(double(half) == (bits & 0x8000 ? -magnitude : magnitude));
      CHECK(narrow<float16>(half).bits == bits);
    }
    if (std::isnan(brain)) {
      CHECK(std::isnan(widen(narrow<bfloat16>(brain))));
    } else {
      CHECK(narrow<bfloat16>(brain).bits == bits);
    }
  }
}

namespace {

// The nearest T to value, ties to even, found by trying both neighbours.
template <typename T>
void check_rounding(float value) {
  const uint16_t got = narrow<T>(value).bits;
  const double error = std::fabs(double(widen(T{got})) - value);
  for (int step : {-1, 1}) {
    const uint16_t neighbour = uint16_t(got + step);
    if ((neighbour ^ got) & 0x8000) continue;  // wrapped past zero
    const double other = std::fabs(double(widen(T{neighbour})) - value);
    CHECK(error < other || (error == other && got % 2 == 0) || std::isnan(other));
  }
}

}  // namespace

TEST(narrowing_rounds_to_nearest_even_and_overflows_to_infinity) {
  std::mt19937 generator(0);
  for (int i = 0; i < 200000; ++i) {
    const uint32_t mantissa = generator() & (i % 2 ? 0x807FFFFFu : 0x807FF000u);  // every other one near a tie
    const uint32_t exponent = 127 - 26 + generator() % 41;
    check_rounding<float16>(bit_cast<float>(mantissa | exponent << 23));
    check_rounding<bfloat16>(bit_cast<float>(uint32_t(generator() & 0xFFFF8000u) & 0xBFFFFFFFu));
  }
  CHECK(narrow<float16>(65519.f).bits == 0x7BFF && narrow<float16>(65520.f).bits == 0x7C00);
  CHECK(narrow<float16>(-1e9f).bits == 0xFC00 && narrow<float16>(0x1p-25f).bits == 0);
  CHECK(narrow<float16>(0x1.8p-25f).bits == 1 && narrow<bfloat16>(3.4e38f).bits == 0x7F80);
}

int main() { return check::run_tests(); }
