// The CPU kernels of sibling_lora against naive loops in double, for each vector width.
#include "sibling_lora_problem.h"

using namespace align;
using namespace align::test;

namespace {

template <typename T>
void run(const SiblingProblem& problem, SiblingData<T>& data) {
  SiblingLoraForwardArgs<T> forward{problem.count(), {}, nullptr};
  SiblingLoraBackwardArgs<T> backward{problem.count(), {}, nullptr};
  HeadsData<T>& first = data.layers[0];
  first.dx = unassigned<T>(problem.tokens * problem.in_dim);
  for (int i = 0; i < problem.count(); ++i) {
    const HeadsProblem of_layer = problem.layer(i);
    HeadsData<T>& layer = data.layers[i];
    layer.z = unassigned<Acc<T>>(of_layer.latents()), layer.w = unassigned<Acc<T>>(of_layer.factors());
    layer.y = unassigned<T>(int64_t(layer.dy.size()));
    layer.dA = unassigned<Acc<T>>(int64_t(layer.A.size())), layer.dB = unassigned<Acc<T>>(int64_t(layer.B.size()));
    layer.dR = unassigned<Acc<T>>(int64_t(layer.R.size()));
    const HeadsInputs<T> inputs{.shape = of_layer.shape,
                                .dropout = {problem.p, problem.p > 0 ? first.rng.data() : nullptr},
                                .scaling = of_layer.scaling,
                                .offset_scaling = of_layer.offset_scaling,
                                .x = first.x.data(),
                                .A = layer.A.data(),
                                .B = layer.B.data(),
                                .A0 = layer.A0.data(),
                                .B0 = layer.B0.data()};
    forward.layers[i] = {{inputs, layer.y_in.data(), layer.bias.data(), layer.z.data(), layer.y.data(), nullptr},
                         of_layer.routing,
                         layer.R.data(),
                         layer.w.data()};
    backward.layers[i] = {{.inputs = inputs,
                           .z = layer.z.data(),
                           .dx_in = problem.gradients_in ? first.dx_in.data() : nullptr,
                           .dy = layer.dy.data(),
                           .dz_in = problem.gradients_in ? layer.dz_in.data() : nullptr,
                           .dx = problem.dx_wanted ? first.dx.data() : nullptr,
                           .dA = layer.dA.data(),
                           .dB = layer.dB.data(),
                           .workspace = nullptr},
                          of_layer.routing,
                          layer.R.data(),
                          layer.w.data(),
                          problem.gradients_in ? layer.dw_in.data() : nullptr,
                          layer.dR.data()};
  }
  run_in_workspace(forward, cpu::sibling_lora_workspace(forward), cpu::sibling_lora_forward<T, T>);
  run_in_workspace(backward, cpu::sibling_lora_workspace(backward), cpu::sibling_lora_backward<T, T>);
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

TEST(layers_with_heads_and_routers_agree_with_naive_loops) {
  for (const SiblingKind& kind : {kMLora, kPissa, kHydra, kRLora, kLoraMoe}) {
    for (double p : {0.0, 0.3}) {
      check_all_types({40, 72, {{40, 8}, {24, 8}, {24, 8}}, p, kind});
      check_all_types({33, 31, {{18, 3}, {40, 5}}, p, kind});
    }
  }
}

TEST(optional_gradients_may_be_absent) {
  for (const SiblingKind& kind : {SiblingKind{}, kRLora}) {
    check_all_types({20, 24, {{16, 4}, {8, 4}}, 0.3, kind, /*gradients_in=*/false});
    check_all_types({20, 24, {{16, 4}, {8, 4}}, 0.3, kind, true, /*dx_wanted=*/false});
  }
}

TEST(there_may_be_no_rows) {
  for (const SiblingKind& kind : {SiblingKind{}, kHydra}) check_all_types({0, 8, {{8, 4}, {8, 4}}, 0.5, kind});
}

int main() { return check::run_tests(); }
