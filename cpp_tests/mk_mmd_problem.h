// Problems of mk_mmd for the tests of both devices: sizes and options, data, and a run on the CPU.
#pragma once

#include <cmath>
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

  MmdKernels kernels() const {
    return bandwidths.empty() ? heuristic_kernels(5) : given_kernels(bandwidths.data(), int(bandwidths.size()));
  }
  int64_t rows() const { return mmd_rows(tokens, tasks, n_max); }
};

constexpr float kMmdLossGradient = 0.7f;

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

// Ids run from -2 to tasks + 1, so that some tokens do not count; task 2 has one token at most and task 3 none. Tasks
// differ in mean and spread.
template <typename T>
MmdData<T> make_mmd_data(const MmdProblem& problem) {
  MmdData<T> data{random_values<T>(problem.tokens * problem.rank, 12), {}};
  std::mt19937 generator(11);
  bool task_2_seen = false;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    int64_t id = int64_t(generator() % (problem.tasks + 4)) - 2;
    if (id == 3 || (id == 2 && task_2_seen)) id = 0;
    task_2_seen |= id == 2;
    data.task.push_back(id);
    for (int64_t d = 0; d < problem.rank; ++d) {
      T& z = data.z[t * problem.rank + d];
      z = narrow<T>(Acc<T>(widen(z) * (1 + 0.3 * double(id)) + 0.2 * double(id * (d % 3))));
    }
  }
  return data;
}

template <typename T>
MkMmdArgs<T> mmd_args(const MmdProblem& problem, const T* z, const int64_t* task, Acc<T>* loss, Acc<T>* gradient,
                      int32_t* slot) {
  return {.tokens = problem.tokens,
          .rank = problem.rank,
          .tasks = problem.tasks,
          .n_max = problem.n_max,
          .u_statistic = problem.u_statistic,
          .mean_pairs = problem.mean_pairs,
          .z = z,
          .task = task,
          .loss = loss,
          .gradient = gradient,
          .slot = slot,
          .workspace = nullptr,
          .kernels = problem.kernels()};
}

// Outputs and the bytes behind the workspace start as what nothing may leave or touch.
template <typename T>
MmdResults run_mmd_cpu(const MmdProblem& problem, const MmdData<T>& data) {
  using A = Acc<T>;
  std::vector<A> loss(1, A(NAN)), gradient(problem.rows() * problem.rank, A(NAN));
  std::vector<int32_t> slot(problem.tokens, -7);
  std::vector<T> dz(problem.tokens * problem.rank, narrow<T>(A(NAN)));
  const MkMmdArgs<T> args =
      mmd_args(problem, data.z.data(), data.task.data(), loss.data(), gradient.data(), slot.data());
  run_in_workspace(args, cpu::mk_mmd_workspace(args), cpu::mk_mmd<T>);
  const A d_loss = A(kMmdLossGradient);
  cpu::mk_mmd_backward<T>(
      {problem.tokens, problem.rank, problem.rows(), gradient.data(), slot.data(), &d_loss, dz.data()});
  return {to_double(loss), to_double(gradient), std::vector<double>(slot.begin(), slot.end()), to_double(dz)};
}

inline double largest(const std::vector<double>& values) {
  double most = 0;
  for (double v : values) most = std::max(most, std::fabs(v));
  return most;
}

}  // namespace align::test
