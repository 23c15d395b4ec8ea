// The CPU kernels of sibling_lora against naive loops in double, for each vector width.
#include "sibling_lora_problem.h"

using namespace align;
using namespace align::test;

namespace {

template <typename T>
void run(const SiblingProblem& problem, SiblingData<T>& data) {
  const DropoutArgs dropout{problem.p, problem.p > 0 ? data.layers[0].rng.data() : nullptr};
  const int64_t tokens = problem.tokens;
  const std::vector<int64_t> offsets{0, tokens};
  SiblingLoraForwardArgs<T> forward{problem.count(), {}, nullptr};
  SiblingLoraBackwardArgs<T> backward{problem.count(), {}, nullptr};
  std::vector<T>& dx = data.layers[0].dx;
  dx = unassigned<T>(tokens * problem.in_dim);
  for (int i = 0; i < problem.count(); ++i) {
    const Problem of_layer = problem.layer(i);
    const GroupedLoraShape& shape = of_layer.shape;
    Data<T>& layer = data.layers[i];
    layer.z = unassigned<Acc<T>>(tokens * shape.rank), layer.y = unassigned<T>(tokens * shape.out_dim);
    layer.dA = unassigned<Acc<T>>(shape.rank * shape.in_dim), layer.dB = unassigned<Acc<T>>(shape.out_dim * shape.rank);
    forward.layers[i] = {.shape = shape,
                         .row_groups = {nullptr, offsets.data()},
                         .dropout = dropout,
                         .scaling = of_layer.scaling,
                         .x = layer.x.data(),
                         .A = layer.A.data(),
                         .B = layer.B.data(),
                         .y_in = layer.y_in.data(),
                         .bias = layer.bias.data(),
                         .z = layer.z.data(),
                         .y = layer.y.data(),
                         .workspace = nullptr};
    backward.layers[i] = {.shape = shape,
                          .row_groups = {nullptr, offsets.data()},
                          .dropout = dropout,
                          .scaling = of_layer.scaling,
                          .x = layer.x.data(),
                          .z = layer.z.data(),
                          .A = layer.A.data(),
                          .B = layer.B.data(),
                          .dx_in = problem.gradients_in ? data.layers[0].dx_in.data() : nullptr,
                          .dy = layer.dy.data(),
                          .dz_in = problem.gradients_in ? layer.dz_in.data() : nullptr,
                          .dx = problem.dx_wanted ? dx.data() : nullptr,
                          .dA = layer.dA.data(),
                          .dB = layer.dB.data(),
                          .workspace = nullptr};
  }
  const bool masks = problem.p > 0;
  run_in_workspace(forward, cpu::sibling_lora_forward_workspace(problem.shape(), masks, sizeof(Acc<T>)),
                   cpu::sibling_lora_forward<T, T>);
  run_in_workspace(backward, cpu::sibling_lora_backward_workspace(problem.shape(), masks, sizeof(Acc<T>)),
                   cpu::sibling_lora_backward<T, T>);
}

template <typename T>
void check_problem(const SiblingProblem& problem) {
  SiblingData<T> data = make_data<T>(problem);
  test::for_each_vector_width([&] {
    run(problem, data);
    check_results(problem, data, sizeof(T) == 2);  // dx is rounded once a layer
  });
}

void check_all_types(const SiblingProblem& problem) {
  check_problem<float>(problem);
  check_problem<double>(problem);
  check_problem<bfloat16>(problem);
  check_problem<float16>(problem);
}

}  // namespace

TEST(layers_agree_with_naive_loops) {
  for (double p : {0.0, 0.3}) {
    check_all_types({90, 72, {{40, 8}, {24, 8}, {24, 8}}, p});
    check_all_types({33, 31, {{17, 3}, {40, 20}}, p});
    check_all_types({20, 16, {{8, 70}}, p});
  }
}

TEST(optional_gradients_may_be_absent) {
  check_all_types({20, 24, {{16, 4}, {8, 4}}, 0.3, /*gradients_in=*/false});
  check_all_types({20, 24, {{16, 4}, {8, 4}}, 0.3, true, /*dx_wanted=*/false});
}

TEST(there_may_be_no_rows) { check_all_types({0, 8, {{8, 4}, {8, 4}}, 0.5}); }

int main() { return check::run_tests(); }
