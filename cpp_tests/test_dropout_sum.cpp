#include "heads_checks.h"
#include "ops/dropout_sum.h"

using namespace align;
using namespace align::test;

namespace {

template <typename T>
struct Kernels {
  static int64_t forward_workspace(const HeadsProblem& problem) {
    return cpu::dropout_sum_forward_workspace(problem.shape, problem.p > 0, sizeof(Acc<T>));
  }
  static int64_t backward_workspace(const HeadsProblem& problem) {
    return cpu::dropout_sum_backward_workspace(problem.shape, problem.p > 0, sizeof(Acc<T>));
  }
  static void forward(const HeadsProblem&, const HeadsForwardArgs<T>& args, HeadsData<T>&) {
    cpu::dropout_sum_forward<T, T>(args);
  }
  static void backward(const HeadsProblem&, const HeadsBackwardArgs<T>& args, HeadsData<T>&) {
    cpu::dropout_sum_backward<T, T>(args);
  }
};

}  // namespace

// One token, in_dim 2, rank 1, two heads of one output, and an offset path of rank 1, all integers.
TEST(a_tiny_case_gives_the_numbers_worked_out_by_hand) {
  HeadsProblem problem{{1, 2, 1, 1, 2, 1, false, DropoutSite::kNone}};
  problem.scaling = 2;
  problem.offset_scaling = -3;
  HeadsData<float> data;
  data.x = {1, 2};
  data.A = {3, 1};
  data.B = {5, -7};
  data.A0 = {0, 1};
  data.B0 = {4};
  data.y_in = {100};
  data.dy = {2};
  data.dz_in = {1};
  data.dx_in = {10, 20};
  run<Kernels>(problem, data);
  CHECK((data.z == std::vector<float>{5}));
  CHECK((data.y == std::vector<float>{56}));         // 100 + 2 * 5 * (5 - 7) - 3 * 2 * 4
  CHECK((data.dB == std::vector<float>{20, 20}));    // 2 * 2 * 5
  CHECK((data.dA == std::vector<float>{-7, -14}));   // dz = 2 * 2 * (5 - 7) + 1 = -7
  CHECK((data.dx == std::vector<float>{-11, -11}));  // 10 - 7 * 3, 20 - 7 - 3 * 2 * 4
}

TEST(kernels_agree_with_naive_loops_for_every_rank_and_site) {
  for (DropoutSite site : kSites) {
    for (int64_t rank : {1, 3, 8, 9, 17}) {
      for (double p : {0.0, 0.3}) check_all_types<Kernels>({{37, 45, 53, rank, 3, rank % 4, false, site}, p});
    }
  }
}

TEST(kernels_agree_with_naive_loops_for_every_tail) {
  for (DropoutSite site : kSites) {
    for (int64_t in_dim : {1, 7, 8, 15, 16, 33, 100}) {
      check_all_types<Kernels>({{9, in_dim, in_dim + 1, 5, 3, 2, false, site}, 0.4});
    }
    for (int64_t tokens : {1, 2, 31, 32, 33, 65})
      check_all_types<Kernels>({{tokens, 20, 24, 6, 2, 0, false, site}, 0.2});
  }
}

TEST(kernels_agree_with_naive_loops_for_any_number_of_heads) {
  for (int64_t heads : {1, 2, 5, 17}) {
    check_all_types<Kernels>({{40, 50, 60, 4, heads, 4, false, DropoutSite::kLatent}, 0.1});
    check_all_types<Kernels>({{40, 50, 60, 4, heads, 4, false, DropoutSite::kInputPerHead}, 0.1});
  }
}

TEST(kernels_agree_with_naive_loops_on_ordinary_shapes) {
  check_all_types<Kernels>({{100, 700, 300, 8, 3, 8, false, DropoutSite::kLatent}, 0.1});
  check_all_types<Kernels>({{100, 300, 700, 8, 3, 8, false, DropoutSite::kInputPerHead}, 0.1});
}

TEST(optional_gradients_may_be_absent_and_outputs_may_overwrite_what_they_add_to) {
  for (DropoutSite site : kSites) {
    const HeadsShape shape{45, 50, 70, 8, 2, 3, false, site};
    check_all_types<Kernels>({shape, 0.3, {0, 1, 1}, /*gradients_in=*/false});
    check_all_types<Kernels>({shape, 0.3, {0, 1, 1}, true, /*in_place=*/true});
    check_without_dx<Kernels>({shape, 0.3});
  }
}

TEST(every_size_but_the_number_of_heads_may_be_zero) {
  for (DropoutSite site : kSites) {
    for (const HeadsShape& shape :
         {HeadsShape{0, 8, 8, 4, 2, 1, false, site}, HeadsShape{5, 0, 8, 4, 2, 1, false, site},
          HeadsShape{5, 8, 0, 4, 2, 1, false, site}, HeadsShape{5, 8, 8, 0, 2, 1, false, site}}) {
      check_all_types<Kernels>({shape, 0.5});
      check_all_types<Kernels>({shape, 0});
    }
  }
}

TEST(results_do_not_depend_on_how_ranges_are_cut) {
  for_each_vector_width([] {
    for (DropoutSite site : kSites) {
      const HeadsProblem problem{{333, 277, 201, 9, 3, 4, false, site}, 0.1};
      check_same_bits<Kernels, float>(problem);
      check_same_bits<Kernels, bfloat16>(problem);
    }
  });
}

int main() { return check::run_tests(); }
