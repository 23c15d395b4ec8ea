#include "heads_checks.h"
#include "ops/routed_lora.h"

using namespace align;
using namespace align::test;

namespace {

template <typename T>
struct Kernels {
  static int64_t forward_workspace(const HeadsProblem& problem) {
    return cpu::routed_lora_forward_workspace(problem.shape, problem.routing, problem.p > 0, sizeof(Acc<T>));
  }
  static int64_t backward_workspace(const HeadsProblem& problem) {
    return cpu::routed_lora_backward_workspace(problem.shape, problem.routing, problem.p > 0, sizeof(Acc<T>));
  }
  static void forward(const HeadsProblem& problem, const HeadsForwardArgs<T>& args, HeadsData<T>& data) {
    cpu::routed_lora_forward<T, T>({args, problem.routing, data.R.data(), data.w.data()});
  }
  static void backward(const HeadsProblem& problem, const HeadsBackwardArgs<T>& args, HeadsData<T>& data) {
    const Acc<T>* dw_in = problem.gradients_in ? data.dw_in.data() : nullptr;
    cpu::routed_lora_backward<T, T>({args, problem.routing, data.R.data(), data.w.data(), dw_in, data.dR.data()});
  }
};

}  // namespace

// One token, in_dim 2, rank 1, two heads of two outputs in two groups; the logits of a group are equal.
TEST(a_tiny_case_gives_the_numbers_worked_out_by_hand) {
  const HeadsProblem problem{{1, 2, 2, 1, 2, 0, false, DropoutSite::kNone}, 0, {2, 2, 1}, true, false, true, 2};
  HeadsData<float> data;
  data.x = {1, 2};
  data.A = {3, 1};
  data.B = {4, 2, 0, 6};  // head 0: outputs 0, 1; head 1
  data.R = {1, 1, 1, 1, 0, 1, 2, 0};
  data.y_in = {100, 200};
  data.dy = {1, -1};
  data.dz_in = {1};
  data.dw_in = {0, 0, 0, 8};
  data.dx_in = {10, 20};
  run<Kernels>(problem, data);
  CHECK((data.z == std::vector<float>{5}));
  CHECK((data.w == std::vector<float>{0.5f, 0.5f, 0.5f, 0.5f}));
  CHECK((data.y == std::vector<float>{120, 240}));       // 100 + 2 * 5 * 2, 200 + 2 * 5 * 4
  CHECK((data.dB == std::vector<float>{5, -5, 5, -5}));  // 2 * 0.5 * dy * 5
  CHECK((data.dA == std::vector<float>{-3, -6}));        // dz = 2 * (0.5 * 4 - 0.5 * 8) + 1 = -3
  // dw = 2 * 5 * dy * B + dw_in = 40, 0 | -20, -52;  dlogit = w (dw - mean) = 10, -10 | 8, -8
  CHECK((data.dR == std::vector<float>{10, 20, -10, -20, 8, 16, -8, -16}));
  CHECK((data.dx == std::vector<float>{-15, 25}));  // dx_in + dz A + dlogit R = 10 - 9 - 16, 20 - 3 + 8
}

TEST(kernels_agree_with_naive_loops_for_every_rank_and_site) {
  for (DropoutSite site : kSites) {
    for (int64_t rank : {1, 3, 8, 9, 17}) {
      for (bool A_per_head : {false, true}) {
        check_all_types<Kernels>({{37, 45, 52, rank, 3, rank % 4, A_per_head, site}, 0.3, {4, 2, 0.5}});
      }
    }
  }
}

TEST(kernels_agree_with_naive_loops_for_any_number_of_groups) {
  for (int64_t groups : {1, 2, 3, 6, 30, 60}) {
    check_all_types<Kernels>({{40, 50, 60, 4, 3, 4, false, DropoutSite::kLatent}, 0.1, {groups, 3, 1}});
    check_all_types<Kernels>({{33, 50, 60, 4, 3, 0, true, DropoutSite::kInput}, 0.1, {groups, 2, 1.5}});
  }
}

TEST(kernels_agree_with_naive_loops_for_any_number_of_heads_and_of_chosen_ones) {
  for (int64_t heads : {1, 2, 5, 17}) {
    for (int64_t top_k : {int64_t(1), (heads + 1) / 2, heads}) {
      check_all_types<Kernels>({{40, 50, 60, 4, heads, 4, true, DropoutSite::kInput}, 0.1, {2, top_k, 1}});
      check_all_types<Kernels>({{40, 50, 60, 4, heads, 4, false, DropoutSite::kInputPerHead}, 0.1, {3, top_k, 1}});
    }
  }
}

TEST(kernels_agree_with_naive_loops_for_every_tail) {
  for (int64_t in_dim : {1, 7, 8, 15, 16, 33, 100}) {
    check_all_types<Kernels>({{9, in_dim, in_dim + 1, 5, 3, 2, false, DropoutSite::kLatent}, 0.4, {1, 3, 1}});
  }
  for (int64_t tokens : {1, 2, 31, 32, 33, 65, 130}) {
    check_all_types<Kernels>({{tokens, 20, 24, 6, 2, 0, true, DropoutSite::kLatent}, 0.2, {3, 1, 1}});
  }
}

TEST(kernels_agree_with_naive_loops_on_ordinary_shapes) {
  check_all_types<Kernels>({{100, 700, 300, 8, 3, 8, false, DropoutSite::kInput}, 0.1, {1, 3, 1}});
  check_all_types<Kernels>({{100, 300, 704, 8, 4, 0, true, DropoutSite::kInput}, 0.1, {8, 2, 1}});
}

TEST(optional_gradients_may_be_absent_and_outputs_may_overwrite_what_they_add_to) {
  for (DropoutSite site : kSites) {
    const HeadsShape shape{45, 50, 70, 8, 2, 3, false, site};
    check_all_types<Kernels>({shape, 0.3, {5, 2, 1}, /*gradients_in=*/false});
    check_all_types<Kernels>({shape, 0.3, {5, 2, 1}, true, /*in_place=*/true});
    check_without_dx<Kernels>({shape, 0.3, {5, 2, 1}});
  }
}

TEST(tokens_and_widths_and_rank_may_be_zero) {
  for (bool A_per_head : {false, true}) {
    const DropoutSite site = A_per_head ? DropoutSite::kInput : DropoutSite::kLatent;
    for (const HeadsShape& shape :
         {HeadsShape{0, 8, 8, 4, 2, 1, A_per_head, site}, HeadsShape{5, 0, 8, 4, 2, 1, A_per_head, site},
          HeadsShape{5, 8, 0, 4, 2, 1, A_per_head, site}, HeadsShape{5, 8, 8, 0, 2, 1, A_per_head, site}}) {
      check_all_types<Kernels>({shape, 0.5, {2, 1, 1}});
    }
  }
}

TEST(ties_go_to_the_lowest_head) {
  const HeadsProblem problem{{3, 8, 4, 2, 4, 0, false, DropoutSite::kNone}, 0, {1, 2, 1}};
  HeadsData<float> data = make_data<float>(problem);
  std::fill(data.R.begin(), data.R.end(), 0.f);
  run<Kernels>(problem, data);
  CHECK((data.w == std::vector<float>{0.5f, 0.5f, 0, 0, 0.5f, 0.5f, 0, 0, 0.5f, 0.5f, 0, 0}));
}

TEST(large_logits_do_not_overflow) {
  const HeadsProblem problem{{2, 1, 2, 1, 2, 0, false, DropoutSite::kNone}, 0, {1, 2, 1}};
  HeadsData<float> data = make_data<float>(problem);
  data.x = {3e4f, -3e4f};
  data.R = {1, 0.5f};
  run<Kernels>(problem, data);
  CHECK((data.w == std::vector<float>{1, 0, 0, 1}));
  for (float value : data.dR) CHECK(std::isfinite(value));
}

TEST(results_do_not_depend_on_how_ranges_are_cut) {
  for_each_vector_width([] {
    for (DropoutSite site : kSites) {
      for (bool A_per_head : {false, true}) {
        const HeadsProblem problem{{233, 277, 204, 9, 3, 4, A_per_head, site}, 0.1, {2, 2, 1}};
        check_same_bits<Kernels, float>(problem);
        check_same_bits<Kernels, bfloat16>(problem);
      }
    }
  });
}

int main() { return check::run_tests(); }
