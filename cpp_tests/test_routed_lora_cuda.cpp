// The CUDA kernels of routed_lora, unmodified, under the SIMT engine.
#include "heads_cuda.h"

using namespace align;
using namespace align::test;

namespace {

template <typename T, typename TA>
struct Op {
  using Inputs = HeadsInputs<T, TA>;
  static int64_t forward_workspace(const HeadsProblem& problem, const Inputs& inputs, const RouterBuffers<TA>& router) {
    return cuda::routed_lora_forward_workspace<T, TA>(inputs, router.R.data(), problem.routing);
  }
  static int64_t backward_workspace(const HeadsProblem& problem, const Inputs& inputs,
                                    const RouterBuffers<TA>& router) {
    return cuda::routed_lora_backward_workspace<T, TA>(inputs, router.R.data(), problem.routing);
  }
  static void forward(const HeadsProblem& problem, const HeadsForwardArgs<T, TA>& args,
                      const RouterBuffers<TA>& router) {
    cuda::routed_lora_forward<T, TA>({args, problem.routing, router.R.data(), router.w.data()}, nullptr);
  }
  static void backward(const HeadsProblem& problem, const HeadsBackwardArgs<T, TA>& args,
                       const RouterBuffers<TA>& router) {
    const float* dw_in = problem.gradients_in ? router.dw_in.data() : nullptr;
    cuda::routed_lora_backward<T, TA>(
        {args, problem.routing, router.R.data(), router.w.data(), dw_in, router.dR.data()}, nullptr);
  }
};

Routing routing(int64_t top_k, int64_t groups = 1) { return {groups, top_k, 0.7}; }

}  // namespace

TEST(kernels_agree_with_naive_loops_for_every_site_with_one_A_and_an_A_per_head) {
  for (DropoutSite site : kSites) {
    for (bool A_per_head : {false, true}) {
      for (int64_t rank : {1, 8}) check_all_types<Op>({{40, 72, 56, rank, 5, 3, A_per_head, site}, 0.3, routing(5)});
      check_all_types<Op>({{150, 72, 56, 9, 3, 0, A_per_head, site}, 0.3, routing(2)});
    }
  }
}

TEST(kernels_agree_with_naive_loops_for_every_top_k) {
  for (int64_t top_k : {1, 2, 4})
    check_all_types<Op>({{20, 40, 24, 4, 4, 0, true, DropoutSite::kInput}, 0.2, routing(top_k)});
  check_all_types<Op>({{20, 40, 24, 4, 1, 0, false, DropoutSite::kInput}, 0.2, routing(1)});
}

TEST(kernels_agree_with_naive_loops_where_columns_or_ranks_are_split) {
  check_cuda<Op, bfloat16>({{140, 600, 608, 8, 5, 8, false, DropoutSite::kInput}, 0.1, routing(5)});
  check_cuda<Op, float>({{140, 300, 304, 8, 3, 0, false, DropoutSite::kLatent}, 0.1, routing(3)});
  check_cuda<Op, bfloat16>({{20, 72, 56, 17, 5, 17, true, DropoutSite::kInput}, 0.1, routing(5)});   // chunks of 64
  check_cuda<Op, float>({{20, 72, 56, 17, 5, 17, false, DropoutSite::kInput}, 0.1, routing(5)}, 7);  // and of 16
}

// Groups of less than a unit of 16 bytes, of less than a tile, and of one column; 80 columns of logits.
TEST(kernels_agree_with_naive_loops_for_any_number_of_groups) {
  for (int64_t groups : {2, 4, 7, 8, 56}) {
    check_all_types<Op>({{20, 40, 56, 5, 3, 2, false, DropoutSite::kLatent}, 0.3, routing(2, groups)});
  }
  for (DropoutSite site : kSites) {
    check_all_types<Op>({{40, 72, 2 * 72, 8, 3, 8, site == DropoutSite::kNone, site}, 0.3, routing(3, 2)});
  }
  check_all_types<Op>({{20, 40, 128, 8, 5, 0, false, DropoutSite::kInput}, 0.3, routing(5, 16)});
}

// Splits that begin within a group, groups of several tiles, ranks in several chunks, the plain path.
TEST(kernels_agree_with_naive_loops_where_groups_and_slabs_cross) {
  for (int64_t groups : {2, 5}) {
    check_cuda<Op, bfloat16>({{140, 72, 5 * 168, 8, 5, 8, false, DropoutSite::kInput}, 0.1, routing(5, groups)});
    check_cuda<Op, float>({{140, 72, 5 * 88, 8, 3, 0, false, DropoutSite::kLatent}, 0.1, routing(3, groups)});
  }
  check_cuda<Op, bfloat16>({{20, 72, 4 * 104, 17, 5, 17, true, DropoutSite::kInput}, 0.1, routing(5, 4)});
  check_cuda<Op, bfloat16>({{20, 72, 4 * 104, 17, 5, 17, true, DropoutSite::kInputPerHead}, 0.1, routing(5, 4)});
  check_cuda<Op, float>({{20, 72, 4 * 60, 17, 5, 17, false, DropoutSite::kInput}, 0.1, routing(5, 4)}, 7);
  check_cuda<Op, float16, float>({{20, 72, 4 * 60, 9, 3, 3, false, DropoutSite::kInput}, 0.1, routing(2, 4)}, 7);
}

// The chunks of dA, dR and dB need not have the same rows.
TEST(kernels_agree_with_naive_loops_where_rows_are_cut_into_chunks) {
  for (DropoutSite site : kSites) {
    for (bool A_per_head : {false, true}) {
      check_cuda<Op, bfloat16>({{520, 24, 16, 8, 2, 3, A_per_head, site}, 0.3, routing(2)});
    }
    check_cuda<Op, float>({{520, 24, 2 * 12, 7, 2, 0, false, site}, 0.3, routing(1, 2)});
  }
  check_cuda<Op, bfloat16>({{1030, 24, 16, 8, 3, 2, false, DropoutSite::kInputPerHead}, 0.3, routing(3)});
  check_cuda<Op, float16>({{1030, 24, 8, 3, 3, 0, false, DropoutSite::kInput}, 0, routing(3)});
}

TEST(adapters_and_router_may_be_float_on_16_bit_inputs) {
  check_cuda<Op, bfloat16, float>({{40, 72, 56, 8, 3, 8, false, DropoutSite::kLatent}, 0.2, routing(3)});
  check_cuda<Op, float16, float>({{40, 71, 57, 5, 3, 2, false, DropoutSite::kInput}, 0.2, routing(3)});
}

TEST(optional_gradients_may_be_absent_and_outputs_may_overwrite_what_they_add_to) {
  for (DropoutSite site : kSites) {
    const HeadsShape shape{45, 56, 72, 8, 2, 3, false, site};
    check_all_types<Op>({shape, 0.3, routing(2), /*gradients_in=*/false});
    check_all_types<Op>({shape, 0.3, routing(2), true, /*in_place=*/true});
    check_all_types<Op>({shape, 0.3, routing(2), true, false, /*dx_wanted=*/false});
  }
}

TEST(no_order_of_threads_makes_an_error_or_changes_a_bit) {
  check_every_order<Op, bfloat16>({{140, 72, 136, 8, 5, 8, false, DropoutSite::kInput}, 0.1, routing(5)});
  check_every_order<Op, float>({{40, 72, 40, 8, 2, 8, true, DropoutSite::kLatent}, 0.1, routing(1)});
  check_every_order<Op, bfloat16>({{140, 72, 3 * 72, 8, 3, 8, false, DropoutSite::kInput}, 0.1, routing(3, 3)});
  check_every_order<Op, bfloat16>({{515, 24, 16, 8, 2, 0, false, DropoutSite::kInput}, 0.1, routing(2)});
  check_every_order<Op, float>({{40, 40, 5 * 24, 8, 2, 0, true, DropoutSite::kInputPerHead}, 0.1, routing(2, 5)});
}

// A group of outputs has latent rows and partials of its own, but no pass over dy or y.
TEST(streamed_operands_move_as_often_for_many_groups_as_for_one) {
  for (int64_t groups : {1, 8}) {
    const HeadsProblem problem{{256, 512, 8 * 176, 8, 5, 8, false, DropoutSite::kNone}, 0, routing(5, groups)};
    HeadsData<bfloat16> data = make_data<bfloat16>(problem);
    simt::options() = {};
    simt::reports().clear();
    run_cuda<Op>(problem, data);
    CHECK(clean());
    CHECK(simt::reports().size() == 6);
    const auto moved = [](simt::Op op, const char* buffer) {
      int64_t sectors = 0;
      for (const simt::Report& report : simt::reports()) sectors += report.global(op, buffer).sectors;
      return sectors;
    };
    const int64_t x = 256 * 512 * 2 / 32, y = 256 * 8 * 176 * 2 / 32;
    CHECK(moved(simt::Op::kLoad, "x") == 2 * x && moved(simt::Op::kLoad, "dy") == 2 * y);
    CHECK(moved(simt::Op::kLoad, "y_in") == y && moved(simt::Op::kStore, "y") == y);
    CHECK(moved(simt::Op::kLoad, "dx_in") == x && moved(simt::Op::kStore, "dx") == x);
  }
}

// [A; R] x is one pass over x, and so are dA and dR, whatever dropout does to one of them.
TEST(x_is_read_once_in_each_direction) {
  const HeadsProblem problem{{256, 512, 128, 8, 5, 0, false, DropoutSite::kInput}, 0.1, routing(5)};
  HeadsData<bfloat16> data = make_data<bfloat16>(problem);
  simt::options() = {};
  simt::reports().clear();
  run_cuda<Op>(problem, data);
  CHECK(clean());
  CHECK(simt::reports().size() == 6);  // and two vendor's products: 8 launches
  for (int i = 0; i < 6; ++i) {
    CHECK(simt::reports()[i].global(simt::Op::kLoad, "x").sectors == (i == 0 || i == 5 ? 256 * 512 * 2 / 32 : 0));
  }
}

int main() { return check::run_tests(); }
