// Runs and checks the CUDA kernels of dropout_sum and routed_lora under the SIMT engine.
#pragma once

#include "heads_problem.h"
#include "simt_support.h"

namespace align::test {

using simt::Buffer;

// A router's device memory, for dropout_sum empty.
template <typename TA>
struct RouterBuffers {
  Buffer<TA> R;
  Buffer<float> w, dw_in, dR;
};

// Op<T, TA> has the two passes and their workspaces.
template <template <typename, typename> class Op, typename T, typename TA = T>
void run_cuda(const HeadsProblem& problem, HeadsData<T>& data) {
  const Buffer<uint64_t> rng("rng", data.rng);
  const Buffer<T> x("x", data.x), y_in("y_in", data.y_in), bias("bias", data.bias), dy("dy", data.dy);
  const Buffer<T> dx_in("dx_in", data.dx_in), fresh_y("y", data.y_in.size()), fresh_dx("dx", data.x.size());
  const Buffer<TA> A("A", cast<TA>(data.A)), B("B", cast<TA>(data.B)), A0("A0", cast<TA>(data.A0));
  const Buffer<TA> B0("B0", cast<TA>(data.B0));
  const Buffer<float> dz_in("dz_in", data.dz_in), z("z", data.dz_in.size()), dA("dA", data.A.size());
  const Buffer<float> dB("dB", data.B.size());
  const RouterBuffers<TA> router{
      {"R", cast<TA>(data.R)}, {"w", data.dw_in.size()}, {"dw_in", data.dw_in}, {"dR", data.R.size()}};
  const Buffer<T>&y = problem.in_place ? y_in : fresh_y, &dx = problem.in_place ? dx_in : fresh_dx;
  const bool offset = problem.shape.offset_rank > 0;
  const HeadsInputs<T, TA> inputs{.shape = problem.shape,
                                  .dropout = {problem.p, rng.data()},
                                  .scaling = problem.scaling,
                                  .offset_scaling = problem.offset_scaling,
                                  .x = x.data(),
                                  .A = A.data(),
                                  .B = B.data(),
                                  .A0 = offset ? A0.data() : nullptr,
                                  .B0 = offset ? B0.data() : nullptr};
  {
    const Buffer<char> workspace("partials", Op<T, TA>::forward_workspace(problem, inputs, router));
    Op<T, TA>::forward(
        problem, {inputs, y_in.data(), data.bias.empty() ? nullptr : bias.data(), z.data(), y.data(), workspace.data()},
        router);
  }
  const Buffer<char> workspace("partials", Op<T, TA>::backward_workspace(problem, inputs, router));
  Op<T, TA>::backward(problem,
                      {.inputs = inputs,
                       .z = z.data(),
                       .dx_in = problem.gradients_in && problem.dx_wanted ? dx_in.data() : nullptr,
                       .dy = dy.data(),
                       .dz_in = problem.gradients_in ? dz_in.data() : nullptr,
                       .dx = problem.dx_wanted ? dx.data() : nullptr,
                       .dA = dA.data(),
                       .dB = dB.data(),
                       .workspace = workspace.data()},
                      router);
  data.z = z.host(), data.y = y.host(), data.dx = dx.host(), data.dA = dA.host(), data.dB = dB.host();
  data.w = router.w.host(), data.dR = router.dR.host();
}

template <typename T>
void check_results(const HeadsProblem& problem, const HeadsData<T>& data, const HeadsExpected& want) {
  const int64_t before = check::failures();
  check_tensor<float, T>(data.z, want.z, "z");
  check_tensor<float, T>(data.w, want.w, "w");
  check_tensor<T, T>(data.y, want.y, "y", true);
  if (problem.dx_wanted) check_tensor<T, T>(data.dx, want.dx, "dx", true);
  check_tensor<float, T>(data.dA, want.dA, "dA", true);
  check_tensor<float, T>(data.dB, want.dB, "dB", true);
  check_tensor<float, T>(data.dR, want.dR, "dR", true);
  CHECK(clean());
  if (check::failures() != before) print(problem);
}

// One thread order.
template <template <typename, typename> class Op, typename T, typename TA = T>
void check_cuda(const HeadsProblem& problem, int major = 9) {
  HeadsData<T> data = make_data<T>(problem);
  const HeadsExpected want = HeadsOracle<T>(problem, data).want;
  simt::options() = {};
  simt::options().major = major;
  simt::options().traffic = false;
  simt::reports().clear();
  run_cuda<Op, T, TA>(problem, data);
  check_results(problem, data, want);
}

template <template <typename, typename> class Op>
void check_all_types(const HeadsProblem& problem) {
  check_cuda<Op, float>(problem);
  check_cuda<Op, bfloat16>(problem);
  check_cuda<Op, float16>(problem);
}

template <template <typename, typename> class Op, typename T>
void check_every_order(const HeadsProblem& problem) {
  HeadsData<T> data = make_data<T>(problem);
  const HeadsExpected want = HeadsOracle<T>(problem, data).want;
  std::vector<HeadsData<T>> all;
  for_each_order([&] {
    simt::options().traffic = false;
    run_cuda<Op, T>(problem, data);
    check_results(problem, data, want);
    all.push_back(data);
  });
  for (const HeadsData<T>& one : all) {
    CHECK(check::same_bits(one.z, all[0].z) && check::same_bits(one.w, all[0].w) && check::same_bits(one.y, all[0].y) &&
          check::same_bits(one.dx, all[0].dx));
    CHECK(check::same_bits(one.dA, all[0].dA) && check::same_bits(one.dB, all[0].dB) &&
          check::same_bits(one.dR, all[0].dR));
  }
}

}  // namespace align::test
