// Problems for the sibling_lora kernels, on whatever device: problems of grouped_lora with the same x, whose dx add up.
#pragma once

#include "grouped_lora_problem.h"
#include "ops/sibling_lora.h"

namespace align::test {

struct SiblingProblem {
  int64_t tokens, in_dim;
  std::vector<std::pair<int64_t, int64_t>> layers;  // out_dim and rank of each
  double p = 0;
  bool gradients_in = true;  // dz_in and dx_in given
  bool dx_wanted = true;

  int count() const { return int(layers.size()); }
  // Layer i. dx_in is the first one's.
  Problem layer(int i) const {
    Problem problem{{tokens, in_dim, layers[i].first, layers[i].second, 1}, p, /*permuted=*/false, gradients_in};
    problem.dx_wanted = dx_wanted;
    problem.mask = i, problem.masks = count();
    problem.scaling = 1.5 - 0.5 * i;
    return problem;
  }
  SiblingLoraShape shape() const {
    SiblingLoraShape shape = {count(), {}};
    for (int i = 0; i < count(); ++i) shape.layers[i] = layer(i).shape;
    return shape;
  }
};

// Everything of one problem: of dx, dx_in and x those of the first layer count.
template <typename T>
struct SiblingData {
  std::vector<Data<T>> layers;
};

template <typename T>
SiblingData<T> make_data(const SiblingProblem& problem) {
  SiblingData<T> data;
  for (int i = 0; i < problem.count(); ++i) {
    Data<T> layer = make_data<T>(problem.layer(i));
    if (i > 0) {  // other values than the first one's
      layer.A = random_values<T>(int64_t(layer.A.size()), 20 + uint64_t(i));
      layer.B = random_values<T>(int64_t(layer.B.size()), 30 + uint64_t(i));
      layer.dy = random_values<T>(int64_t(layer.dy.size()), 40 + uint64_t(i));
      layer.dx_in.assign(layer.dx_in.size(), T{});
    }
    data.layers.push_back(layer);
  }
  return data;
}

// What is expected of each layer; the first one's dx is that of all.
template <typename T>
std::vector<Expected> expect(const SiblingProblem& problem, const SiblingData<T>& data) {
  std::vector<Expected> want;
  for (int i = 0; i < problem.count(); ++i) {
    want.push_back(expect(problem.layer(i), data.layers[i]));
    for (size_t e = 0; i > 0 && e < want[0].dx.size(); ++e) {
      want[0].dx[e].value += want[i].dx[e].value, want[0].dx[e].magnitude += want[i].dx[e].magnitude;
    }
  }
  return want;
}

template <typename T>
void check_results(const SiblingProblem& problem, const SiblingData<T>& data, bool rounds_latent) {
  const std::vector<Expected> want = expect(problem, data);
  for (int i = 0; i < problem.count(); ++i) {
    const Data<T>& layer = data.layers[i];
    check_tensor<Acc<T>, T>(layer.z, want[i].z, "z");
    check_tensor<T, T>(layer.y, want[i].y, "y", rounds_latent);
    check_tensor<Acc<T>, T>(layer.dA, want[i].dA, "dA", rounds_latent);
    check_tensor<Acc<T>, T>(layer.dB, want[i].dB, "dB", rounds_latent);
  }
  if (problem.dx_wanted) check_tensor<T, T>(data.layers[0].dx, want[0].dx, "dx", rounds_latent);
}

}  // namespace align::test
