// The CUDA kernels of gaussian_kl, unmodified, under the SIMT engine: no error in any thread order, the numbers of the
// CPU kernels, the same bits in every order, and the bytes of the data sheet.
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "check.h"
#include "ops/gaussian_kl.h"
#include "simt_support.h"
#include "support.h"

using namespace align;
using simt::Buffer;
using simt::Op;

namespace {

struct Problem {
  int64_t tokens;
  std::vector<int64_t> ranks;  // of the layers
  int64_t tasks;
  int ddof = 0;
  bool mean_pairs = false;

  int64_t layers() const { return int64_t(ranks.size()); }
  int64_t rank() const { return *std::max_element(ranks.begin(), ranks.end()); }
  int64_t moments() const { return layers() * tasks * (2 * rank() + 1); }
  int64_t tables() const { return layers() * tasks * 3 * rank(); }
  int64_t dz_stride() const { return tokens * rank() + 3; }
};

constexpr double kEps = 1e-6;
constexpr float kLossGradient = 0.7f;
constexpr double kScale = 1.5;

template <typename T>
struct Data {
  std::vector<std::vector<T>> z;
  std::vector<int64_t> task;
};

struct Results {
  std::vector<float> moments, loss, tables;
  std::vector<double> dz;
};

// Ids run from -2 to tasks + 1, so that some tokens do not count; task 3 is empty and task 2 has one token at most.
template <typename T>
Data<T> make_data(const Problem& problem) {
  Data<T> data;
  std::mt19937 generator(11);
  bool task_2_seen = false;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    int64_t id = int64_t(generator() % (problem.tasks + 4)) - 2;
    if (id == 3 || (id == 2 && task_2_seen)) id = 0;
    task_2_seen |= id == 2;
    data.task.push_back(id);
  }
  for (int64_t rank : problem.ranks) {
    std::vector<T> z = test::random_values<T>(problem.tokens * rank, 12 + data.z.size());
    for (int64_t e = 0; e < problem.tokens * rank; ++e) {
      const float id = float(data.task[e / rank]);
      z[e] = narrow<T>(widen(z[e]) * (1 + 0.3f * id) + 0.2f * id * float(e % rank % 3));
    }
    data.z.push_back(z);
  }
  return data;
}

// The layers' dz one after the other, without what lies between them.
template <typename T>
std::vector<double> gather(const Problem& problem, const std::vector<T>& dz) {
  std::vector<T> all;
  for (int64_t layer = 0; layer < problem.layers(); ++layer) {
    const auto begin = dz.begin() + layer * problem.dz_stride();
    all.insert(all.end(), begin, begin + problem.tokens * problem.ranks[layer]);
  }
  return test::to_double(all);
}

template <typename T>
Results run_cpu(const Problem& problem, const Data<T>& data) {
  std::vector<const T*> z;
  for (const auto& layer : data.z) z.push_back(layer.data());
  const int64_t layers = problem.layers(), rank = problem.rank(), tasks = problem.tasks;
  const Latents<T> latents{layers, problem.tokens, rank, z.data(), problem.ranks.data(), data.task.data()};
  std::vector<char> workspace(cpu::task_moments_workspace(latents, tasks));
  Results results;
  results.moments.resize(problem.moments());
  results.loss.resize(layers);
  results.tables.resize(problem.tables());
  std::vector<T> dz(layers * problem.dz_stride());
  cpu::task_moments<T>({latents, tasks, results.moments.data(), workspace.data()});
  cpu::gaussian_kl_tables<float>({layers, rank, tasks, kEps, problem.ddof, problem.mean_pairs, results.moments.data(),
                                  results.loss.data(), results.tables.data()});
  cpu::gaussian_kl_backward<T>(
      {latents, tasks, results.tables.data(), &kLossGradient, kScale, dz.data(), problem.dz_stride()});
  results.dz = gather(problem, dz);
  return results;
}

// Results start uninitialised: what a kernel fails to write it must not read, and comes back as NaN.
template <typename T>
Results run_cuda(const Problem& problem, const Data<T>& data) {
  std::vector<std::unique_ptr<Buffer<T>>> buffers;
  std::vector<const T*> z;
  for (const auto& layer : data.z) {
    buffers.push_back(std::make_unique<Buffer<T>>("z", layer));
    z.push_back(buffers.back()->data());
  }
  const int64_t layers = problem.layers(), rank = problem.rank(), tasks = problem.tasks;
  const Buffer<int64_t> task("task", data.task);
  const Latents<T> latents{layers, problem.tokens, rank, z.data(), problem.ranks.data(), task.data()};
  const Buffer<char> workspace("workspace", cuda::task_moments_workspace(latents, tasks));
  const Buffer<float> moments("moments", problem.moments()), loss("loss", layers), tables("tables", problem.tables());
  const Buffer<float> d_loss("d_loss", std::vector<float>{kLossGradient});
  const Buffer<T> dz("dz", layers * problem.dz_stride());
  cuda::task_moments<T>({latents, tasks, moments.data(), workspace.data()}, nullptr);
  cuda::gaussian_kl_tables<float>(
      {layers, rank, tasks, kEps, problem.ddof, problem.mean_pairs, moments.data(), loss.data(), tables.data()},
      nullptr);
  cuda::gaussian_kl_backward<T>({latents, tasks, tables.data(), d_loss.data(), kScale, dz.data(), problem.dz_stride()},
                                nullptr);
  return {moments.host(), loss.host(), tables.host(), gather(problem, dz.host())};
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
        simt::options().traffic = false;
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
    std::printf("    tokens %ld, %ld layers of rank %ld, tasks %ld, ddof %d\n", long(problem.tokens),
                long(problem.layers()), long(problem.rank()), long(problem.tasks), problem.ddof);
  }
}

}  // namespace

TEST(cuda_kernels_agree_with_cpu_kernels_for_every_type) {
  for (const Problem& problem : {Problem{600, {8}, 5}, Problem{300, {33}, 4, 1}}) {
    check_problem<float>(problem);
    check_problem<bfloat16>(problem);
    check_problem<float16>(problem);
  }
}

TEST(tails_of_rows_ranks_and_tasks_are_covered) {
  for (int64_t tokens : {1, 255, 256, 257}) check_problem<float>({tokens, {5}, 3});
  for (int64_t rank : {1, 2, 31, 32, 70, 130}) check_problem<float>({100, {rank}, 3, 0, true}, 2);
  for (int64_t tasks : {16, 17, 40}) check_problem<float>({520, {3}, tasks, 1, true}, 2);
}

TEST(empty_tasks_and_no_tokens_give_zeros) {
  for (const Problem& problem : {Problem{0, {4}, 3}, Problem{20, {4}, 1}, Problem{5, {0}, 2}, Problem{9, {4}, 0}}) {
    check_problem<float>(problem);
    const Results results = run_cuda(problem, make_data<float>(problem));
    CHECK(largest(results.loss) == 0 && largest(results.tables) == 0 && largest(results.dz) == 0);
  }
}

TEST(layers_of_any_ranks_share_the_launches) {
  check_problem<float>({300, {8, 1, 33, 0, 8, 40}, 5});
  check_problem<bfloat16>({257, {3, 4}, 3, 1, true});
}

// The pointers and ranks of 256 layers fit the parameters of a kernel.
TEST(all_alignment_takes_four_launches_up_to_256_layers_at_a_time) {
  for (const auto& [layers, launches] : {std::pair(1, 4), std::pair(7, 4), std::pair(256, 4), std::pair(257, 7)}) {
    Problem problem{20, std::vector<int64_t>(layers, 2), 3};
    problem.ranks.back() = 5;
    check_problem<float>(problem, 1);
    simt::options() = {};
    simt::reports().clear();
    run_cuda(problem, make_data<float>(problem));
    CHECK(int(simt::reports().size()) == launches);
  }
}

// Forward reads z twice (means, then differences) and task once; backward reads z and writes dz, once each.
TEST(z_and_dz_move_as_often_as_they_must) {
  const Problem problem{1024, {32}, 4};
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
  const int64_t z_sectors = problem.tokens * problem.rank() * int64_t(sizeof(float)) / 32;
  CHECK(sectors(0, Op::kLoad, "z") == 2 * z_sectors);
  CHECK(sectors(0, Op::kLoad, "task") == problem.tokens * int64_t(sizeof(int64_t)) / 32);
  CHECK(sectors(1, Op::kLoad, "z") == 0);
  CHECK(sectors(3, Op::kLoad, "z") == z_sectors && sectors(3, Op::kStore, "dz") == z_sectors);
  for (const simt::Report& report : simt::reports()) CHECK(report.global(Op::kAtomic).requests == 0);
}

int main() { return check::run_tests(); }
