// The CUDA kernels of mk_mmd, unmodified, under the SIMT engine: no error in any thread order, the numbers of the CPU
// kernels, the same bits in every order, and the bytes of the data sheet.
#include "mk_mmd_problem.h"
#include "simt_support.h"

using namespace align;
using simt::Buffer;
using simt::Op;
using test::MmdData;
using test::MmdProblem;
using test::MmdResults;

namespace {

// Results start uninitialised: what a kernel fails to write it must not read, and comes back as NaN.
template <typename T>
MmdResults run_cuda(const MmdProblem& problem, const MmdData<T>& data) {
  const int64_t layers = problem.layers();
  const Buffer<T> z("z", data.z), dz("dz", layers * problem.tokens * problem.rank);
  const Buffer<int64_t> task("task", data.task);
  const Buffer<float> loss("loss", layers), gradient("gradient", layers * problem.rows() * problem.rank);
  const Buffer<int32_t> slot("slot", problem.tokens);
  const Buffer<float> d_loss("d_loss", std::vector<float>(layers, test::kMmdLossGradient));
  test::MmdCall<T> call(problem, z.data(), task.data(), loss.data(), gradient.data(), slot.data());
  const Buffer<char> workspace("workspace", cuda::mk_mmd_workspace(call.args));
  call.args.workspace = workspace.data();
  cuda::mk_mmd(call.args, nullptr);
  cuda::mk_mmd_backward(test::mmd_backward_args<T>(problem, gradient.data(), slot.data(), d_loss.data(), dz.data()),
                        nullptr);
  const auto slots = slot.host();
  return {test::to_double(loss.host()), test::to_double(gradient.host()),
          std::vector<double>(slots.begin(), slots.end()), test::to_double(dz.host())};
}

// Both sides add in float, in different orders: some units in the last place of the largest value.
template <typename T>
void check_problem(const MmdProblem& problem, int orders = 3) {
  const MmdData<T> data = test::make_mmd_data<T>(problem);
  const MmdResults want = test::run_mmd_cpu(problem, data);
  const double close = 32 * test::kEpsilon<float>;
  const int64_t before = check::failures();
  MmdResults first;
  test::for_each_order(
      [&] {
        simt::options().traffic = false;
        const MmdResults got = run_cuda(problem, data);
        CHECK(test::clean());
        CHECK(got.slot == want.slot);
        CHECK_CLOSE(got.loss, want.loss, 4 * test::kEpsilon<float> * problem.kernels().count);
        CHECK_CLOSE(got.gradient, want.gradient, close * test::largest(want.gradient));
        CHECK_CLOSE(got.dz, want.dz, (close + test::kEpsilon<T>)*test::largest(want.dz));
        if (first.loss.empty()) first = got;
        CHECK(got.same_bits(first));
      },
      orders);
  if (check::failures() != before) {
    std::printf("    tokens %ld rank %ld tasks %ld n_max %ld\n", long(problem.tokens), long(problem.rank),
                long(problem.tasks), long(problem.n_max));
  }
}

}  // namespace

TEST(cuda_kernels_agree_with_cpu_kernels_for_every_type) {
  for (const MmdProblem& problem : {MmdProblem{150, 8, 4, 40}, MmdProblem{90, 33, 3}}) {
    check_problem<float>(problem);
    check_problem<bfloat16>(problem);
    check_problem<float16>(problem);
  }
}

TEST(options_agree_with_cpu_kernels) {
  for (bool u_statistic : {false, true}) {
    check_problem<float>({80, 5, 3, 256, u_statistic, true}, 2);
    check_problem<float>({80, 5, 3, 256, u_statistic, false, {1, 2, 4, 3, 64, 8, 16, 32}}, 2);
  }
}

TEST(tails_of_rows_ranks_and_tasks_are_covered) {
  for (int64_t tokens : {5, 63, 64, 65, 256, 257}) check_problem<float>({tokens, 3, 2, 40}, 2);
  for (int64_t rank : {1, 2, 15, 16, 17, 64, 65, 130}) check_problem<float>({70, rank, 2}, 2);
  for (int64_t tasks : {7, 8, 9, 40}) check_problem<float>({300, 3, tasks, 12}, 2);
}

TEST(nobody_to_compare_gives_zeros) {
  for (const MmdProblem& problem :
       {MmdProblem{0, 4, 3}, MmdProblem{20, 4, 1}, MmdProblem{5, 0, 2}, MmdProblem{1, 4, 2}}) {
    check_problem<float>(problem);
    const MmdResults results = run_cuda(problem, test::make_mmd_data<float>(problem));
    CHECK(test::largest(results.loss) == 0 && test::largest(results.gradient) == 0 && test::largest(results.dz) == 0);
  }
}

TEST(layers_of_one_call_have_the_bits_that_they_have_alone) {
  MmdProblem few{70, 20, 3}, many{16, 3, 5};
  few.ranks = {20, 3, 20};
  many.ranks.assign(241, 3);  // one block takes all splits of a tile, and the last layer is in a launch of its own
  for (const MmdProblem& problem : {few, many}) {
    simt::options() = {};
    simt::reports().clear();
    const MmdData<float> data = test::make_mmd_data<float>(problem);
    const MmdResults together = run_cuda(problem, data);
    CHECK(test::clean());
    CHECK(simt::reports().size() == (problem.layers() > 240 ? 3 + 2 * 4 + 1 : 3 + 4 + 1));
    for (int64_t layer : {int64_t(0), problem.layers() - 1}) {
      const auto [one, of_layer] = test::alone(problem, data, layer);
      CHECK(test::layer_of(problem, together, layer).same_bits(run_cuda(one, of_layer)));
    }
  }
  // The bandwidth of a layer of smaller rank is added up by as many lanes as the largest has: other roundings.
  const MmdData<float> data = test::make_mmd_data<float>(few);
  const auto [one, of_layer] = test::alone(few, data, 1);
  const MmdResults got = test::layer_of(few, run_cuda(few, data), 1), want = run_cuda(one, of_layer);
  CHECK_CLOSE(got.loss, want.loss, 1e-6);
  CHECK_CLOSE(got.dz, want.dz, 1e-6 * test::largest(want.dz));
}

// Forward reads task twice (count, choice), z once where it takes part, and writes slot once; backward reads slot and
// writes dz once. All tokens take part here.
TEST(bytes_move_as_often_as_they_must) {
  const MmdProblem problem{256, 64, 4};
  simt::options() = {};
  simt::reports().clear();
  MmdData<float> data = test::make_mmd_data<float>(problem);
  for (int64_t t = 0; t < problem.tokens; ++t) data.task[t] = t % problem.tasks;
  run_cuda(problem, data);
  CHECK(test::clean());
  CHECK(simt::reports().size() == 8);  // seven forward, one backward
  const auto sectors = [](Op op, const char* buffer) {
    int64_t sum = 0;
    for (const simt::Report& report : simt::reports()) sum += report.global(op, buffer).sectors;
    return sum;
  };
  const int64_t rows_sectors = problem.tokens * problem.rank * int64_t(sizeof(float)) / 32;
  CHECK(sectors(Op::kLoad, "z") == rows_sectors);
  CHECK(sectors(Op::kLoad, "task") == 2 * problem.tokens * int64_t(sizeof(int64_t)) / 32);
  CHECK(sectors(Op::kStore, "slot") == problem.tokens * int64_t(sizeof(int32_t)) / 32);
  CHECK(sectors(Op::kStore, "gradient") == rows_sectors && sectors(Op::kLoad, "gradient") == rows_sectors);
  CHECK(sectors(Op::kStore, "dz") == rows_sectors);
  // Eight tiles of 32 rows, each by blocks of a split of one tile: two tiles a pair, and who is in them.
  CHECK(simt::reports()[5].global(Op::kLoad, "workspace").sectors <= 1.2 * 2 * 8 * rows_sectors);
  for (const simt::Report& report : simt::reports()) CHECK(report.global(Op::kAtomic).requests == 0);
}

int main() { return check::run_tests(); }
