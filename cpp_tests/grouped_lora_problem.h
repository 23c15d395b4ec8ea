// Problems for the grouped_lora kernels, on whatever device: data, the formulas in double, and how close is close.
#pragma once

#include <algorithm>
#include <cstdio>

#include "ops/grouped_lora.h"
#include "ops/philox.h"
#include "projection_support.h"
#include "support.h"

namespace align::test {

struct Problem {
  GroupedLoraShape shape;
  double p = 0;
  bool permuted = true;      // rows of the groups interleaved, else sorted and rows == null
  bool gradients_in = true;  // dz_in and dx_in given
  bool in_place = false;     // y_in == y and dx_in == dx
  bool dx_wanted = true;
  double scaling = 1.5;
  std::vector<int64_t> group_rows = {};  // the rows of each group; empty: at random
};

// Everything of one problem in type T.
template <typename T>
struct Data {
  std::vector<int64_t> group, rows, offsets;
  std::vector<uint64_t> rng{0x0123456789abcdefull, 17};
  std::vector<T> x, A, B, y_in, bias, dy, dx_in;  // bias may be empty: none
  std::vector<Acc<T>> dz_in;
  // results
  std::vector<T> y, dx;
  std::vector<Acc<T>> z, dA, dB;
};

template <typename T>
Data<T> make_data(const Problem& problem) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = problem.shape;
  Data<T> data;
  std::mt19937 generator(3);
  // The last of several groups stays empty, and so does the second of many.
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t id = generator() % std::max<int64_t>(groups - 1, 1);
    data.group.push_back(groups > 3 && id == 1 ? 0 : id);
  }
  int64_t next = 0;
  for (size_t k = 0; k < problem.group_rows.size(); ++k) {
    for (int64_t i = 0; i < problem.group_rows[k]; ++i) data.group[next++] = int64_t(k);
  }
  if (next > 0 && problem.permuted) std::shuffle(data.group.begin(), data.group.end(), generator);
  if (!problem.permuted) std::sort(data.group.begin(), data.group.end());
  data.rows.resize(tokens);
  data.offsets.resize(groups + 1);
  cpu::group_rows(data.group.data(), tokens, groups, data.rows.data(), data.offsets.data());
  data.x = random_values<T>(tokens * in_dim, 1);
  data.A = random_values<T>(groups * rank * in_dim, 2);
  data.B = random_values<T>(groups * out_dim * rank, 3);
  data.y_in = random_values<T>(tokens * out_dim, 4);
  data.bias = random_values<T>(out_dim, 8);
  data.dy = random_values<T>(tokens * out_dim, 5);
  data.dx_in = random_values<T>(tokens * in_dim, 6);
  data.dz_in = random_values<Acc<T>>(tokens * rank, 7);
  return data;
}

struct Expected {
  std::vector<Sum> z, y, dx, dA, dB;
};

// The formulas of ops/grouped_lora.h, in double, with the dropout of ops/philox.h.
template <typename T>
Expected expect(const Problem& problem, const Data<T>& data) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = problem.shape;
  const auto x = to_double(data.x), A = to_double(data.A), B = to_double(data.B);
  const auto dy = to_double(data.dy), bias = to_double(data.bias);
  const auto y_in = to_double(data.y_in), dx_in = to_double(data.dx_in);
  const uint32_t threshold = dropout_threshold(problem.p);
  const auto mask = [&](int64_t e) {
    const int64_t number = (e / in_dim) * in_dim + e % in_dim;
    return dropout_keep(data.rng[0], data.rng[1], number, threshold) ? dropout_scale(threshold) : 0.0;
  };
  Expected want;
  want.z.resize(tokens * rank);
  want.y.resize(tokens * out_dim);
  want.dx.resize(tokens * in_dim);
  want.dA.resize(groups * rank * in_dim);
  want.dB.resize(groups * out_dim * rank);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t a0 = data.group[t] * rank * in_dim, b0 = data.group[t] * out_dim * rank;
    for (int64_t c = 0; c < in_dim; ++c) want.dx[t * in_dim + c].add(problem.gradients_in ? dx_in[t * in_dim + c] : 0);
    for (int64_t o = 0; o < out_dim; ++o) want.y[t * out_dim + o].add(y_in[t * out_dim + o] + bias[o]);
    for (int64_t j = 0; j < rank; ++j) {
      Sum& z = want.z[t * rank + j];
      for (int64_t c = 0; c < in_dim; ++c) z.add(x[t * in_dim + c] * mask(t * in_dim + c) * A[a0 + j * in_dim + c]);
      double dz = problem.gradients_in ? double(data.dz_in[t * rank + j]) : 0;
      for (int64_t o = 0; o < out_dim; ++o) {
        const double g = problem.scaling * dy[t * out_dim + o];
        want.y[t * out_dim + o].add(problem.scaling * B[b0 + o * rank + j] * z.value);
        want.dB[b0 + o * rank + j].add(g * z.value);
        dz += g * B[b0 + o * rank + j];
      }
      for (int64_t c = 0; c < in_dim; ++c) {
        const double m = mask(t * in_dim + c);
        want.dA[a0 + j * in_dim + c].add(dz * x[t * in_dim + c] * m);
        want.dx[t * in_dim + c].add(A[a0 + j * in_dim + c] * dz * m);
      }
    }
  }
  return want;
}

inline void print(const Problem& problem) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = problem.shape;
  std::printf("    tokens %ld in_dim %ld out_dim %ld rank %ld groups %ld p %g permuted %d gradients_in %d\n",
              long(tokens), long(in_dim), long(out_dim), long(rank), long(groups), problem.p, problem.permuted,
              problem.gradients_in);
}

// ---- Two tokens of two groups, in_dim 2, rank 1, out_dim 1, all integers, worked out by hand

inline const Problem kTinyProblem = [] {
  Problem problem{{2, 2, 1, 1, 2}};
  problem.scaling = 2;
  return problem;
}();

inline Data<float> tiny_data() {
  Data<float> data;
  data.rows = {1, 0};  // token 1 is of group 0, token 0 of group 1
  data.offsets = {0, 1, 2};
  data.x = {1, 2, 3, 4};
  data.A = {1, -1, 2, 3};
  data.B = {5, 7};
  data.y_in = {100, 200};
  data.dy = {1, -2};
  data.dz_in = {0.5f, 0};
  data.dx_in = {10, 20, 30, 40};
  return data;
}

inline void check_tiny(const Data<float>& data) {
  CHECK((data.z == std::vector<float>{8, -1}));                 // (2,3).(1,2), (1,-1).(3,4)
  CHECK((data.y == std::vector<float>{212, 190}));              // 100 + 2*7*8, 200 - 2*5*1
  CHECK((data.dB == std::vector<float>{4, 16}));                // 2*-2*-1, 2*1*8
  CHECK((data.dA == std::vector<float>{-60, -80, 14.5f, 29}));  // dz = 2*5*-2 = -20 and 2*7*1 + 0.5 = 14.5
  CHECK((data.dx == std::vector<float>{39, 63.5f, 10, 60}));
}

}  // namespace align::test
