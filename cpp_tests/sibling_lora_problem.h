// Problems for the sibling_lora kernels, on whatever device: problems of dropout_sum or routed_lora with the same x,
// whose masks follow one another and whose dx add up.
#pragma once

#include "heads_problem.h"
#include "ops/sibling_lora.h"

namespace align::test {

// What all layers of a problem are: by default one LoRA each.
struct SiblingKind {
  int64_t heads = 1;
  DropoutSite site = DropoutSite::kInput;
  bool offset = false, A_per_head = false;
  Routing routing = {0, 1, 1};
};

constexpr SiblingKind kMLora{3, DropoutSite::kLatent, true}, kPissa{1, DropoutSite::kInput, true},
    kHydra{3, DropoutSite::kInput, true, false, {1, 3, 0.8}}, kRLora{2, DropoutSite::kLatent, true, false, {2, 2, 1}},
    kLoraMoe{3, DropoutSite::kInput, false, true, {1, 2, 1}};

struct SiblingProblem {
  int64_t tokens, in_dim;
  std::vector<std::pair<int64_t, int64_t>> layers;  // out_dim and rank of each
  double p = 0;
  SiblingKind kind = {};
  bool gradients_in = true;  // dz_in, dw_in and dx_in given
  bool dx_wanted = true;

  int count() const { return int(layers.size()); }
  HeadsShape shape(int i) const {
    const auto [out_dim, rank] = layers[i];
    return {tokens, in_dim, out_dim, rank, kind.heads, kind.offset ? rank : 0, kind.A_per_head, kind.site};
  }
  // Layer i. dx_in is the first one's.
  HeadsProblem layer(int i) const {
    HeadsProblem problem{.shape = shape(i), .p = p, .routing = kind.routing, .gradients_in = gradients_in};
    problem.dx_wanted = dx_wanted;
    problem.scaling = 1.5 - 0.5 * i;
    for (int k = 0; k < count(); ++k) {
      problem.row_numbers += shape(k).mask_elements();
      if (k < i) problem.first_number += shape(k).mask_elements();
    }
    return problem;
  }
};

// Everything of one problem: of dx, dx_in and x those of the first layer count.
template <typename T>
struct SiblingData {
  std::vector<HeadsData<T>> layers;
};

template <typename T>
SiblingData<T> make_data(const SiblingProblem& problem) {
  SiblingData<T> data;
  for (int i = 0; i < problem.count(); ++i) {
    HeadsData<T> layer = make_data<T>(problem.layer(i));
    if (i > 0) {  // other values than the first one's
      uint64_t seed = 20 * uint64_t(i);
      for (std::vector<T>* values : {&layer.A, &layer.B, &layer.A0, &layer.B0, &layer.R, &layer.dy}) {
        *values = random_values<T>(int64_t(values->size()), ++seed);
      }
      layer.dx_in.assign(layer.dx_in.size(), T{});
    }
    data.layers.push_back(layer);
  }
  return data;
}

// What is expected of each layer; the first one's dx is that of all.
template <typename T>
std::vector<HeadsExpected> expect(const SiblingProblem& problem, const SiblingData<T>& data) {
  std::vector<HeadsExpected> want;
  for (int i = 0; i < problem.count(); ++i) {
    const HeadsProblem of_layer = problem.layer(i);
    want.push_back(HeadsOracle<T>(of_layer, data.layers[i]).want);
    for (size_t e = 0; i > 0 && e < want[0].dx.size(); ++e) {
      want[0].dx[e].value += want[i].dx[e].value, want[0].dx[e].magnitude += want[i].dx[e].magnitude;
    }
  }
  return want;
}

template <typename T>
void check_results(const SiblingProblem& problem, const SiblingData<T>& data, bool rounds_latent) {
  const std::vector<HeadsExpected> want = expect(problem, data);
  for (int i = 0; i < problem.count(); ++i) {
    const int64_t before = check::failures();
    const HeadsData<T>& layer = data.layers[i];
    check_tensor<Acc<T>, T>(layer.z, want[i].z, "z");
    check_tensor<Acc<T>, T>(layer.w, want[i].w, "w");
    check_tensor<T, T>(layer.y, want[i].y, "y", rounds_latent);
    check_tensor<Acc<T>, T>(layer.dA, want[i].dA, "dA", rounds_latent);
    check_tensor<Acc<T>, T>(layer.dB, want[i].dB, "dB", rounds_latent);
    check_tensor<Acc<T>, T>(layer.dR, want[i].dR, "dR", rounds_latent);
    if (check::failures() != before) print(problem.layer(i));
  }
  if (problem.dx_wanted) check_tensor<T, T>(data.layers[0].dx, want[0].dx, "dx", rounds_latent);
}

}  // namespace align::test
