// The CUDA kernels of dropout_sum, unmodified, under the SIMT engine.
#include "heads_cuda.h"
#include "ops/dropout_sum.h"

using namespace align;
using namespace align::test;

namespace {

template <typename T, typename TA>
struct Op {
  using Inputs = HeadsInputs<T, TA>;
  static int64_t forward_workspace(const HeadsProblem&, const Inputs& inputs, const RouterBuffers<TA>&) {
    return cuda::dropout_sum_forward_workspace(inputs);
  }
  static int64_t backward_workspace(const HeadsProblem&, const Inputs& inputs, const RouterBuffers<TA>&) {
    return cuda::dropout_sum_backward_workspace(inputs);
  }
  static void forward(const HeadsProblem&, const HeadsForwardArgs<T, TA>& args, const RouterBuffers<TA>&) {
    cuda::dropout_sum_forward<T, TA>(args, nullptr);
  }
  static void backward(const HeadsProblem&, const HeadsBackwardArgs<T, TA>& args, const RouterBuffers<TA>&) {
    cuda::dropout_sum_backward<T, TA>(args, nullptr);
  }
};

}  // namespace

TEST(kernels_agree_with_naive_loops_for_every_rank_and_site) {
  for (DropoutSite site : kSites) {
    for (int64_t rank : {1, 4, 8, 9}) check_all_types<Op>({{40, 72, 56, rank, 5, rank % 4, false, site}, 0.3});
  }
  for (DropoutSite site : {DropoutSite::kLatent, DropoutSite::kInputPerHead}) {
    check_all_types<Op>({{20, 72, 56, 17, 5, 17, false, site}, 0.3});  // two or three chunks of 64
  }
  check_all_types<Op>({{20, 72, 56, 8, 3, 2, false, DropoutSite::kInputPerHead}, 0});
}

TEST(kernels_agree_with_naive_loops_for_every_tail) {
  for (int64_t dim : {1, 7, 33, 65})
    check_all_types<Op>({{9, dim, dim + 1, 5, 3, 2, false, DropoutSite::kLatent}, 0.4});
  for (int64_t tokens : {1, 127, 129}) {
    check_all_types<Op>({{tokens, 24, 40, 6, 2, 6, false, DropoutSite::kLatent}, 0.2});
  }
}

TEST(kernels_agree_with_naive_loops_where_columns_are_split) {
  check_cuda<Op, bfloat16>({{140, 600, 608, 8, 5, 8, false, DropoutSite::kLatent}, 0.1});
  check_cuda<Op, float>({{140, 300, 304, 8, 3, 0, false, DropoutSite::kInput}, 0.1});
  check_cuda<Op, bfloat16>({{140, 600, 304, 8, 5, 8, false, DropoutSite::kInputPerHead}, 0.1});
  check_cuda<Op, float>({{140, 300, 152, 20, 2, 0, false, DropoutSite::kInputPerHead}, 0.1});
}

TEST(kernels_agree_with_naive_loops_where_rows_are_cut_into_chunks) {
  for (DropoutSite site : kSites) check_cuda<Op, bfloat16>({{520, 24, 40, 8, 2, 3, false, site}, 0.3});
  check_cuda<Op, float>({{1030, 24, 16, 8, 3, 2, false, DropoutSite::kInputPerHead}, 0.3});
  check_cuda<Op, bfloat16>({{2050, 16, 16, 9, 8, 0, false, DropoutSite::kLatent}, 0.3});  // two chunks of 64 ranks
}

TEST(adapters_may_be_float_on_16_bit_inputs) {
  check_cuda<Op, bfloat16, float>({{40, 72, 56, 8, 3, 8, false, DropoutSite::kLatent}, 0.2});
  check_cuda<Op, float16, float>({{40, 71, 57, 5, 3, 2, false, DropoutSite::kInput}, 0.2});
}

TEST(before_sm_80_ordinary_multiply_adds_do_the_same) {
  check_cuda<Op, float>({{40, 72, 56, 8, 5, 8, false, DropoutSite::kLatent}, 0.2}, 7);
  check_cuda<Op, float16>({{40, 72, 56, 8, 5, 8, false, DropoutSite::kInput}, 0.2}, 7);
  check_cuda<Op, float16>({{40, 72, 56, 9, 3, 8, false, DropoutSite::kInputPerHead}, 0.2}, 7);
  check_cuda<Op, float>({{40, 67, 56, 20, 2, 8, false, DropoutSite::kInputPerHead}, 0.2}, 7);
}

TEST(optional_gradients_may_be_absent_and_outputs_may_overwrite_what_they_add_to) {
  for (DropoutSite site : kSites) {
    const HeadsShape shape{45, 56, 72, 8, 2, 3, false, site};
    check_all_types<Op>({shape, 0.3, {0, 1, 1}, /*gradients_in=*/false});
    check_all_types<Op>({shape, 0.3, {0, 1, 1}, true, /*in_place=*/true});
    check_all_types<Op>({shape, 0.3, {0, 1, 1}, true, false, /*dx_wanted=*/false});
  }
}

TEST(every_size_but_the_number_of_heads_may_be_zero) {
  const DropoutSite site = DropoutSite::kLatent;
  for (const HeadsShape& shape : {HeadsShape{0, 8, 8, 4, 2, 1, false, site}, HeadsShape{5, 0, 8, 4, 2, 1, false, site},
                                  HeadsShape{5, 8, 0, 4, 2, 1, false, site}, HeadsShape{5, 8, 8, 0, 2, 1, false, site},
                                  HeadsShape{5, 8, 8, 0, 2, 0, false, site}}) {
    check_all_types<Op>({shape, 0.5});
  }
}

TEST(no_order_of_threads_makes_an_error_or_changes_a_bit) {
  check_every_order<Op, bfloat16>({{140, 72, 136, 8, 5, 8, false, DropoutSite::kLatent}, 0.1});
  check_every_order<Op, float>({{40, 72, 40, 8, 2, 8, false, DropoutSite::kInput}, 0.1});
  check_every_order<Op, bfloat16>({{140, 136, 72, 8, 3, 8, false, DropoutSite::kInputPerHead}, 0.1});
}

// All heads cost one pass: x is read by shrink and for dA, dy by shrink and for dB, y and dx once each way.
TEST(streamed_operands_move_as_often_for_five_heads_as_for_one) {
  for (int64_t heads : {1, 5}) {
    const HeadsProblem problem{{256, 1024, 512, 8, heads, 8, false, DropoutSite::kLatent}, 0.1};
    HeadsData<bfloat16> data = make_data<bfloat16>(problem);
    simt::options() = {};
    simt::reports().clear();
    run_cuda<Op>(problem, data);
    CHECK(clean());
    CHECK(simt::reports().size() == 6);  // and two vendor's products: 8 launches
    const auto moved = [](simt::Op op, const char* buffer) {
      int64_t sectors = 0;
      for (const simt::Report& report : simt::reports()) sectors += report.global(op, buffer).sectors;
      return sectors;
    };
    const int64_t x = 256 * 1024 * 2 / 32, y = 256 * 512 * 2 / 32;
    CHECK(moved(simt::Op::kLoad, "x") == 2 * x && moved(simt::Op::kLoad, "dy") == 2 * y);
    CHECK(moved(simt::Op::kLoad, "y_in") == y && moved(simt::Op::kStore, "y") == y);
    CHECK(moved(simt::Op::kLoad, "dx_in") == x && moved(simt::Op::kStore, "dx") == x);
  }
}

TEST(x_is_read_once_in_each_direction_for_the_masks_of_all_heads) {
  const HeadsProblem problem{{256, 512, 128, 8, 5, 8, false, DropoutSite::kInputPerHead}, 0.1};
  HeadsData<bfloat16> data = make_data<bfloat16>(problem);
  simt::options() = {};
  simt::reports().clear();
  run_cuda<Op>(problem, data);
  CHECK(clean());
  const int64_t x = 256 * 512 * 2 / 32;
  CHECK(simt::reports().size() == 6);
  CHECK(simt::reports()[0].global(simt::Op::kLoad, "x").sectors == x);
  CHECK(simt::reports()[5].global(simt::Op::kLoad, "x").sectors == x);
  CHECK(simt::reports()[5].global(simt::Op::kLoad, "dx_in").sectors == x);
  CHECK(simt::reports()[5].global(simt::Op::kStore, "dx").sectors == x);
}

int main() { return check::run_tests(); }
