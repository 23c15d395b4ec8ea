#include <algorithm>
#include <cmath>
#include <string>

#include "check.h"
#include "ops/grouped_lora.h"
#include "ops/philox.h"
#include "support.h"

using namespace align;

namespace {

struct Problem {
  GroupedLoraShape shape;
  double p = 0;
  bool permuted = true;      // rows of the groups interleaved, else sorted and rows == null
  bool gradients_in = true;  // dz_in and dx_in given
  bool in_place = false;     // y_in == y and dx_in == dx
  double scaling = 1.5;
};

// Everything of one problem in type T.
template <typename T>
struct Data {
  std::vector<int64_t> group, rows, offsets;
  std::vector<uint64_t> rng{0x0123456789abcdefull, 17};
  std::vector<T> x, A, B, y_in, bias, dy, dx_in;  // bias may be empty: none
  std::vector<Acc<T>> dz_in;
  // results
  std::vector<T> y, dx;
  std::vector<Acc<T>> z, dA, dB;
};

template <typename T>
Data<T> make_data(const Problem& problem) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = problem.shape;
  Data<T> data;
  std::mt19937 generator(3);
  // The last of several groups stays empty, and so does the second of many.
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t id = generator() % std::max<int64_t>(groups - 1, 1);
    data.group.push_back(groups > 3 && id == 1 ? 0 : id);
  }
  if (!problem.permuted) std::sort(data.group.begin(), data.group.end());
  data.rows.resize(tokens);
  data.offsets.resize(groups + 1);
  cpu::group_rows(data.group.data(), tokens, groups, data.rows.data(), data.offsets.data());
  data.x = test::random_values<T>(tokens * in_dim, 1);
  data.A = test::random_values<T>(groups * rank * in_dim, 2);
  data.B = test::random_values<T>(groups * out_dim * rank, 3);
  data.y_in = test::random_values<T>(tokens * out_dim, 4);
  data.bias = test::random_values<T>(out_dim, 8);
  data.dy = test::random_values<T>(tokens * out_dim, 5);
  data.dx_in = test::random_values<T>(tokens * in_dim, 6);
  data.dz_in = test::random_values<Acc<T>>(tokens * rank, 7);
  return data;
}

// Storage for count elements that starts out as NaN, so that whatever is not assigned shows.
template <typename T>
std::vector<T> unassigned(int64_t count) {
  return std::vector<T>(count, narrow<T>(Acc<T>(NAN)));
}

constexpr char kCanary = 0x5A;

template <typename Args, typename Kernel>
void run_in_workspace(Args args, int64_t bytes, const Kernel& kernel) {
  std::vector<char> workspace(bytes + 64, kCanary);
  args.workspace = workspace.data();
  kernel(args);
  CHECK(std::all_of(workspace.begin() + bytes, workspace.end(), [](char c) { return c == kCanary; }));
}

template <typename T>
void run(const Problem& problem, Data<T>& data) {
  const GroupedLoraShape& shape = problem.shape;
  const RowGroups row_groups{problem.permuted ? data.rows.data() : nullptr, data.offsets.data()};
  const InputDropout dropout{problem.p, problem.p > 0 ? data.rng.data() : nullptr};
  const bool in_place = problem.in_place;
  data.z = unassigned<Acc<T>>(shape.tokens * shape.rank);
  data.y = in_place ? data.y_in : unassigned<T>(shape.tokens * shape.out_dim);
  run_in_workspace(
      GroupedLoraForwardArgs<T>{shape, row_groups, dropout, problem.scaling, data.x.data(), data.A.data(),
                                data.B.data(), in_place ? data.y.data() : data.y_in.data(),
                                data.bias.empty() ? nullptr : data.bias.data(), data.z.data(), data.y.data(), nullptr},
      cpu::grouped_lora_forward_workspace(shape, problem.p > 0), cpu::grouped_lora_forward<T>);

  data.dx = in_place ? data.dx_in : unassigned<T>(shape.tokens * shape.in_dim);
  data.dA = unassigned<Acc<T>>(shape.groups * shape.rank * shape.in_dim);
  data.dB = unassigned<Acc<T>>(shape.groups * shape.out_dim * shape.rank);
  const T* dx_in = !problem.gradients_in ? nullptr : in_place ? data.dx.data() : data.dx_in.data();
  run_in_workspace(GroupedLoraBackwardArgs<T>{shape, row_groups, dropout, problem.scaling, data.x.data(), data.z.data(),
                                              data.A.data(), data.B.data(), dx_in, data.dy.data(),
                                              problem.gradients_in ? data.dz_in.data() : nullptr, data.dx.data(),
                                              data.dA.data(), data.dB.data(), nullptr},
                   cpu::grouped_lora_backward_workspace(shape, problem.p > 0), cpu::grouped_lora_backward<T>);
}

// A sum of products and the sum of their magnitudes, which bounds its rounding error.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};

struct Expected {
  std::vector<Sum> z, y, dx, dA, dB;
};

// The formulas of ops/grouped_lora.h, in double, with the dropout of ops/philox.h.
template <typename T>
Expected expect(const Problem& problem, const Data<T>& data) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = problem.shape;
  const auto x = test::to_double(data.x), A = test::to_double(data.A), B = test::to_double(data.B);
  const auto dy = test::to_double(data.dy), bias = test::to_double(data.bias);
  const auto y_in = test::to_double(data.y_in), dx_in = test::to_double(data.dx_in);
  const uint32_t threshold = dropout_threshold(problem.p);
  const auto mask = [&](int64_t e) {
    return dropout_keep(data.rng[0], data.rng[1], e, threshold) ? dropout_scale(threshold) : 0.0;
  };
  Expected want;
  want.z.resize(tokens * rank);
  want.y.resize(tokens * out_dim);
  want.dx.resize(tokens * in_dim);
  want.dA.resize(groups * rank * in_dim);
  want.dB.resize(groups * out_dim * rank);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t a0 = data.group[t] * rank * in_dim, b0 = data.group[t] * out_dim * rank;
    for (int64_t c = 0; c < in_dim; ++c) want.dx[t * in_dim + c].add(problem.gradients_in ? dx_in[t * in_dim + c] : 0);
    for (int64_t o = 0; o < out_dim; ++o) want.y[t * out_dim + o].add(y_in[t * out_dim + o] + bias[o]);
    for (int64_t j = 0; j < rank; ++j) {
      Sum& z = want.z[t * rank + j];
      for (int64_t c = 0; c < in_dim; ++c) z.add(x[t * in_dim + c] * mask(t * in_dim + c) * A[a0 + j * in_dim + c]);
      double dz = problem.gradients_in ? double(data.dz_in[t * rank + j]) : 0;
      for (int64_t o = 0; o < out_dim; ++o) {
        const double g = problem.scaling * dy[t * out_dim + o];
        want.y[t * out_dim + o].add(problem.scaling * B[b0 + o * rank + j] * z.value);
        want.dB[b0 + o * rank + j].add(g * z.value);
        dz += g * B[b0 + o * rank + j];
      }
      for (int64_t c = 0; c < in_dim; ++c) {
        const double m = mask(t * in_dim + c);
        want.dA[a0 + j * in_dim + c].add(dz * x[t * in_dim + c] * m);
        want.dx[t * in_dim + c].add(A[a0 + j * in_dim + c] * dz * m);
      }
    }
  }
  return want;
}

// Rounding: each tensor's largest sum of magnitudes, in eps of the accumulator, times the depth of the sums it stands
// on; and one rounding to the storage type. A lost row, rank or column is orders of magnitude more.
template <typename S, typename T>
void check_tensor(const std::vector<S>& got, const std::vector<Sum>& want, const char* name) {
  std::vector<double> value;
  double magnitude = 0, largest = 0;
  for (const Sum& sum : want) {
    value.push_back(sum.value);
    magnitude = std::max(magnitude, sum.magnitude);
    largest = std::max(largest, std::fabs(sum.value));
  }
  const double tolerance = 12 * test::kEpsilon<Acc<T>> * magnitude + 0.51 * test::kEpsilon<S> * largest;
  if (!CHECK_CLOSE(test::to_double(got), value, tolerance)) std::printf("    in %s\n", name);
}

template <typename T>
void check_problem(const Problem& problem) {
  Data<T> data = make_data<T>(problem);
  const Expected want = expect(problem, data);
  test::for_each_vector_width([&] {
    run(problem, data);
    check_tensor<Acc<T>, T>(data.z, want.z, "z");
    check_tensor<T, T>(data.y, want.y, "y");
    check_tensor<T, T>(data.dx, want.dx, "dx");
    check_tensor<Acc<T>, T>(data.dA, want.dA, "dA");
    check_tensor<Acc<T>, T>(data.dB, want.dB, "dB");
  });
}

void check_all_types(const Problem& problem) {
  const int64_t before = check::failures();
  check_problem<float>(problem);
  check_problem<double>(problem);
  check_problem<bfloat16>(problem);
  check_problem<float16>(problem);
  const auto& [tokens, in_dim, out_dim, rank, groups] = problem.shape;
  if (check::failures() != before) {
    std::printf("    tokens %ld in_dim %ld out_dim %ld rank %ld groups %ld p %g permuted %d gradients_in %d\n",
                long(tokens), long(in_dim), long(out_dim), long(rank), long(groups), problem.p, problem.permuted,
                problem.gradients_in);
  }
}

}  // namespace

// Two tokens of two groups, in_dim 2, rank 1, out_dim 1, all integers.
TEST(a_tiny_case_gives_the_numbers_worked_out_by_hand) {
  Problem problem{{2, 2, 1, 1, 2}};
  problem.scaling = 2;
  Data<float> data;
  data.rows = {1, 0};  // token 1 is of group 0, token 0 of group 1
  data.offsets = {0, 1, 2};
  data.x = {1, 2, 3, 4};
  data.A = {1, -1, 2, 3};
  data.B = {5, 7};
  data.y_in = {100, 200};
  data.dy = {1, -2};
  data.dz_in = {0.5f, 0};
  data.dx_in = {10, 20, 30, 40};
  run(problem, data);
  CHECK((data.z == std::vector<float>{8, -1}));                 // (2,3).(1,2), (1,-1).(3,4)
  CHECK((data.y == std::vector<float>{212, 190}));              // 100 + 2*7*8, 200 - 2*5*1
  CHECK((data.dB == std::vector<float>{4, 16}));                // 2*-2*-1, 2*1*8
  CHECK((data.dA == std::vector<float>{-60, -80, 14.5f, 29}));  // dz = 2*5*-2 = -20 and 2*7*1 + 0.5 = 14.5
  CHECK((data.dx == std::vector<float>{39, 63.5f, 10, 60}));
}

TEST(kernels_agree_with_naive_loops_for_every_rank) {
  for (int64_t rank : {1, 3, 4, 8, 9, 17, 70}) {
    for (double p : {0.0, 0.3}) check_all_types({{37, 45, 53, rank, 1}, p});
  }
}

TEST(kernels_agree_with_naive_loops_for_every_tail) {
  for (int64_t in_dim : {1, 7, 8, 15, 16, 33, 64, 100}) check_all_types({{9, in_dim, in_dim + 1, 5, 3}, 0.4});
  for (int64_t tokens : {1, 2, 3, 5, 31, 32, 33, 63, 65, 130}) check_all_types({{tokens, 20, 24, 6, 1}, 0.2});
}

TEST(kernels_agree_with_naive_loops_on_ordinary_shapes) {
  check_all_types({{150, 1100, 300, 8, 1}, 0.1});
  check_all_types({{150, 320, 1088, 16, 4}, 0});
}

TEST(groups_may_be_empty_interleaved_or_sorted) {
  for (bool permuted : {false, true}) {
    for (int64_t groups : {1, 2, 5, 25}) check_all_types({{70, 24, 40, 8, groups}, 0.25, permuted});
  }
}

TEST(optional_gradients_may_be_absent) {
  for (double p : {0.0, 0.5}) check_all_types({{40, 50, 60, 8, 2}, p, true, /*gradients_in=*/false});
}

TEST(outputs_may_overwrite_what_they_add_to) {
  check_all_types({{45, 50, 70, 8, 2}, 0.3, true, true, /*in_place=*/true});
}

TEST(every_size_may_be_zero) {
  for (const GroupedLoraShape& shape :
       {GroupedLoraShape{0, 8, 8, 4, 2}, GroupedLoraShape{5, 0, 8, 4, 1}, GroupedLoraShape{5, 8, 0, 4, 1},
        GroupedLoraShape{5, 8, 8, 0, 1}, GroupedLoraShape{0, 8, 8, 4, 0}}) {
    check_all_types({shape, 0.5});
    check_all_types({shape, 0, false});
  }
}

TEST(dx_may_be_unwanted) {
  const Problem problem{{20, 30, 40, 8, 1}, 0.3};
  Data<float> data = make_data<float>(problem);
  run(problem, data);
  const auto dA = data.dA, dB = data.dB;
  const RowGroups row_groups{data.rows.data(), data.offsets.data()};
  data.dA = unassigned<float>(dA.size());
  data.dB = unassigned<float>(dB.size());
  run_in_workspace(GroupedLoraBackwardArgs<float>{problem.shape,
                                                  row_groups,
                                                  {problem.p, data.rng.data()},
                                                  problem.scaling,
                                                  data.x.data(),
                                                  data.z.data(),
                                                  data.A.data(),
                                                  data.B.data(),
                                                  nullptr,
                                                  data.dy.data(),
                                                  data.dz_in.data(),
                                                  nullptr,
                                                  data.dA.data(),
                                                  data.dB.data(),
                                                  nullptr},
                   cpu::grouped_lora_backward_workspace(problem.shape, true), cpu::grouped_lora_backward<float>);
  CHECK(check::same_bits(data.dA, dA) && check::same_bits(data.dB, dB));
}

namespace {

template <typename T>
void check_same_bits(const Problem& problem) {
  Data<T> serial = make_data<T>(problem), again = serial;
  run(problem, serial);
  test::for_each_parallel_for([&] {
    run(problem, again);
    CHECK(check::same_bits(again.z, serial.z) && check::same_bits(again.dA, serial.dA) &&
          check::same_bits(again.dB, serial.dB));
    CHECK(std::memcmp(again.y.data(), serial.y.data(), serial.y.size() * sizeof(T)) == 0);
    CHECK(std::memcmp(again.dx.data(), serial.dx.data(), serial.dx.size() * sizeof(T)) == 0);
  });
}

}  // namespace

TEST(results_do_not_depend_on_how_ranges_are_cut) {
  test::for_each_vector_width([] {
    for (const Problem& problem : {Problem{{333, 777, 201, 9, 1}, 0.1}, Problem{{200, 130, 520, 8, 4}, 0}}) {
      check_same_bits<float>(problem);
      check_same_bits<double>(problem);
      check_same_bits<bfloat16>(problem);
      check_same_bits<float16>(problem);
    }
  });
}

TEST(group_rows_sorts_stably) {
  const std::vector<int64_t> group{2, 0, 2, 0, 3};
  std::vector<int64_t> rows(5), offsets(6);
  cpu::group_rows(group.data(), 5, 5, rows.data(), offsets.data());
  CHECK((rows == std::vector<int64_t>{1, 3, 0, 2, 4}));
  CHECK((offsets == std::vector<int64_t>{0, 2, 2, 4, 5, 5}));
}

int main() { return check::run_tests(); }
