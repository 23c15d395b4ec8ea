#include "check.h"
#include "mk_mmd_problem.h"

using namespace align;
using test::MmdData;
using test::MmdProblem;
using test::MmdResults;

namespace {

constexpr double kGradient = test::kMmdLossGradient;

// Tokens that take part, by task; empty for tasks that do not.
std::vector<std::vector<int64_t>> chosen_tokens(const MmdProblem& problem, const std::vector<int64_t>& task) {
  std::vector<std::vector<int64_t>> all(problem.tasks), chosen(problem.tasks);
  for (int64_t t = 0; t < problem.tokens; ++t) {
    if (task[t] >= 0 && task[t] < problem.tasks) all[task[t]].push_back(t);
  }
  for (int64_t i = 0; i < problem.tasks; ++i) {
    const int64_t n = int64_t(all[i].size()), m = std::min(n, problem.n_max);
    for (int64_t j = 0; j < m && n >= 2; ++j) chosen[i].push_back(all[i][j * n / m]);
  }
  return chosen;
}

struct Expected {
  long double loss = 0;  // of many small terms
  std::vector<double> slot, dz;
};

// Task pair by task pair and token pair by token pair.
template <typename T>
Expected expect(const MmdProblem& problem, const MmdData<T>& data) {
  const auto z = test::to_double(data.z);
  const auto chosen = chosen_tokens(problem, data.task);
  Expected want{0, std::vector<double>(problem.tokens, -1), std::vector<double>(problem.tokens * problem.rank)};
  std::vector<int64_t> all;
  double tasks = 0;
  for (const auto& tokens : chosen) {
    tasks += !tokens.empty();
    for (int64_t t : tokens) {
      want.slot[t] = double(all.size());
      all.push_back(t);
    }
  }
  const auto distance = [&](int64_t a, int64_t b) {
    double sum = 0;
    for (int64_t d = 0; d < problem.rank; ++d) sum += std::pow(z[a * problem.rank + d] - z[b * problem.rank + d], 2);
    return sum;
  };
  double bandwidth = 0;
  for (int64_t a : all) {
    for (int64_t b : all) bandwidth += distance(a, b) / (double(all.size()) * double(all.size() - 1));
  }
  std::vector<double> betas;
  for (double given : problem.bandwidths) betas.push_back(1 / given);
  for (int k = 0; k < 5 && problem.bandwidths.empty(); ++k) betas.push_back(1 / (bandwidth * std::pow(2, k - 2)));
  if (tasks < 2 || (problem.bandwidths.empty() && bandwidth < 1e-12)) return want;

  const auto add = [&](const std::vector<int64_t>& of, const std::vector<int64_t>& with, double sign) {
    const bool u = problem.u_statistic && &of == &with;
    const double weight =
        sign / (double(of.size()) * double(with.size() - u)) * (problem.mean_pairs ? 2 / (tasks * (tasks - 1)) : 1);
    for (int64_t a : of) {
      for (int64_t b : with) {
        if (u && a == b) continue;
        double h = 0;
        for (double beta : betas) {
          want.loss += weight * std::exp(-beta * distance(a, b));
          h += beta * std::exp(-beta * distance(a, b));
        }
        for (int64_t d = 0; d < problem.rank; ++d) {  // dk/da = -2 h (a - b) = -dk/db
          const double difference = -2 * kGradient * weight * h * (z[a * problem.rank + d] - z[b * problem.rank + d]);
          want.dz[a * problem.rank + d] += difference;
          want.dz[b * problem.rank + d] -= difference;
        }
      }
    }
  };
  for (size_t i = 0; i < chosen.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (chosen[i].empty() || chosen[j].empty()) continue;
      add(chosen[i], chosen[i], 1);
      add(chosen[j], chosen[j], 1);
      add(chosen[i], chosen[j], -2);
    }
  }
  return want;
}

template <typename T>
void check_problem(const MmdProblem& problem) {
  const MmdData<T> data = test::make_mmd_data<T>(problem);
  const Expected want = expect(problem, data);
  const double last_place = test::kEpsilon<Acc<T>>;
  const int64_t before = check::failures();
  test::for_each_vector_width([&] {
    const MmdResults got = test::run_mmd_cpu(problem, data);
    CHECK(got.slot == want.slot);
    // The loss is a small difference of means of kernels.
    const double loss = double(want.loss);
    CHECK_CLOSE(got.loss, std::vector<double>{loss}, last_place * (8 * problem.kernels().count + std::fabs(loss)));
    CHECK_CLOSE(got.dz, want.dz, (16 * last_place + test::kEpsilon<T>)*test::largest(want.dz));
  });
  if (check::failures() != before) {
    std::printf("    tokens %ld rank %ld tasks %ld n_max %ld\n", long(problem.tokens), long(problem.rank),
                long(problem.tasks), long(problem.n_max));
  }
}

void check_all_types(const MmdProblem& problem) {
  check_problem<float>(problem);
  check_problem<double>(problem);
  check_problem<bfloat16>(problem);
  check_problem<float16>(problem);
}

}  // namespace

// One kernel, k = 2^(-d^2). Task 0 holds 0 and 1, task 1 holds 3 and 3; a token of no task lies between them.
TEST(a_tiny_case_gives_the_numbers_worked_out_by_hand) {
  const MmdProblem problem{5, 1, 2, 256, false, false, {1 / std::log(2.0)}};
  const MmdData<double> data{{0, 3, 100, 1, 3}, {0, 1, -1, 0, 1}};
  const MmdResults results = test::run_mmd_cpu(problem, data);
  // Means: (1 + 1/2 + 1/2 + 1) / 4 within task 0, 1 within task 1, (2 2^-9 + 2 2^-4) / 4 between them.
  CHECK_CLOSE(results.loss, std::vector<double>{1.75 - 2 * (std::ldexp(1, -10) + std::ldexp(1, -5))}, 1e-15);
  CHECK((results.slot == std::vector<double>{0, 2, -1, 1, 3}));
  // dk/da = -2 ln 2 k (a - b). Token 0: from 1, twice 2 (1/4) ln 2 (1/2); from each 3, -2/4 of 2 ln 2 3 2^-9.
  const double ln2 = std::log(2.0);
  CHECK_CLOSE(std::vector<double>{results.gradient[0]},
              std::vector<double>{ln2 / 2 - 2 * 2 * ln2 * 3 * std::ldexp(1, -9) / 2}, 1e-15);
}

TEST(kernels_agree_with_the_pairwise_formula_for_every_rank) {
  for (int64_t rank : {1, 3, 7, 8, 9, 16, 33, 70}) check_all_types({150, rank, 4});
}

TEST(kernels_agree_with_the_pairwise_formula_for_every_option) {
  for (bool u_statistic : {false, true}) {
    for (bool mean_pairs : {false, true}) {
      check_all_types({120, 5, 5, 256, u_statistic, mean_pairs});
      check_all_types({120, 5, 5, 256, u_statistic, mean_pairs, {1, 2, 4, 3, 64, 128, 8, 16, 32, 0.25}});
    }
  }
}

TEST(tails_of_tiles_and_of_the_choice_are_covered) {
  for (int64_t tokens : {4, 31, 32, 33, 64, 65, 97}) check_all_types({tokens, 3, 1 + tokens % 2 + 1});
  for (int64_t n_max : {2, 3, 31, 32, 33, 50}) check_all_types({300, 3, 3, n_max});
}

TEST(every_number_of_groups_of_tiles_is_covered) {
  for (int64_t tokens : {100, 300, 500, 700, 1100, 1600}) check_problem<float>({tokens, 8, 3, 400});
  check_problem<float>({900, 2, 25});
}

TEST(fewer_than_two_tasks_give_zeros) {
  for (const MmdProblem& problem : {MmdProblem{50, 4, 1}, MmdProblem{0, 4, 3}, MmdProblem{3, 0, 2}}) {
    const MmdResults results = test::run_mmd_cpu(problem, test::make_mmd_data<float>(problem));
    CHECK(results.loss[0] == 0 && test::largest(results.gradient) == 0 && test::largest(results.dz) == 0);
  }
}

TEST(layers_of_one_call_have_the_bits_that_they_have_alone) {
  MmdProblem problem{120, 16, 3, 40};
  problem.ranks = {16, 3, 9, 16, 1};
  const MmdData<float> data = test::make_mmd_data<float>(problem);
  const MmdResults together = test::run_mmd_cpu(problem, data);
  for (int64_t layer = 0; layer < problem.layers(); ++layer) {
    const auto [one, of_layer] = test::alone(problem, data, layer);
    CHECK(test::layer_of(problem, together, layer).same_bits(test::run_mmd_cpu(one, of_layer)));
  }
}

TEST(a_constant_latent_gives_zeros) {
  const MmdProblem problem{80, 4, 3};
  MmdData<float> data = test::make_mmd_data<float>(problem);
  std::fill(data.z.begin(), data.z.end(), 0.1f);
  const MmdResults results = test::run_mmd_cpu(problem, data);
  CHECK(results.loss[0] == 0 && test::largest(results.gradient) == 0 && test::largest(results.dz) == 0);
}

TEST(tokens_that_do_not_count_may_hold_nan) {
  const MmdProblem problem{100, 8, 3, 16};
  MmdData<float> clean = test::make_mmd_data<float>(problem), data = clean;
  const MmdResults before = test::run_mmd_cpu(problem, clean);
  for (int64_t t = 0; t < problem.tokens; ++t) {
    for (int64_t d = 0; d < problem.rank && before.slot[t] < 0; ++d) data.z[t * problem.rank + d] = NAN;
  }
  CHECK(test::run_mmd_cpu(problem, data).same_bits(before));
}

namespace {

template <typename T>
void check_same_bits() {
  const MmdProblem problem{1200, 13, 5, 150};
  const MmdData<T> data = test::make_mmd_data<T>(problem);
  const MmdResults serial = test::run_mmd_cpu(problem, data);
  test::for_each_parallel_for([&] { CHECK(test::run_mmd_cpu(problem, data).same_bits(serial)); });
}

}  // namespace

TEST(results_do_not_depend_on_how_ranges_are_cut) {
  check_same_bits<float>();
  check_same_bits<double>();
  check_same_bits<bfloat16>();
  check_same_bits<float16>();
}

int main() { return check::run_tests(); }
