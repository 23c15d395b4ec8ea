// How the projection kernels' work is cut: pure functions, so that a plan that always falls back fails here.
#include "check.h"
#include "cuda/plan.h"

using namespace align::cuda;

namespace {

constexpr Device kH100 = {132, 9, 227 << 10}, kA100 = {108, 8, 163 << 10}, kRtx4090 = {128, 8, 99 << 10};
constexpr Device kT4 = {40, 7, 64 << 10};
constexpr int64_t kHalf = 2, kFloat = 4;

// A layer of a model of 3 billion parameters.
Plan wide(int64_t rank, int64_t element_bytes, const Device& device, int64_t tokens = 8192) {
  return plan(tokens, 4096, 11008, rank, 1, element_bytes, device);
}

}  // namespace

TEST(a_grid_is_refused_where_the_hardware_has_no_numbers_for_it) {
  const auto refused = [](int64_t x, int64_t y, int64_t z) {
    try {
      const Grid grid(x, y, z);
      return grid.x != x || grid.y != y || grid.z != z;  // a grid that is another one
    } catch (const std::length_error&) {
      return true;
    }
  };
  CHECK(!refused((int64_t(1) << 31) - 1, 65535, 65535));
  CHECK(refused(int64_t(1) << 31, 1, 1) && refused((int64_t(1) << 32) + 1, 1, 1));
  CHECK(refused(1, 65536, 1) && refused(1, 1, 65536) && refused(1, (int64_t(1) << 32) + 1, 1));
}

TEST(sixteen_bits_take_tensor_cores_from_sm_80_on) {
  for (const Device& device : {kH100, kA100, kRtx4090}) CHECK(wide(8, kHalf, device).tensor_cores);
  CHECK(!wide(8, kHalf, kT4).tensor_cores);
  CHECK(!wide(8, kFloat, kH100).tensor_cores);
}

TEST(ranks_are_padded_as_little_as_the_kernels_allow) {
  const auto padded = [](int64_t rank, int64_t bytes, const Device& device) {
    return wide(rank, bytes, device).padded_rank;
  };
  for (int64_t bytes : {kHalf, kFloat}) {
    CHECK(padded(1, bytes, kH100) == 16 && padded(16, bytes, kH100) == 16 && padded(17, bytes, kH100) == 32);
    CHECK(padded(32, bytes, kH100) == 32 && padded(33, bytes, kH100) == 64 && padded(200, bytes, kH100) == 64);
    CHECK(padded(200, bytes, kT4) == 16);
  }
  CHECK(padded(64, kHalf, kRtx4090) == 64 && padded(64, kFloat, kRtx4090) == 32);
  CHECK(wide(64, kHalf, kH100).rank_chunks == 1 && wide(65, kHalf, kH100).rank_chunks == 2);
  CHECK(wide(64, kHalf, kT4).rank_chunks == 4 && wide(0, kHalf, kH100).rank_chunks == 0);
}

// 8 rank bytes of partials, written and read, against 256 bytes of a second read of dy.
TEST(dy_is_read_once_where_its_parts_are_smaller_than_a_second_read) {
  for (const Device& device : {kH100, kA100, kRtx4090}) {
    CHECK(wide(8, kHalf, device).one_pass && wide(16, kFloat, device).one_pass);
    CHECK(plan(1, 8, 1, 8, 1 << 16, kHalf, device).one_pass);  // a single block of columns, any groups
    CHECK(!wide(32, kHalf, device).one_pass && !wide(64, kFloat, device).one_pass);
  }
  CHECK(!wide(8, kHalf, kT4).one_pass);
  CHECK(!plan(8192, 4096, 0, 8, 1, kHalf, kH100).one_pass);
}

TEST(a_long_batch_needs_no_split_and_a_short_one_is_split_to_fill_the_device) {
  CHECK(wide(8, kHalf, kH100, 1 << 16).shrink.splits == 1);
  const Plan decode = wide(8, kHalf, kH100, 1);
  CHECK(decode.shrink.splits == kMaxShrinkSplits);
  CHECK(decode.expand.splits > decode.shrink.splits && decode.expand.split_tiles >= kMinSplitTiles);
  for (int64_t tokens : {1, 128, 2048, 8192, 1 << 16}) {
    const Plan p = wide(8, kHalf, kH100, tokens);
    const int64_t blocks = row_tiles(tokens, 1) * p.expand.splits;
    CHECK(blocks >= 132 || p.expand.split_tiles <= 2 * kMinSplitTiles);
  }
}

// Every column in just one split, no split empty.
TEST(splits_cover_the_columns_once) {
  for (int64_t bytes : {kHalf, kFloat}) {
    for (int64_t cols : {0, 1, 63, 64, 65, 255, 256, 257, 512, 576, 1000, 4096, 11008}) {
      for (int64_t rows : {1, 3, 16, 500}) {
        for (int64_t limit : {int64_t(1), kMaxShrinkSplits, int64_t(1) << 15}) {
          const Cut cut = cut_columns(cols, bytes, rows, limit, kH100);
          const int64_t tiles = ceil_div(cols * bytes, kTileBytes);
          CHECK(cut.splits >= 1 && cut.splits <= limit && cut.splits <= 65535);
          CHECK(cut.splits * cut.split_tiles >= tiles &&
                (cut.splits - 1) * cut.split_tiles < std::max<int64_t>(tiles, 1));
        }
      }
    }
  }
}

// 264 blocks of 26 tiles would leave the busiest multiprocessor 78 of 8192 tiles; 256 blocks of 32 leave it 64.
TEST(no_multiprocessor_waits_long_for_the_busiest) {
  for (int64_t cols : {3072, 4096, 8192, 11008}) {
    for (int64_t rows : {32, 64, 100, 200, 512}) {
      const Cut cut = cut_columns(cols, kHalf, rows, int64_t(1) << 15, kH100);
      const double busiest = double(ceil_div(rows * cut.splits, 132) * cut.split_tiles);
      CHECK(busiest <= 1.2 * double(rows * ceil_div(cols * kHalf, kTileBytes)) / 132);
    }
  }
  CHECK(cut_columns(8192, kHalf, 64, int64_t(1) << 15, kH100).splits == 4);
}

TEST(row_tiles_are_enough_for_any_groups) {
  CHECK(row_tiles(0, 5) == 0 && row_tiles(1, 1) == 1 && row_tiles(128, 1) == 1 && row_tiles(129, 1) == 2);
  for (int64_t first : {0, 1, 127, 128, 129, 300}) {
    for (int64_t second : {0, 1, 128, 255}) {
      const int64_t needed = ceil_div(first, kTileRows) + ceil_div(second, kTileRows);
      CHECK(row_tiles(first + second, 2) >= needed);
    }
  }
}

// Partial sums, written and read, are to be few bytes beside a token matrix of 16 bits.
TEST(rows_are_cut_into_chunks_by_sizes_alone) {
  CHECK(outer_rows(1) == 512 && outer_rows(16) == 512 && outer_rows(17) == 1024 && outer_rows(32) == 1024);
  CHECK(outer_rows(33) == 2048 && outer_rows(1000) == 2048);
  for (int64_t rank : {8, 16, 32, 64}) CHECK(4 * rank * 16 <= 2 * outer_rows(rank));
  for (int64_t rank : {8, 20, 64}) {
    const int64_t rows = outer_rows(rank);
    CHECK(outer_chunks(0, 1, rank) == 1 && outer_chunks(1, 1, rank) == 1 && outer_chunks(rows, 1, rank) == 1);
    CHECK(outer_chunks(rows + 1, 1, rank) == 2 && outer_chunks(8 * rows, 1, rank) == 8);
    CHECK(outer_chunks(0, 0, rank) == 0 && outer_chunks(0, 5, rank) == 5 && outer_chunks(rows + 1, 5, rank) == 6);
    CHECK(outer_sums(0, 5, rank) == 0 && outer_sums(rows, 5, rank) == 0 && outer_sums(rows + 1, 5, rank) == 6);
  }
}

TEST(outer_blocks_own_256_bytes_of_columns_and_those_of_the_sweep_512_of_16_bits) {
  CHECK(outer_blocks(0, kHalf) == 0 && outer_blocks(1, kHalf) == 1 && outer_blocks(128, kHalf) == 1);
  CHECK(outer_blocks(129, kHalf) == 2 && outer_blocks(65, kFloat) == 2);
  CHECK(sweep_blocks(0, kHalf) == 0 && sweep_blocks(256, kHalf) == 1 && sweep_blocks(257, kHalf) == 2);
  CHECK(sweep_blocks(64, kFloat) == 1 && sweep_blocks(65, kFloat) == 2);
}

int main() { return check::run_tests(); }
