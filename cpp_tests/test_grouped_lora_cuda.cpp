// The CUDA kernels of grouped_lora, unmodified, under the SIMT engine: no error in any thread order, the numbers of
// naive loops in double, the same bits in every order, and the bytes of the data sheets.
#include <stdexcept>

#include "cuda/plan.h"
#include "grouped_lora_cuda.h"

using namespace align;
using namespace align::test;
using simt::Buffer;
using simt::Op;

namespace {

void check_all_types(const Problem& problem) {
  check_problem<float>(problem);
  check_problem<bfloat16>(problem);
  check_problem<float16>(problem);
}

constexpr int64_t kTwoSplits = 9 * 64 + 24;  // columns of ten tiles of 16-bit elements: two splits, with a tail

}  // namespace

TEST(a_tiny_case_gives_the_numbers_worked_out_by_hand) {
  for (int major : {7, 9}) {
    Data<float> data = tiny_data();
    simt::options().major = major;
    simt::reports().clear();
    run_cuda(kTinyProblem, data);
    CHECK(clean());
    check_tiny(data);
  }
}

TEST(without_tensor_cores_bfloat16_is_refused_and_float16_is_not) {
  check_problem<float16>({{20, 72, 40, 8, 1}, 0.3}, /*major=*/7);
  bool refused = false;
  try {
    check_problem<bfloat16>({{20, 72, 40, 8, 1}, 0.3}, /*major=*/7);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  CHECK(refused);
}

TEST(kernels_agree_with_naive_loops_for_every_padded_rank) {
  for (int64_t rank : {1, 8, 13, 16}) check_all_types({{150, 72, 136, rank, 1}, 0.3});
  for (int64_t rank : {17, 32, 33, 64}) check_all_types({{60, 72, 80, rank, 1}, 0.3});
  check_all_types({{20, 72, 40, 70, 2}, 0.3});  // two chunks of 64
}

TEST(kernels_agree_with_naive_loops_for_every_tail) {
  for (int64_t dim : {1, 7, 8, 31, 33, 63, 65, 129}) check_all_types({{9, dim, dim + 1, 5, 3}, 0.4});
  for (int64_t tokens : {1, 15, 16, 17, 127, 128, 129, 257}) check_all_types({{tokens, 24, 40, 8, 1}, 0.2});
}

// More tiles than twice the stages, several splits (split-K), two row tiles, more than one piece of the adapter matrix.
TEST(kernels_agree_with_naive_loops_where_columns_are_split) {
  for (int64_t rank : {8, 24}) {
    check_problem<bfloat16>({{140, kTwoSplits, kTwoSplits + 8, rank, 1}, 0.1});
    check_problem<float16>({{140, kTwoSplits, kTwoSplits + 8, rank, 1}, 0});
    check_problem<float>({{140, kTwoSplits / 2, kTwoSplits / 2 + 4, rank, 1}, 0.1});
  }
  check_problem<bfloat16>({{30, 3 * 128 + 8, 2 * 128 + 8, 40, 1}, 0.1});
}

TEST(groups_may_be_empty_interleaved_or_sorted) {
  for (bool permuted : {false, true}) {
    for (int64_t groups : {1, 2, 5, 25}) check_all_types({{70, 24, 40, 8, groups}, 0.25, permuted});
  }
  check_all_types({{300, 24, 40, 20, 3}, 0.25});  // groups of more than one row tile, in two passes
}

TEST(adapters_may_be_float_on_16_bit_inputs) {
  for (int64_t rank : {8, 20}) {
    check_problem<bfloat16, float>({{40, 72, 56, rank, 2}, 0.2});
    check_problem<float16, float>({{40, 71, 57, rank, 2}, 0.2});
  }
}

TEST(before_sm_80_ordinary_multiply_adds_do_the_same) {
  for (int64_t rank : {8, 20}) {
    check_problem<float>({{140, 72, 56, rank, 2}, 0.2}, 7);
    check_problem<float16>({{140, 72, 57, rank, 1}, 0.2}, 7);
    check_problem<float16>({{40, 320, 72, rank, 1}, 0.2}, 7);
  }
}

TEST(optional_gradients_may_be_absent) {
  for (double p : {0.0, 0.5}) check_all_types({{40, 50, 60, 8, 2}, p, true, /*gradients_in=*/false});
  Problem without_dx{{40, 50, 60, 8, 2}, 0.3};
  without_dx.dx_wanted = false;
  check_all_types(without_dx);
}

TEST(outputs_may_overwrite_what_they_add_to) {
  check_all_types({{45, 56, 72, 8, 2}, 0.3, true, true, /*in_place=*/true});
}

TEST(every_size_may_be_zero) {
  for (const GroupedLoraShape& shape : {GroupedLoraShape{0, 8, 8, 4, 2}, GroupedLoraShape{5, 0, 8, 4, 1},
                                        GroupedLoraShape{5, 8, 0, 4, 1}, GroupedLoraShape{5, 8, 8, 0, 1}}) {
    check_all_types({shape, 0.5});
    check_all_types({shape, 0, false});
  }
}

namespace {

template <typename T>
void check_every_order(const Problem& problem) {
  Data<T> data = make_data<T>(problem);
  const Expected want = expect(problem, data);
  std::vector<Data<T>> all;
  for_each_order([&] {
    simt::options().traffic = false;
    run_cuda(problem, data);
    check_results(problem, data, want);
    all.push_back(data);
  });
  for (const Data<T>& one : all) {
    CHECK(check::same_bits(one.z, all[0].z) && check::same_bits(one.dA, all[0].dA) &&
          check::same_bits(one.dB, all[0].dB));
    CHECK(std::memcmp(one.y.data(), all[0].y.data(), one.y.size() * sizeof(T)) == 0);
    CHECK(std::memcmp(one.dx.data(), all[0].dx.data(), one.dx.size() * sizeof(T)) == 0);
  }
}

}  // namespace

TEST(no_order_of_threads_makes_an_error_or_changes_a_bit) {
  for (const Problem& problem : {Problem{{140, kTwoSplits, 200, 8, 1}, 0.1}, Problem{{140, 72, 264, 24, 2}, 0.1}}) {
    check_every_order<bfloat16>(problem);
    check_every_order<float>(problem);
  }
  check_every_order<float16>({{20, 72, 264, 70, 1}, 0.1});
  Problem chunks{{530, 24, 40, 8, 3}, 0.1};
  chunks.group_rows = {513, 0, 17};
  check_every_order<bfloat16>(chunks);
}

TEST(group_rows_sorts_stably) {
  for (const auto& [tokens, groups] : {std::pair<int64_t, int64_t>{5, 5}, {700, 3}, {0, 2}, {256, 1}}) {
    std::vector<int64_t> group(tokens), want_rows(tokens), want_offsets(groups + 1);
    std::mt19937 generator(2);
    for (int64_t& k : group) k = int64_t(generator() % groups);
    cpu::group_rows(group.data(), tokens, groups, want_rows.data(), want_offsets.data());
    for_each_order([&, groups = groups, tokens = tokens] {
      const Buffer<int64_t> ids("group", group), rows("rows", tokens), offsets("offsets", groups + 1);
      cuda::group_rows(ids.data(), tokens, groups, rows.data(), offsets.data(), nullptr);
      CHECK(clean());
      CHECK(rows.host() == want_rows && offsets.host() == want_offsets);
    });
  }
}

TEST(a_group_number_out_of_range_stops_the_program) {
  for (int64_t bad : {-1, 3}) {
    const Buffer<int64_t> ids("group", std::vector<int64_t>{0, bad, 2}), rows("rows", 3), offsets("offsets", 4);
    simt::reports().clear();
    cuda::group_rows(ids.data(), 3, 3, rows.data(), offsets.data(), nullptr);
    CHECK(simt::reports().back().has(simt::ErrorKind::kTrap));
  }
}

TEST(offsets_that_do_not_cover_the_rows_stop_the_program) {
  for (const std::vector<int64_t>& bad : {std::vector<int64_t>{0, 5, 9}, {1, 5, 10}, {0, 11, 10}, {0, 5, 11}}) {
    const Problem problem{{10, 8, 8, 4, 2}, 0, false};
    Data<float> data = make_data<float>(problem);
    data.offsets = bad;
    simt::reports().clear();
    run_cuda(problem, data);
    CHECK(simt::reports().front().has(simt::ErrorKind::kTrap));
  }
}

// ---- The bytes

namespace {

template <typename T>
constexpr int64_t sectors(int64_t elements) {
  return elements * int64_t(sizeof(T)) / 32;
}

bool within(int64_t measured, int64_t formula, double factor = 1.03) {
  const bool ok = double(measured) <= factor * double(formula) && measured >= formula;
  if (!ok) std::printf("    %ld sectors, formula %ld\n", long(measured), long(formula));
  return ok;
}

// Sectors of all launches since reports() was cleared.
int64_t moved(Op op, const char* buffer) {
  int64_t total = 0;
  for (const simt::Report& report : simt::reports()) total += report.global(op, buffer).sectors;
  return total;
}

template <typename T>
void check_ledger(const Problem& problem) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = problem.shape;
  Data<T> data = make_data<T>(problem);
  simt::options() = {};
  simt::options().multiprocessors = 2;
  simt::reports().clear();
  run_cuda(problem, data);
  CHECK(clean());
  const cuda::Plan plan = cuda::plan(tokens, in_dim, out_dim, rank, groups, sizeof(T), {2, 9});
  // Streamed: x in shrink and again for dA; y; dy once or twice; dx.
  CHECK(within(moved(Op::kLoad, "x"), 2 * sectors<T>(tokens * in_dim)));
  CHECK(within(moved(Op::kLoad, "y_in"), sectors<T>(tokens * out_dim)));
  CHECK(within(moved(Op::kStore, "y"), sectors<T>(tokens * out_dim)));
  CHECK(within(moved(Op::kLoad, "dy"), (plan.one_pass ? 1 : 2) * sectors<T>(tokens * out_dim)));
  CHECK(within(moved(Op::kLoad, "dx_in"), sectors<T>(tokens * in_dim)));
  CHECK(within(moved(Op::kStore, "dx"), sectors<T>(tokens * in_dim)));
  // z, its partials, those of dz, and the sums of chunks of rows of dA and dB: written once.
  const int64_t latent = sectors<float>(tokens * rank), splits = plan.shrink.splits;
  const int64_t dz_partials = plan.one_pass ? cuda::sweep_blocks(out_dim, sizeof(T)) : plan.shrink_dy.splits;
  CHECK(within(moved(Op::kStore, "z"), latent));
  const int64_t chunks = cuda::outer_chunks(tokens, groups, rank), sums = cuda::outer_sums(tokens, groups, rank);
  const int64_t of_dA = sums * sectors<float>(rank * in_dim), of_dB = sums * sectors<float>(rank * out_dim);
  const int64_t of_latents = (splits > 1 ? splits : 0) + dz_partials + 1;
  CHECK(within(moved(Op::kStore, "partials"), of_latents * latent + 2 * of_dA + of_dB));  // dA: two stores a sector
  // Resident: A by the row tiles of shrink and of dx, B by those of expand and of shrink_dy or by the sweep's chunks of
  // rows.
  const int64_t tiles = cuda::row_tiles(tokens, groups);
  CHECK(within(moved(Op::kLoad, "A"), 2 * tiles * sectors<T>(rank * in_dim)));
  CHECK(within(moved(Op::kLoad, "B"), (tiles + (plan.one_pass ? chunks : tiles)) * sectors<T>(rank * out_dim)));
  // Latent rows: z by the blocks of columns of dy, dz by those of x and by the splits of dx; partials by whoever adds
  // them.
  const int64_t of_x = cuda::outer_blocks(in_dim, sizeof(T)),
                of_dy = plan.one_pass ? cuda::sweep_blocks(out_dim, sizeof(T)) : cuda::outer_blocks(out_dim, sizeof(T));
  const int64_t z_reads = of_dy + (splits > 1 ? 0 : plan.expand.splits),
                z_partials = splits > 1 ? splits * (plan.expand.splits + 1) : 0;
  CHECK(within(moved(Op::kLoad, "z"), z_reads * latent));
  CHECK(within(moved(Op::kLoad, "partials"),
               (z_partials + dz_partials + of_x + plan.expand_dx.splits) * latent + of_dA + of_dB));
  for (const simt::Report& report : simt::reports()) CHECK(report.global(Op::kAtomic).requests == 0);
}

}  // namespace

TEST(streamed_operands_move_as_often_as_they_must) {
  for (int64_t rank : {8, 32}) {
    check_ledger<bfloat16>({{256, 1024, 512, rank, 1}, 0.1, false});
    check_ledger<float>({{256, 512, 256, rank, 1}, 0, false});
  }
  check_ledger<bfloat16>({{1152, 256, 384, 8, 1}, 0.1, false});  // three chunks of rows
}

int main() { return check::run_tests(); }
