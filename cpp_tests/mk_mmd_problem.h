// Problems of mk_mmd for the tests of both devices: sizes and options, data, and a run on the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "ops/mk_mmd.h"
#include "support.h"

namespace align::test {

struct MmdProblem {
  int64_t tokens, rank, tasks;
  int64_t n_max = 256;
  bool u_statistic = false;
  bool mean_pairs = false;
  std::vector<double> bandwidths = {};  // none: the heuristic's five
  std::vector<int64_t> ranks = {};      // of several layers, none above rank; none: one layer

  MmdKernels kernels() const {
    return bandwidths.empty() ? heuristic_kernels(5) : given_kernels(bandwidths.data(), int(bandwidths.size()));
  }
  int64_t rows() const { return mmd_rows(tokens, tasks, n_max); }
  int64_t layers() const { return std::max<int64_t>(int64_t(ranks.size()), 1); }
  int64_t rank_of(int64_t layer) const { return ranks.empty() ? rank : ranks[layer]; }
};

constexpr float kMmdLossGradient = 0.7f;

// z: the rows of all layers side by side in one matrix, [tokens, sum of the ranks].
template <typename T>
struct MmdData {
  std::vector<T> z;
  std::vector<int64_t> task;
};

struct MmdResults {
  std::vector<double> loss, gradient, slot, dz;

  bool same_bits(const MmdResults& other) const {
    return check::same_bits(loss, other.loss) && check::same_bits(gradient, other.gradient) &&
           check::same_bits(slot, other.slot) && check::same_bits(dz, other.dz);
  }
};

inline int64_t mmd_width(const MmdProblem& problem) {
  int64_t width = 0;
  for (int64_t layer = 0; layer < problem.layers(); ++layer) width += problem.rank_of(layer);
  return width;
}

// Ids run from -2 to tasks + 1, so that some tokens do not count; task 2 has one token at most and task 3 none. Tasks
// differ in mean and spread.
template <typename T>
MmdData<T> make_mmd_data(const MmdProblem& problem) {
  const int64_t width = mmd_width(problem);
  MmdData<T> data{random_values<T>(problem.tokens * width, 12), {}};
  std::mt19937 generator(11);
  bool task_2_seen = false;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    int64_t id = int64_t(generator() % (problem.tasks + 4)) - 2;
    if (id == 3 || (id == 2 && task_2_seen)) id = 0;
    task_2_seen |= id == 2;
    data.task.push_back(id);
    for (int64_t d = 0; d < width; ++d) {
      T& z = data.z[t * width + d];
      z = narrow<T>(Acc<T>(widen(z) * (1 + 0.3 * double(id)) + 0.2 * double(id * (d % 3))));
    }
  }
  return data;
}

// Where each layer begins in the matrix of all, and the arguments that point to it.
template <typename T>
struct MmdCall {
  std::vector<const T*> z;
  std::vector<int64_t> ranks, strides;
  MkMmdArgs<T> args;

  MmdCall(const MmdProblem& problem, const T* all, const int64_t* task, Acc<T>* loss, Acc<T>* gradient, int32_t* slot) {
    for (int64_t layer = 0; layer < problem.layers(); ++layer) {
      z.push_back(all);
      ranks.push_back(problem.rank_of(layer));
      strides.push_back(mmd_width(problem));
      all += problem.rank_of(layer);
    }
    args = {.layers = problem.layers(),
            .tokens = problem.tokens,
            .rank = problem.rank,
            .tasks = problem.tasks,
            .n_max = problem.n_max,
            .u_statistic = problem.u_statistic,
            .mean_pairs = problem.mean_pairs,
            .z = z.data(),
            .ranks = ranks.data(),
            .strides = strides.data(),
            .task = task,
            .loss = loss,
            .gradient = gradient,
            .slot = slot,
            .workspace = nullptr,
            .kernels = problem.kernels()};
  }
};

template <typename T>
MkMmdBackwardArgs<T> mmd_backward_args(const MmdProblem& problem, const Acc<T>* gradient, const int32_t* slot,
                                       const Acc<T>* d_loss, T* dz) {
  return {.layers = problem.layers(),
          .tokens = problem.tokens,
          .rank = problem.rank,
          .rows = problem.rows(),
          .gradient = gradient,
          .slot = slot,
          .d_loss = d_loss,
          .dz = dz};
}

// Outputs and the bytes behind the workspace start as what nothing may leave or touch.
template <typename T>
MmdResults run_mmd_cpu(const MmdProblem& problem, const MmdData<T>& data) {
  using A = Acc<T>;
  const int64_t layers = problem.layers();
  std::vector<A> loss(layers, A(NAN)), gradient(layers * problem.rows() * problem.rank, A(NAN));
  std::vector<int32_t> slot(problem.tokens, -7);
  std::vector<T> dz(layers * problem.tokens * problem.rank, narrow<T>(A(NAN)));
  const MmdCall<T> call(problem, data.z.data(), data.task.data(), loss.data(), gradient.data(), slot.data());
  run_in_workspace(call.args, cpu::mk_mmd_workspace(call.args), cpu::mk_mmd<T>);
  const std::vector<A> d_loss(layers, A(kMmdLossGradient));
  cpu::mk_mmd_backward<T>(mmd_backward_args<T>(problem, gradient.data(), slot.data(), d_loss.data(), dz.data()));
  return {to_double(loss), to_double(gradient), std::vector<double>(slot.begin(), slot.end()), to_double(dz)};
}

// One layer's part of the results of several, in the form of a problem of its own.
inline MmdResults layer_of(const MmdProblem& problem, const MmdResults& all, int64_t layer) {
  const auto part = [&](const std::vector<double>& values, int64_t rows) {
    std::vector<double> result;
    for (int64_t r = 0; r < rows; ++r) {
      const double* row = values.data() + (layer * rows + r) * problem.rank;
      result.insert(result.end(), row, row + problem.rank_of(layer));
      for (int64_t d = problem.rank_of(layer); d < problem.rank; ++d) CHECK(row[d] == 0);
    }
    return result;
  };
  return {{all.loss[layer]}, part(all.gradient, problem.rows()), all.slot, part(all.dz, problem.tokens)};
}

// One layer's problem and data.
template <typename T>
std::pair<MmdProblem, MmdData<T>> alone(const MmdProblem& problem, const MmdData<T>& data, int64_t layer) {
  MmdProblem one = problem;
  one.rank = problem.rank_of(layer);
  one.ranks = {};
  int64_t first = 0;
  for (int64_t l = 0; l < layer; ++l) first += problem.rank_of(l);
  MmdData<T> of_layer{{}, data.task};
  for (int64_t t = 0; t < problem.tokens; ++t) {
    const auto row = data.z.begin() + t * mmd_width(problem) + first;
    of_layer.z.insert(of_layer.z.end(), row, row + one.rank);
  }
  return {one, of_layer};
}

inline double largest(const std::vector<double>& values) {
  double most = 0;
  for (double v : values) most = std::max(most, std::fabs(v));
  return most;
}

}  // namespace align::test
