#include <algorithm>
#include <cmath>

#include "check.h"
#include "ops/gaussian_kl.h"
#include "support.h"

using namespace align;

namespace {

struct Problem {
  int64_t tokens, rank, tasks;
  int ddof = 0;
  bool mean_pairs = false;
  double offset = 0;  // of all of z: what raw sums of squares lose digits to
  int64_t run = 1;    // equal ids in a row
};

constexpr double kEps = 1e-6;

template <typename T>
struct Data {
  std::vector<T> z;
  std::vector<int64_t> task;
  // results
  std::vector<Acc<T>> moments, loss, tables;
  std::vector<T> dz;
};

// Ids run from -2 to tasks + 1, so that some tokens do not count; task 2 has one token at most and task 3 none.
template <typename T>
Data<T> make_data(const Problem& problem) {
  Data<T> data;
  std::mt19937 generator(11);
  data.z = test::random_values<T>(problem.tokens * problem.rank, 12, problem.offset - 1, problem.offset + 1);
  int64_t id = 0;
  bool task_2_seen = false;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    if (t % problem.run == 0) id = int64_t(generator() % (problem.tasks + 4)) - 2;
    if (id == 3 || (id == 2 && task_2_seen)) id = 0;
    task_2_seen |= id == 2;
    data.task.push_back(id);
    // Tasks differ in mean and spread.
    for (int64_t d = 0; d < problem.rank; ++d) {
      T& z = data.z[t * problem.rank + d];
      const double centred = widen(z) - problem.offset;
      z = narrow<T>(Acc<T>(problem.offset + centred * (1 + 0.3 * id) + 0.2 * id * (d % 3)));
    }
  }
  return data;
}

// The latents of one layer.
template <typename T>
struct OneLayer {
  const T* z;
  int64_t rank;

  Latents<T> latents(int64_t tokens, const int64_t* task) const { return {1, tokens, rank, &z, &rank, task}; }
};

template <typename T>
void run(const Problem& problem, Data<T>& data, double d_loss = 0.7) {
  const auto [tokens, rank, tasks, ddof, mean_pairs, offset, ids_in_a_row] = problem;
  const OneLayer<T> layer{data.z.data(), rank};
  const Latents<T> latents = layer.latents(tokens, data.task.data());
  data.moments.assign(tasks * (2 * rank + 1), NAN);
  test::run_in_workspace(TaskMomentsArgs<T>{latents, tasks, data.moments.data(), nullptr},
                         cpu::task_moments_workspace(latents, tasks), cpu::task_moments<T>);
  data.loss.assign(1, NAN);
  data.tables.assign(tasks * 3 * rank, NAN);
  cpu::gaussian_kl_tables(GaussianKlTablesArgs<Acc<T>>{1, rank, tasks, kEps, ddof, mean_pairs, data.moments.data(),
                                                       data.loss.data(), data.tables.data()});
  data.dz.assign(tokens * rank, narrow<T>(Acc<T>(NAN)));
  const Acc<T> gradient = Acc<T>(d_loss / 2);
  cpu::gaussian_kl_backward(
      GaussianKlBackwardArgs<T>{latents, tasks, data.tables.data(), &gradient, 2.0, data.dz.data(), tokens * rank});
}

struct Expected {
  std::vector<double> moments, dz;
  double loss = 0;
};

// Equation 5 pair by pair, with the derivatives of each pair.
template <typename T>
Expected expect(const Problem& problem, const Data<T>& data, double d_loss = 0.7) {
  const auto [tokens, rank, tasks, ddof, mean_pairs, offset, ids_in_a_row] = problem;
  const auto z = test::to_double(data.z);
  const int64_t row = 2 * rank + 1;
  Expected want;
  want.moments.resize(tasks * row);
  want.dz.resize(tokens * rank);
  std::vector<double>& m = want.moments;
  const auto counts = [&](int64_t t) { return data.task[t] >= 0 && data.task[t] < tasks; };
  for (int64_t t = 0; t < tokens; ++t) {
    if (counts(t)) ++m[data.task[t] * row];
  }
  std::vector<long double> sum(tasks * rank);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < rank && counts(t); ++d) sum[data.task[t] * rank + d] += z[t * rank + d];
  }
  for (int64_t i = 0; i < tasks; ++i) {
    for (int64_t d = 0; d < rank && m[i * row] > 0; ++d) m[i * row + 1 + d] = double(sum[i * rank + d] / m[i * row]);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < rank && counts(t); ++d) {
      m[data.task[t] * row + 1 + rank + d] += std::pow(z[t * rank + d] - m[data.task[t] * row + 1 + d], 2);
    }
  }
  const auto active = [&](int64_t i) { return m[i * row] >= std::max(2, 1 + ddof); };
  double pairs = 0;
  for (int64_t i = 0; i < tasks; ++i) {
    for (int64_t j = 0; j < i; ++j) pairs += active(i) && active(j);
  }
  const double scale = mean_pairs ? 1 / std::max(pairs, 1.0) : 1;
  std::vector<double> d_mu(tasks * rank), d_var(tasks * rank);
  for (int64_t i = 0; i < tasks; ++i) {
    for (int64_t j = 0; j < tasks; ++j) {
      if (i == j || !active(i) || !active(j)) continue;
      for (int64_t d = 0; d < rank; ++d) {
        const double vi = m[i * row + 1 + rank + d] / (m[i * row] - ddof) + kEps;
        const double vj = m[j * row + 1 + rank + d] / (m[j * row] - ddof) + kEps;
        const double gap = m[i * row + 1 + d] - m[j * row + 1 + d];
        if (i < j) want.loss += scale * 0.25 * (vi / vj + vj / vi - 2 + gap * gap * (1 / vi + 1 / vj));
        d_mu[i * rank + d] += scale * 0.5 * gap * (1 / vi + 1 / vj);
        d_var[i * rank + d] += scale * 0.25 * (1 / vj - vj / (vi * vi) - gap * gap / (vi * vi));
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < rank && counts(t); ++d) {
      const int64_t i = data.task[t];
      const double n = m[i * row], mean = m[i * row + 1 + d];
      if (!active(i)) continue;
      want.dz[t * rank + d] =
          d_loss * (d_mu[i * rank + d] / n + 2 * d_var[i * rank + d] * (z[t * rank + d] - mean) / (n - ddof));
    }
  }
  return want;
}

double largest(const std::vector<double>& values) {
  double most = 0;
  for (double v : values) most = std::max(most, std::fabs(v));
  return most;
}

// The moments' columns [first, first + count) of every task.
std::vector<double> columns(const std::vector<double>& moments, int64_t row, int64_t first, int64_t count) {
  std::vector<double> part;
  for (size_t i = 0; i < moments.size(); i += row) {
    part.insert(part.end(), moments.begin() + i + first, moments.begin() + i + first + count);
  }
  return part;
}

template <typename T>
void check_problem(const Problem& problem) {
  Data<T> data = make_data<T>(problem);
  const Expected want = expect(problem, data);
  const double last_place = test::kEpsilon<Acc<T>> * largest(test::to_double(data.z));
  const int64_t row = 2 * problem.rank + 1;
  test::for_each_vector_width([&] {
    run(problem, data);
    const auto moments = test::to_double(data.moments);
    const auto part = [&](const std::vector<double>& all, int64_t first, int64_t count) {
      return columns(all, row, first, count);
    };
    CHECK_CLOSE(part(moments, 0, 1), part(want.moments, 0, 1), 0);
    CHECK_CLOSE(part(moments, 1, problem.rank), part(want.moments, 1, problem.rank), 8 * last_place);
    // M2 is as wrong as the distances of n values, or of blocks of them, to means that are off in the last place.
    const auto want_m2 = part(want.moments, 1 + problem.rank, problem.rank);
    CHECK_CLOSE(
        part(moments, 1 + problem.rank, problem.rank), want_m2,
        32 * test::kEpsilon<Acc<T>> * largest(want_m2) + 2 * last_place * std::sqrt(problem.tokens * largest(want_m2)));
    // Loss and gradient move by a mean's error over the spread, which is about 1/2.
    const double sensitive = 32 * last_place;
    CHECK_CLOSE(test::to_double(data.loss), std::vector<double>{want.loss}, sensitive * (want.loss + 1e-3));
    CHECK_CLOSE(test::to_double(data.dz), want.dz, (sensitive + 0.51 * test::kEpsilon<T>)*largest(want.dz));
  });
}

void check_all_types(const Problem& problem) {
  const int64_t before = check::failures();
  check_problem<float>(problem);
  check_problem<double>(problem);
  if (problem.offset == 0) {
    check_problem<bfloat16>(problem);
    check_problem<float16>(problem);
  }
  if (check::failures() != before) {
    std::printf("    tokens %ld rank %ld tasks %ld ddof %d mean_pairs %d offset %g\n", long(problem.tokens),
                long(problem.rank), long(problem.tasks), problem.ddof, problem.mean_pairs, problem.offset);
  }
}

}  // namespace

// Task 0 holds 0 and 2, task 1 holds 3 and 7; a token of no task lies between them.
TEST(a_tiny_case_gives_the_numbers_worked_out_by_hand) {
  const Problem problem{5, 1, 2};
  Data<double> data;
  data.z = {0, 3, 100, 2, 7};
  data.task = {0, 1, -1, 0, 1};
  run(problem, data, 1);
  CHECK((data.moments == std::vector<double>{2, 1, 2, 2, 5, 8}));
  // v = 1 and 4, means 4 apart: 1/4 (1/4 + 4 - 2 + 16 (1 + 1/4)) = 89/16, but for eps.
  CHECK_CLOSE(data.loss, std::vector<double>{5.5625}, 1e-4);
  // dL/dmu_0 = -1/2 4 5/4 = -5/2;  dL/dvar_0 = 1/4 (1/4 - 4 - 16) = -79/16;  dz = -5/4 -+ 79/16.
  // dL/dvar_1 = 1/4 (1 - 1/16 - 1) = -1/64;  dz = 5/4 +- 1/32.
  CHECK_CLOSE(data.dz, (std::vector<double>{59. / 16, 5. / 4 + 1. / 32, 0, -99. / 16, 5. / 4 - 1. / 32}), 1e-4);
}

TEST(kernels_agree_with_the_pairwise_formula_for_every_rank) {
  for (int64_t rank : {1, 3, 7, 8, 9, 31, 32, 33, 70}) check_all_types({500, rank, 5});
}

TEST(kernels_agree_with_the_pairwise_formula_for_every_option) {
  for (int ddof : {0, 1}) {
    for (bool mean_pairs : {false, true}) check_all_types({300, 8, 5, ddof, mean_pairs});
  }
}

TEST(kernels_agree_with_the_pairwise_formula_across_blocks_of_rows) {
  for (int64_t tokens : {1023, 1024, 1025, 3000}) {
    for (int64_t run : {1, 700}) check_all_types({tokens, 8, 4, 0, false, 0, run});
  }
}

TEST(many_tasks_and_a_single_pair_work) {
  check_all_types({4000, 8, 25});
  check_all_types({100, 4, 2});
}

TEST(a_large_common_offset_costs_no_more_than_its_rounding) { check_all_types({2500, 8, 5, 0, false, 3000}); }

TEST(fewer_than_two_active_tasks_give_zeros) {
  for (const Problem& problem : {Problem{50, 4, 1}, Problem{0, 4, 3}, Problem{3, 0, 2}, Problem{20, 4, 0}}) {
    Data<float> data = make_data<float>(problem);
    run(problem, data);
    CHECK(data.loss[0] == 0);
    for (float v : data.tables) CHECK(v == 0);
    for (float v : data.dz) CHECK(v == 0);
  }
}

TEST(one_token_is_not_enough_for_a_task) {
  Data<float> data;
  data.z = {1, 2, 3, 50};
  data.task = {0, 0, 0, 1};
  run({4, 1, 2}, data);
  CHECK(data.loss[0] == 0 && data.moments[3] == 1);
  for (float v : data.dz) CHECK(v == 0);
}

TEST(tokens_that_do_not_count_may_hold_nan) {
  const Problem problem{60, 8, 3};
  Data<float> data = make_data<float>(problem), clean = data;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    const bool counts = data.task[t] >= 0 && data.task[t] < problem.tasks;
    for (int64_t d = 0; d < problem.rank && !counts; ++d) data.z[t * problem.rank + d] = NAN;
  }
  run(problem, data);
  run(problem, clean);
  CHECK(check::same_bits(data.loss, clean.loss) && check::same_bits(data.dz, clean.dz));
}

TEST(tables_of_layers_are_independent) {
  const int64_t layers = 40, rank = 9, tasks = 5, size = tasks * (2 * rank + 1);
  std::vector<float> moments, loss(layers, NAN), tables(layers * tasks * 3 * rank, NAN);
  std::vector<Data<float>> each;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Problem problem{200 + 10 * layer, rank, tasks};
    each.push_back(make_data<float>(problem));
    run(problem, each.back());
    moments.insert(moments.end(), each.back().moments.begin(), each.back().moments.end());
  }
  test::for_each_parallel_for([&] {
    cpu::gaussian_kl_tables(
        GaussianKlTablesArgs<float>{layers, rank, tasks, kEps, 0, false, moments.data(), loss.data(), tables.data()});
    for (int64_t layer = 0; layer < layers; ++layer) {
      CHECK(loss[layer] == each[layer].loss[0]);
      CHECK(
          std::equal(each[layer].tables.begin(), each[layer].tables.end(), tables.begin() + layer * tasks * 3 * rank));
    }
  });
  CHECK(int64_t(moments.size()) == layers * size);
}

namespace {

template <typename T>
void check_same_bits() {
  const Problem problem{9000, 13, 5};
  Data<T> serial = make_data<T>(problem), again = serial;
  run(problem, serial);
  test::for_each_parallel_for([&] {
    run(problem, again);
    CHECK(check::same_bits(again.moments, serial.moments) && check::same_bits(again.tables, serial.tables));
    CHECK(std::memcmp(again.dz.data(), serial.dz.data(), serial.dz.size() * sizeof(T)) == 0);
  });
}

}  // namespace

TEST(results_do_not_depend_on_how_ranges_are_cut) {
  check_same_bits<float>();
  check_same_bits<double>();
  check_same_bits<bfloat16>();
  check_same_bits<float16>();
}

// Every layer of a call that holds layers of several ranks gives what a call of its own gives, and zeros beyond its
// rank.
TEST(layers_of_any_ranks_share_a_call) {
  const std::vector<int64_t> ranks = {8, 1, 33, 0, 8, 40};
  const int64_t layers = int64_t(ranks.size()), tokens = 2500, tasks = 5, rank = 40, stride = tokens * rank + 7;
  std::vector<Data<float>> each;
  std::vector<const float*> z;
  for (int64_t r : ranks) each.push_back(make_data<float>({tokens, r, tasks}));
  for (Data<float>& data : each) {
    data.task = each[0].task;
    z.push_back(data.z.data());
  }
  const Latents<float> latents{layers, tokens, rank, z.data(), ranks.data(), each[0].task.data()};
  std::vector<char> workspace(cpu::task_moments_workspace(latents, tasks));
  std::vector<float> loss(layers), tables(layers * tasks * 3 * rank);
  test::for_each_parallel_for([&] {
    std::vector<float> moments(layers * tasks * (2 * rank + 1), NAN), dz(layers * stride, NAN);
    cpu::task_moments<float>({latents, tasks, moments.data(), workspace.data()});
    cpu::gaussian_kl_tables<float>({layers, rank, tasks, kEps, 0, false, moments.data(), loss.data(), tables.data()});
    const float d_loss = 0.7f;
    cpu::gaussian_kl_backward<float>({latents, tasks, tables.data(), &d_loss, 1.0, dz.data(), stride});
    for (int64_t layer = 0; layer < layers; ++layer) {
      Data<float>& alone = each[layer];
      run({tokens, ranks[layer], tasks}, alone);
      CHECK(std::equal(alone.dz.begin(), alone.dz.end(), dz.begin() + layer * stride));
      for (int64_t i = 0; i < tasks; ++i) {
        const float* row = moments.data() + (layer * tasks + i) * (2 * rank + 1);
        const float* one = alone.moments.data() + i * (2 * ranks[layer] + 1);
        CHECK(row[0] == one[0]);
        for (int64_t d = 0; d < rank; ++d) {
          const bool has = d < ranks[layer];
          CHECK(row[1 + d] == (has ? one[1 + d] : 0));
          CHECK(row[1 + rank + d] == (has ? one[1 + ranks[layer] + d] : 0));
        }
      }
    }
  });
}

int main() { return check::run_tests(); }
