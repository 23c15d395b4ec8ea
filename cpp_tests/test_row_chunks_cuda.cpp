// Outer products (dA, dB) of many rows, which blocks compute a chunk of rows each, under the SIMT engine.
#include <random>

#include "cuda/plan.h"
#include "cuda/row_tile.cuh"
#include "grouped_lora_cuda.h"

using namespace align;
using namespace align::test;

// Chunks of all groups have numbers of their own, below outer_chunks.
TEST(chunks_of_rows_are_numbered_for_any_groups) {
  std::mt19937 generator(5);
  for (int trial = 0; trial < 2000; ++trial) {
    const int64_t rank = 8, rows = cuda::outer_rows(rank), groups = 1 + generator() % 6;
    int64_t begin = 0, next = 0;
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t whole = int64_t(generator() % 4) * rows, tail = int64_t(generator() % 3) - 1;
      const int64_t count = std::max<int64_t>(whole + tail, 0);
      const int64_t first = cuda::first_chunk(int(begin), int(k), int(rows));
      const int64_t chunks = cuda::count_chunks(int(count), int(rows));
      CHECK(first >= next && chunks == std::max<int64_t>((count + rows - 1) / rows, 1));
      begin += count, next = first + chunks;
    }
    CHECK(next <= cuda::outer_chunks(begin, groups, rank));
  }
}

TEST(kernels_agree_with_naive_loops_where_rows_are_cut_into_chunks) {
  for (int64_t tokens : {511, 512, 513, 1025}) check_problem<bfloat16>({{tokens, 24, 40, 8, 1}, 0.2});
  check_problem<float>({{513, 20, 36, 5, 1}, 0.2});
  check_problem<float16>({{1024, 136, 9, 16, 1}, 0.2});
  check_problem<bfloat16>({{1025, 24, 40, 20, 1}, 0.2});             // two passes over dy
  check_problem<bfloat16, float>({{2049, 16, 8, 70, 1}, 0.2});       // chunks of ranks
  check_problem<float16>({{600, 24, 40, 20, 1}, 0.2}, /*major=*/7);  // and of 16
}

// Groups of no, one and many rows, whose chunks begin anywhere in group order.
TEST(chunks_of_rows_stay_within_a_group) {
  bool permuted = true;
  for (const std::vector<int64_t>& rows :
       std::vector<std::vector<int64_t>>{{0, 513}, {512, 0, 1}, {1, 512, 512, 0}, {511, 2, 600, 1}, {1024, 0, 3, 0}}) {
    int64_t tokens = 0;
    for (int64_t count : rows) tokens += count;
    Problem problem{{tokens, 24, 40, 8, int64_t(rows.size())}, 0.2, permuted};
    problem.group_rows = rows;
    check_problem<bfloat16>(problem);
    permuted = !permuted;
  }
  Problem problem{{1100, 24, 20, 20, 4}, 0.2};
  problem.group_rows = {1, 1025, 0, 74};
  check_problem<float>(problem);
}

namespace {

template <typename T>
Data<T> run_on(int multiprocessors, const Problem& problem) {
  Data<T> data = make_data<T>(problem);
  simt::options() = {};
  simt::options().multiprocessors = multiprocessors;
  simt::options().traffic = false;
  simt::reports().clear();
  run_cuda(problem, data);
  CHECK(clean());
  return data;
}

}  // namespace

// Where columns are too few to be split, which depends on the device.
TEST(every_device_computes_the_same_bits) {
  Problem problem{{570, 72, 136, 8, 3}, 0.1};
  problem.group_rows = {5, 565, 0};
  const Data<bfloat16> one = run_on<bfloat16>(1, problem);
  for (int multiprocessors : {4, 132}) {
    const Data<bfloat16> more = run_on<bfloat16>(multiprocessors, problem);
    CHECK(check::same_bits(more.dA, one.dA) && check::same_bits(more.dB, one.dB));
    CHECK(check::same_bits(more.z, one.z) && check::same_bits(more.dx, one.dx) && check::same_bits(more.y, one.y));
  }
}

// The gradient of many rows is the sum of those of its chunks, to the bit, if they are added from the first on.
TEST(chunks_are_added_in_order) {
  const int64_t rows = cuda::outer_rows(8), in_dim = 24, out_dim = 40;
  const Problem whole{{2 * rows + 70, in_dim, out_dim, 8, 1}};
  const Data<float> data = run_on<float>(4, whole);
  std::vector<float> dA(data.dA.size()), dB(data.dB.size());
  for (int64_t first = 0; first < whole.shape.tokens; first += rows) {
    const int64_t count = std::min(rows, whole.shape.tokens - first);
    Data<float> part = data;
    const auto cut = [&](std::vector<float>& v, int64_t cols) {
      v = {v.begin() + first * cols, v.begin() + (first + count) * cols};
    };
    cut(part.x, in_dim), cut(part.dx_in, in_dim), cut(part.dy, out_dim), cut(part.y_in, out_dim), cut(part.dz_in, 8);
    part.rows.resize(count), part.offsets = {0, count};
    Problem problem = whole;
    problem.shape.tokens = count;
    run_cuda(problem, part);
    for (size_t e = 0; e < dA.size(); ++e) dA[e] += part.dA[e];
    for (size_t e = 0; e < dB.size(); ++e) dB[e] += part.dB[e];
  }
  CHECK(check::same_bits(data.dA, dA) && check::same_bits(data.dB, dB));
}

int main() { return check::run_tests(); }
