// Runs and checks the CPU kernels of dropout_sum and routed_lora. Kernels<T> has their two passes and workspaces.
#pragma once

#include "heads_problem.h"

namespace align::test {

template <typename T>
HeadsInputs<T> inputs_of(const HeadsProblem& problem, const HeadsData<T>& data) {
  const bool offset = problem.shape.offset_rank > 0;
  return {.shape = problem.shape,
          .dropout = {problem.p, problem.p > 0 ? data.rng.data() : nullptr},
          .scaling = problem.scaling,
          .offset_scaling = problem.offset_scaling,
          .x = data.x.data(),
          .A = data.A.data(),
          .B = data.B.data(),
          .A0 = offset ? data.A0.data() : nullptr,
          .B0 = offset ? data.B0.data() : nullptr};
}

template <template <typename> class Kernels, typename T>
void run(const HeadsProblem& problem, HeadsData<T>& data) {
  const bool in_place = problem.in_place;
  const HeadsInputs<T> inputs = inputs_of(problem, data);
  data.z = unassigned<Acc<T>>(problem.latents());
  data.w = unassigned<Acc<T>>(problem.factors());
  data.y = in_place ? data.y_in : unassigned<T>(data.y_in.size());
  run_in_workspace(
      HeadsForwardArgs<T>{inputs, in_place ? data.y.data() : data.y_in.data(),
                          data.bias.empty() ? nullptr : data.bias.data(), data.z.data(), data.y.data(), nullptr},
      Kernels<T>::forward_workspace(problem),
      [&](const HeadsForwardArgs<T>& args) { Kernels<T>::forward(problem, args, data); });
  data.dx = in_place ? data.dx_in : unassigned<T>(data.dx_in.size());
  data.dA = unassigned<Acc<T>>(data.A.size());
  data.dB = unassigned<Acc<T>>(data.B.size());
  data.dR = unassigned<Acc<T>>(data.R.size());
  const T* dx_in = in_place ? data.dx.data() : data.dx_in.data();
  run_in_workspace(HeadsBackwardArgs<T>{.inputs = inputs,
                                        .z = data.z.data(),
                                        .dx_in = problem.gradients_in && problem.dx_wanted ? dx_in : nullptr,
                                        .dy = data.dy.data(),
                                        .dz_in = problem.gradients_in ? data.dz_in.data() : nullptr,
                                        .dx = problem.dx_wanted ? data.dx.data() : nullptr,
                                        .dA = data.dA.data(),
                                        .dB = data.dB.data(),
                                        .workspace = nullptr},
                   Kernels<T>::backward_workspace(problem),
                   [&](const HeadsBackwardArgs<T>& args) { Kernels<T>::backward(problem, args, data); });
}

template <template <typename> class Kernels, typename T>
void check_problem(const HeadsProblem& problem) {
  HeadsData<T> data = make_data<T>(problem);
  const HeadsExpected want = HeadsOracle<T>(problem, data).want;
  for_each_vector_width([&] {
    run<Kernels>(problem, data);
    check_tensor<Acc<T>, T>(data.z, want.z, "z");
    check_tensor<Acc<T>, T>(data.w, want.w, "w");
    check_tensor<T, T>(data.y, want.y, "y", rounds_latents<T>());
    check_tensor<T, T>(data.dx, want.dx, "dx", rounds_latents<T>());
    check_tensor<Acc<T>, T>(data.dA, want.dA, "dA", rounds_latents<T>());
    check_tensor<Acc<T>, T>(data.dB, want.dB, "dB", rounds_latents<T>());
    check_tensor<Acc<T>, T>(data.dR, want.dR, "dR", rounds_latents<T>());
  });
}

template <template <typename> class Kernels>
void check_all_types(const HeadsProblem& problem) {
  const int64_t before = check::failures();
  check_problem<Kernels, float>(problem);
  check_problem<Kernels, double>(problem);
  check_problem<Kernels, bfloat16>(problem);
  check_problem<Kernels, float16>(problem);
  if (check::failures() != before) print(problem);
}

// The same bits however ranges are cut.
template <template <typename> class Kernels, typename T>
void check_same_bits(const HeadsProblem& problem) {
  HeadsData<T> serial = make_data<T>(problem), again = serial;
  run<Kernels>(problem, serial);
  for_each_parallel_for([&] {
    run<Kernels>(problem, again);
    CHECK(check::same_bits(again.z, serial.z) && check::same_bits(again.w, serial.w));
    CHECK(check::same_bits(again.y, serial.y) && check::same_bits(again.dx, serial.dx));
    CHECK(check::same_bits(again.dA, serial.dA) && check::same_bits(again.dB, serial.dB));
    CHECK(check::same_bits(again.dR, serial.dR));
  });
}

// Without dx the other gradients are what they are with it.
template <template <typename> class Kernels>
void check_without_dx(HeadsProblem problem) {
  HeadsData<float> with = make_data<float>(problem), without = with;
  run<Kernels>(problem, with);
  problem.dx_wanted = false;
  run<Kernels>(problem, without);
  CHECK(check::same_bits(without.dA, with.dA) && check::same_bits(without.dB, with.dB));
  CHECK(check::same_bits(without.dR, with.dR));
}

}  // namespace align::test
