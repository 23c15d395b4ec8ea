// The CUDA kernels of gaussian_kl, unmodified, under the SIMT engine: no error in any thread order, the numbers of the
// CPU kernels, the same bits in every order, and the bytes of the data sheet.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "ops/gaussian_kl.h"
#include "simt_support.h"
#include "support.h"

using namespace align;
using simt::Buffer;
using simt::Op;

namespace {

struct Problem {
  int64_t tokens, rank, tasks;
  int ddof = 0;
  bool mean_pairs = false;
};

constexpr double kEps = 1e-6;
constexpr float kLossGradient = 0.7f;

template <typename T>
struct Data {
  std::vector<T> z;
  std::vector<int64_t> task;
};

struct Results {
  std::vector<float> moments, loss, tables;
  std::vector<double> dz;
};

// Ids run from -2 to tasks + 1, so that some tokens do not count; task 3 is empty and task 2 has one token at most.
template <typename T>
Data<T> make_data(const Problem& problem) {
  Data<T> data{test::random_values<T>(problem.tokens * problem.rank, 12), {}};
  std::mt19937 generator(11);
  bool task_2_seen = false;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    int64_t id = int64_t(generator() % (problem.tasks + 4)) - 2;
    if (id == 3 || (id == 2 && task_2_seen)) id = 0;
    task_2_seen |= id == 2;
    data.task.push_back(id);
    for (int64_t d = 0; d < problem.rank; ++d) {
      T& z = data.z[t * problem.rank + d];
      z = narrow<T>(widen(z) * (1 + 0.3f * float(id)) + 0.2f * float(id) * float(d % 3));
    }
  }
  return data;
}

template <typename T>
Results run_cpu(const Problem& problem, const Data<T>& data) {
  const auto [tokens, rank, tasks, ddof, mean_pairs] = problem;
  std::vector<char> workspace(cpu::task_moments_workspace<T>(tokens, rank, tasks));
  Results results;
  results.moments.resize(tasks * (2 * rank + 1));
  results.loss.resize(1);
  results.tables.resize(tasks * 3 * rank);
  std::vector<T> dz(tokens * rank);
  cpu::task_moments<T>(
      {tokens, rank, tasks, data.z.data(), data.task.data(), results.moments.data(), workspace.data()});
  cpu::gaussian_kl_tables<float>(
      {1, rank, tasks, kEps, ddof, mean_pairs, results.moments.data(), results.loss.data(), results.tables.data()});
  cpu::gaussian_kl_backward<T>(
      {tokens, rank, tasks, data.z.data(), data.task.data(), results.tables.data(), &kLossGradient, dz.data()});
  results.dz = test::to_double(dz);
  return results;
}

// Results start uninitialised: what a kernel fails to write it must not read, and comes back as NaN.
template <typename T>
Results run_cuda(const Problem& problem, const Data<T>& data) {
  const auto [tokens, rank, tasks, ddof, mean_pairs] = problem;
  const Buffer<T> z("z", data.z), dz("dz", data.z.size());
  const Buffer<int64_t> task("task", data.task);
  const Buffer<char> workspace("workspace", cuda::task_moments_workspace<T>(tokens, rank, tasks));
  const Buffer<float> moments("moments", tasks * (2 * rank + 1)), loss("loss", 1), tables("tables", tasks * 3 * rank);
  const Buffer<float> d_loss("d_loss", std::vector<float>{kLossGradient});
  cuda::task_moments<T>({tokens, rank, tasks, z.data(), task.data(), moments.data(), workspace.data()}, nullptr);
  cuda::gaussian_kl_tables<float>({1, rank, tasks, kEps, ddof, mean_pairs, moments.data(), loss.data(), tables.data()},
                                  nullptr);
  cuda::gaussian_kl_backward<T>({tokens, rank, tasks, z.data(), task.data(), tables.data(), d_loss.data(), dz.data()},
                                nullptr);
  return {moments.host(), loss.host(), tables.host(), test::to_double(dz.host())};
}

template <typename Values>
double largest(const Values& values) {
  double most = 0;
  for (double v : values) most = std::max(most, std::fabs(v));
  return most;
}

// Both sides add in float, in different orders: some units in the last place of the largest value.
template <typename T>
void check_problem(const Problem& problem, int orders = 3) {
  const Data<T> data = make_data<T>(problem);
  const Results want = run_cpu(problem, data);
  const double close = 64 * test::kEpsilon<float>;
  const int64_t before = check::failures();
  Results first;
  test::for_each_order(
      [&] {
        const Results got = run_cuda(problem, data);
        CHECK(test::clean());
        CHECK_CLOSE(got.moments, want.moments, close * largest(want.moments));
        CHECK_CLOSE(got.loss, want.loss, close * largest(want.loss));
        CHECK_CLOSE(got.tables, want.tables, close * largest(want.tables));
        CHECK_CLOSE(got.dz, want.dz, (close + test::kEpsilon<T>)*largest(want.dz));
        if (first.loss.empty()) first = got;
        CHECK(check::same_bits(got.moments, first.moments) && check::same_bits(got.tables, first.tables));
        CHECK(check::same_bits(got.loss, first.loss) && check::same_bits(got.dz, first.dz));
      },
      orders);
  if (check::failures() != before) {
    std::printf("    tokens %ld rank %ld tasks %ld ddof %d\n", long(problem.tokens), long(problem.rank),
                long(problem.tasks), problem.ddof);
  }
}

}  // namespace

TEST(cuda_kernels_agree_with_cpu_kernels_for_every_type) {
  for (const Problem& problem : {Problem{600, 8, 5}, Problem{300, 33, 4, 1}}) {
    check_problem<float>(problem);
    check_problem<bfloat16>(problem);
    check_problem<float16>(problem);
  }
}

TEST(tails_of_rows_ranks_and_tasks_are_covered) {
  for (int64_t tokens : {1, 255, 256, 257}) check_problem<float>({tokens, 5, 3});
  for (int64_t rank : {1, 2, 31, 32, 70, 130}) check_problem<float>({100, rank, 3, 0, true}, 2);
  for (int64_t tasks : {16, 17, 40}) check_problem<float>({520, 3, tasks, 1, true}, 2);
}

TEST(empty_tasks_and_no_tokens_give_zeros) {
  for (const Problem& problem : {Problem{0, 4, 3}, Problem{20, 4, 1}, Problem{5, 0, 2}, Problem{9, 4, 0}}) {
    check_problem<float>(problem);
    const Results results = run_cuda(problem, make_data<float>(problem));
    CHECK(largest(results.loss) == 0 && largest(results.tables) == 0 && largest(results.dz) == 0);
  }
}

// Forward reads z twice (means, then differences) and task once; backward reads z and writes dz, once each.
TEST(z_and_dz_move_as_often_as_they_must) {
  const Problem problem{1024, 32, 4};
  simt::options() = {};
  simt::reports().clear();
  Data<float> data = make_data<float>(problem);
  for (int64_t& id : data.task) id = std::clamp<int64_t>(id, 0, problem.tasks - 1);  // all tokens count
  run_cuda(problem, data);
  CHECK(test::clean());
  CHECK(simt::reports().size() == 4);
  const auto sectors = [](int launch, Op op, const char* buffer) {
    return simt::reports()[launch].global(op, buffer).sectors;
  };
  const int64_t z_sectors = problem.tokens * problem.rank * int64_t(sizeof(float)) / 32;
  CHECK(sectors(0, Op::kLoad, "z") == 2 * z_sectors);
  CHECK(sectors(0, Op::kLoad, "task") == problem.tokens * int64_t(sizeof(int64_t)) / 32);
  CHECK(sectors(1, Op::kLoad, "z") == 0);
  CHECK(sectors(3, Op::kLoad, "z") == z_sectors && sectors(3, Op::kStore, "dz") == z_sectors);
  for (const simt::Report& report : simt::reports()) CHECK(report.global(Op::kAtomic).requests == 0);
}

int main() { return check::run_tests(); }
