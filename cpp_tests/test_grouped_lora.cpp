#include <algorithm>

#include "grouped_lora_problem.h"

using namespace align;
using namespace align::test;

namespace {

template <typename T>
void run(const Problem& problem, Data<T>& data) {
  const GroupedLoraShape& shape = problem.shape;
  const RowGroups row_groups{problem.permuted ? data.rows.data() : nullptr, data.offsets.data()};
  const DropoutArgs dropout{problem.p, problem.p > 0 ? data.rng.data() : nullptr};
  const bool in_place = problem.in_place;
  data.z = unassigned<Acc<T>>(shape.tokens * shape.rank);
  data.y = in_place ? data.y_in : unassigned<T>(shape.tokens * shape.out_dim);
  run_in_workspace(GroupedLoraForwardArgs<T>{.shape = shape,
                                             .row_groups = row_groups,
                                             .dropout = dropout,
                                             .scaling = problem.scaling,
                                             .x = data.x.data(),
                                             .A = data.A.data(),
                                             .B = data.B.data(),
                                             .y_in = in_place ? data.y.data() : data.y_in.data(),
                                             .bias = data.bias.empty() ? nullptr : data.bias.data(),
                                             .z = data.z.data(),
                                             .y = data.y.data(),
                                             .workspace = nullptr},
                   cpu::grouped_lora_forward_workspace(shape, problem.p > 0, sizeof(Acc<T>)),
                   cpu::grouped_lora_forward<T, T>);

  data.dx = in_place ? data.dx_in : unassigned<T>(shape.tokens * shape.in_dim);
  data.dA = unassigned<Acc<T>>(shape.groups * shape.rank * shape.in_dim);
  data.dB = unassigned<Acc<T>>(shape.groups * shape.out_dim * shape.rank);
  const T* dx_in = !problem.gradients_in ? nullptr : in_place ? data.dx.data() : data.dx_in.data();
  run_in_workspace(GroupedLoraBackwardArgs<T>{.shape = shape,
                                              .row_groups = row_groups,
                                              .dropout = dropout,
                                              .scaling = problem.scaling,
                                              .x = data.x.data(),
                                              .z = data.z.data(),
                                              .A = data.A.data(),
                                              .B = data.B.data(),
                                              .dx_in = dx_in,
                                              .dy = data.dy.data(),
                                              .dz_in = problem.gradients_in ? data.dz_in.data() : nullptr,
                                              .dx = data.dx.data(),
                                              .dA = data.dA.data(),
                                              .dB = data.dB.data(),
                                              .workspace = nullptr},
                   cpu::grouped_lora_backward_workspace(shape, problem.p > 0, sizeof(Acc<T>)),
                   cpu::grouped_lora_backward<T, T>);
}

template <typename T>
void check_problem(const Problem& problem) {
  Data<T> data = make_data<T>(problem);
  const Expected want = expect(problem, data);
  test::for_each_vector_width([&] {
    run(problem, data);
    check_tensor<Acc<T>, T>(data.z, want.z, "z");
    check_tensor<T, T>(data.y, want.y, "y", rounds_latents<T>());
    check_tensor<T, T>(data.dx, want.dx, "dx", rounds_latents<T>());
    check_tensor<Acc<T>, T>(data.dA, want.dA, "dA", rounds_latents<T>());
    check_tensor<Acc<T>, T>(data.dB, want.dB, "dB", rounds_latents<T>());
  });
}

void check_all_types(const Problem& problem) {
  const int64_t before = check::failures();
  check_problem<float>(problem);
  check_problem<double>(problem);
  check_problem<bfloat16>(problem);
  check_problem<float16>(problem);
  if (check::failures() != before) print(problem);
}

}  // namespace

TEST(a_tiny_case_gives_the_numbers_worked_out_by_hand) {
  Data<float> data = tiny_data();
  run(kTinyProblem, data);
  check_tiny(data);
}

TEST(kernels_agree_with_naive_loops_for_every_rank) {
  for (int64_t rank : {1, 3, 4, 8, 9, 17, 70}) {
    for (double p : {0.0, 0.3}) check_all_types({{37, 45, 53, rank, 1}, p});
  }
}

TEST(kernels_agree_with_naive_loops_for_every_tail) {
  for (int64_t in_dim : {1, 7, 8, 15, 16, 33, 64, 100}) check_all_types({{9, in_dim, in_dim + 1, 5, 3}, 0.4});
  for (int64_t tokens : {1, 2, 3, 5, 31, 32, 33, 63, 65, 130, 4300}) check_all_types({{tokens, 20, 24, 6, 1}, 0.2});
}

TEST(kernels_agree_with_naive_loops_on_ordinary_shapes) {
  check_all_types({{150, 1700, 300, 8, 1}, 0.1});
  check_all_types({{150, 320, 1088, 16, 4}, 0});
  check_all_types({{600, 40, 3100, 16, 1}, 0});  // several panels of columns, in several blocks of a chunk
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
  run_in_workspace(GroupedLoraBackwardArgs<float>{.shape = problem.shape,
                                                  .row_groups = row_groups,
                                                  .dropout = {problem.p, data.rng.data()},
                                                  .scaling = problem.scaling,
                                                  .x = data.x.data(),
                                                  .z = data.z.data(),
                                                  .A = data.A.data(),
                                                  .B = data.B.data(),
                                                  .dx_in = nullptr,
                                                  .dy = data.dy.data(),
                                                  .dz_in = data.dz_in.data(),
                                                  .dx = nullptr,
                                                  .dA = data.dA.data(),
                                                  .dB = data.dB.data(),
                                                  .workspace = nullptr},
                   cpu::grouped_lora_backward_workspace(problem.shape, true, sizeof(float)),
                   cpu::grouped_lora_backward<float, float>);
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
