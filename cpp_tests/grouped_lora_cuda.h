// Runs and checks the CUDA kernels of grouped_lora under the SIMT engine.
#pragma once

#include "grouped_lora_problem.h"
#include "simt_support.h"

namespace align::test {

using simt::Buffer;

// TA: the type of the adapters.
template <typename T, typename TA = T>
void run_cuda(const Problem& problem, Data<T>& data) {
  const GroupedLoraShape& shape = problem.shape;
  const Buffer<int64_t> rows("rows", data.rows), offsets("offsets", data.offsets);
  const Buffer<uint64_t> rng("rng", data.rng);
  const RowGroups row_groups{problem.permuted ? rows.data() : nullptr, shape.groups == 1 ? nullptr : offsets.data()};
  const DropoutArgs dropout{problem.p, rng.data()};
  const Buffer<T> x("x", data.x), y_in("y_in", data.y_in), bias("bias", data.bias), dy("dy", data.dy);
  const Buffer<T> dx_in("dx_in", data.dx_in), fresh_y("y", data.y_in.size()), fresh_dx("dx", data.x.size());
  const Buffer<TA> A("A", cast<TA>(data.A)), B("B", cast<TA>(data.B));
  const Buffer<float> dz_in("dz_in", data.dz_in), z("z", data.dz_in.size()), dA("dA", data.A.size());
  const Buffer<float> dB("dB", data.B.size());
  const Buffer<T>&y = problem.in_place ? y_in : fresh_y, &dx = problem.in_place ? dx_in : fresh_dx;
  {
    const Buffer<char> workspace("partials", cuda::grouped_lora_forward_workspace(shape, sizeof(T)));
    cuda::grouped_lora_forward<T, TA>({.shape = shape,
                                       .row_groups = row_groups,
                                       .dropout = dropout,
                                       .scaling = problem.scaling,
                                       .x = x.data(),
                                       .A = A.data(),
                                       .B = B.data(),
                                       .y_in = y_in.data(),
                                       .bias = data.bias.empty() ? nullptr : bias.data(),
                                       .z = z.data(),
                                       .y = y.data(),
                                       .workspace = workspace.data()},
                                      nullptr);
  }
  const Buffer<char> workspace("partials", cuda::grouped_lora_backward_workspace(shape, sizeof(T)));
  cuda::grouped_lora_backward<T, TA>({.shape = shape,
                                      .row_groups = row_groups,
                                      .dropout = dropout,
                                      .scaling = problem.scaling,
                                      .x = x.data(),
                                      .z = z.data(),
                                      .A = A.data(),
                                      .B = B.data(),
                                      .dx_in = problem.gradients_in ? dx_in.data() : nullptr,
                                      .dy = dy.data(),
                                      .dz_in = problem.gradients_in ? dz_in.data() : nullptr,
                                      .dx = problem.dx_wanted ? dx.data() : nullptr,
                                      .dA = dA.data(),
                                      .dB = dB.data(),
                                      .workspace = workspace.data()},
                                     nullptr);
  data.z = z.host(), data.y = y.host(), data.dx = dx.host(), data.dA = dA.host(), data.dB = dB.host();
}

template <typename T>
void check_results(const Problem& problem, const Data<T>& data, const Expected& want) {
  const int64_t before = check::failures();
  check_tensor<float, T>(data.z, want.z, "z");
  check_tensor<T, T>(data.y, want.y, "y", true);
  if (problem.dx_wanted) check_tensor<T, T>(data.dx, want.dx, "dx", true);
  check_tensor<float, T>(data.dA, want.dA, "dA", true);
  check_tensor<float, T>(data.dB, want.dB, "dB", true);
  CHECK(clean());
  if (check::failures() != before) print(problem);
}

// One thread order.
template <typename T, typename TA = T>
void check_problem(const Problem& problem, int major = 9) {
  Data<T> data = make_data<T>(problem);
  const Expected want = expect(problem, data);
  simt::options() = {};
  simt::options().major = major;
  simt::options().traffic = false;
  simt::reports().clear();
  run_cuda<T, TA>(problem, data);
  check_results(problem, data, want);
}

}  // namespace align::test
