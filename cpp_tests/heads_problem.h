// Problems for the kernels of dropout_sum and routed_lora, on whatever device: data, and the formulas of ops/heads.h,
// ops/dropout_sum.h and ops/routed_lora.h in double.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "ops/routed_lora.h"
#include "projection_support.h"

namespace align::test {

constexpr std::array kSites = {DropoutSite::kNone, DropoutSite::kInput, DropoutSite::kLatent,
                               DropoutSite::kInputPerHead};

struct HeadsProblem {
  HeadsShape shape;  // tokens, in_dim, out_dim, rank, heads, offset_rank, A_per_head, site
  double p = 0;
  Routing routing = {0, 1, 1};  // groups 0: dropout_sum
  bool gradients_in = true;     // dz_in, dw_in and dx_in given
  bool in_place = false;        // y_in == y and dx_in == dx
  bool dx_wanted = true;
  double scaling = 1.5, offset_scaling = -0.75;
  int64_t first_number = 0, row_numbers = 0;  // of the masks, as in DropoutArgs

  bool routed() const { return routing.groups > 0; }
  int64_t latents() const { return shape.tokens * shape.latents() * shape.rank; }
  int64_t factors() const { return shape.tokens * routing.groups * shape.heads; }
};

template <typename T>
struct HeadsData {
  std::vector<uint64_t> rng{0x0123456789abcdefull, 17};
  std::vector<T> x, A, B, A0, B0, R, y_in, bias, dy, dx_in;
  std::vector<Acc<T>> dz_in, dw_in;
  // results
  std::vector<T> y, dx;
  std::vector<Acc<T>> z, w, dA, dB, dR;
};

template <typename T>
HeadsData<T> make_data(const HeadsProblem& problem) {
  const auto& [tokens, in_dim, out_dim, rank, heads, offset_rank, A_per_head, site] = problem.shape;
  HeadsData<T> data;
  data.x = random_values<T>(tokens * in_dim, 1);
  data.A = random_values<T>((A_per_head ? heads : 1) * rank * in_dim, 2);
  data.B = random_values<T>(heads * out_dim * rank, 3);
  data.A0 = random_values<T>(offset_rank * in_dim, 4);
  data.B0 = random_values<T>(out_dim * offset_rank, 5);
  data.R = random_values<T>(problem.routing.groups * heads * in_dim, 6, -0.3, 0.3);
  data.y_in = random_values<T>(tokens * out_dim, 7);
  data.bias = random_values<T>(out_dim, 8);
  data.dy = random_values<T>(tokens * out_dim, 9);
  data.dx_in = random_values<T>(tokens * in_dim, 10);
  data.dz_in = random_values<Acc<T>>(problem.latents(), 11);
  data.dw_in = random_values<Acc<T>>(problem.factors(), 12);
  return data;
}

// Every quantity of the formulas, with the rounding errors of sums.
struct HeadsExpected {
  std::vector<Sum> z, w, y, dx, dA, dB, dR;
};

// One evaluation of the formulas; its members are theirs.
template <typename T>
struct HeadsOracle {
  const HeadsProblem& problem;
  const HeadsShape& shape = problem.shape;
  std::vector<double> x, A, B, A0, B0, R, y_in, bias, dy, dx_in;
  const HeadsData<T>& data;
  int64_t groups = std::max<int64_t>(problem.routing.groups, 1);
  HeadsExpected want;

  HeadsOracle(const HeadsProblem& given, const HeadsData<T>& d)
      : problem(given),
        x(to_double(d.x)),
        A(to_double(d.A)),
        B(to_double(d.B)),
        A0(to_double(d.A0)),
        B0(to_double(d.B0)),
        R(to_double(d.R)),
        y_in(to_double(d.y_in)),
        bias(to_double(d.bias)),
        dy(to_double(d.dy)),
        dx_in(to_double(d.dx_in)),
        data(d) {
    want.z.resize(problem.latents());
    want.w.resize(problem.factors());
    want.y.resize(d.y_in.size());
    want.dx.resize(x.size());
    want.dA.resize(A.size());
    want.dB.resize(B.size());
    want.dR.resize(R.size());
    for (int64_t t = 0; t < shape.tokens; ++t) row(t);
  }

  // The mask of an element of a row's masks.
  double mask(int64_t t, int64_t e) const {
    const uint32_t threshold = dropout_threshold(problem.p);
    const int64_t row_numbers = problem.row_numbers > 0 ? problem.row_numbers : shape.mask_elements();
    const int64_t number = problem.first_number + t * row_numbers + e;
    return dropout_keep(data.rng[0], data.rng[1], number, threshold) ? dropout_scale(threshold) : 0.0;
  }
  // The mask on x that head i sees, and that on its latent.
  double x_mask(int64_t t, int64_t i, int64_t c) const {
    if (shape.site == DropoutSite::kInput) return mask(t, c);
    return shape.site == DropoutSite::kInputPerHead ? mask(t, i * shape.in_dim + c) : 1;
  }
  double latent_mask(int64_t t, int64_t i, int64_t d) const {
    return shape.site == DropoutSite::kLatent ? mask(t, i * shape.rank + d) : 1;
  }
  double offset_mask(int64_t t, int64_t c) const { return shape.site == DropoutSite::kInput ? x_mask(t, 0, c) : 1; }
  int64_t latent(int64_t t, int64_t i, int64_t d) const {
    return (shape.latents() == 1 ? t : t * shape.heads + i) * shape.rank + d;
  }
  int64_t group(int64_t o) const { return o * groups / shape.out_dim; }

  // The softmax over the chosen heads; its error is that of the logits.
  void route(int64_t t, int64_t g) {
    std::vector<Sum> logits(shape.heads);
    double error = 0;
    for (int64_t i = 0; i < shape.heads; ++i) {
      const int64_t row = (g * shape.heads + i) * shape.in_dim;
      for (int64_t c = 0; c < shape.in_dim; ++c) {
        logits[i].add(x[t * shape.in_dim + c] * R[row + c] / problem.routing.tau);
      }
      error = std::max(error, 1 + logits[i].magnitude);
    }
    std::vector<double> weight(shape.heads);
    double sum = 0;
    for (int64_t i = 0; i < shape.heads; ++i) {
      int64_t before = 0;  // heads that are chosen before this one
      for (int64_t j = 0; j < shape.heads; ++j) {
        before += logits[j].value > logits[i].value || (logits[j].value == logits[i].value && j < i);
      }
      weight[i] = before < problem.routing.top_k ? std::exp(logits[i].value) : 0;
      sum += weight[i];
    }
    for (int64_t i = 0; i < shape.heads; ++i) want.w[(t * groups + g) * shape.heads + i].add(weight[i] / sum, error);
  }

  Sum factor(int64_t t, int64_t g, int64_t i) const {
    return problem.routed() ? want.w[(t * groups + g) * shape.heads + i] : Sum{1, 1};
  }

  void row(int64_t t) {
    for (int64_t g = 0; g < problem.routing.groups; ++g) route(t, g);
    for (int64_t o = 0; o < shape.out_dim; ++o) {
      want.y[t * shape.out_dim + o].add(y_in[t * shape.out_dim + o] + bias[o]);
    }
    for (int64_t c = 0; c < shape.in_dim; ++c) {
      want.dx[t * shape.in_dim + c].add(problem.gradients_in ? dx_in[t * shape.in_dim + c] : 0);
    }
    for (int64_t j = 0; j < shape.offset_rank; ++j) offset(t, j);
    std::vector<Sum> dw(groups * shape.heads), dz(shape.latents() * shape.rank);
    for (size_t g = 0; g < dw.size() && problem.routed() && problem.gradients_in; ++g) {
      dw[g].add(data.dw_in[t * dw.size() + g]);
    }
    for (int64_t i = 0; i < shape.latents(); ++i) {
      for (int64_t d = 0; d < shape.rank; ++d) shrink(t, i, d);
    }
    for (int64_t i = 0; i < shape.heads; ++i) {
      for (int64_t d = 0; d < shape.rank; ++d) dz[latent(0, i, d)].add(head(t, i, d, dw), 2);
    }
    for (int64_t i = 0; i < shape.heads; ++i) {
      for (int64_t d = 0; d < shape.rank; ++d) shrink_backward(t, i, d, dz);
    }
    for (int64_t g = 0; g < problem.routing.groups; ++g) router_gradient(t, g, dw);
  }

  void offset(int64_t t, int64_t j) {
    double z0 = 0, dz0 = 0;
    for (int64_t c = 0; c < shape.in_dim; ++c) {
      z0 += x[t * shape.in_dim + c] * offset_mask(t, c) * A0[j * shape.in_dim + c];
    }
    for (int64_t o = 0; o < shape.out_dim; ++o) {
      const double b = problem.offset_scaling * B0[o * shape.offset_rank + j];
      want.y[t * shape.out_dim + o].add(b * z0);
      dz0 += b * dy[t * shape.out_dim + o];
    }
    for (int64_t c = 0; c < shape.in_dim; ++c) {
      want.dx[t * shape.in_dim + c].add(dz0 * A0[j * shape.in_dim + c] * offset_mask(t, c));
    }
  }

  void shrink(int64_t t, int64_t i, int64_t d) {
    const int64_t a = ((shape.A_per_head ? i : 0) * shape.rank + d) * shape.in_dim;
    for (int64_t c = 0; c < shape.in_dim; ++c) {
      want.z[latent(t, i, d)].add(x[t * shape.in_dim + c] * x_mask(t, i, c) * A[a + c]);
    }
  }

  // Adds one component of one head to y, dB and dw, and returns what it adds to dz.
  double head(int64_t t, int64_t i, int64_t d, std::vector<Sum>& dw) {
    const double u = want.z[latent(t, i, d)].value * latent_mask(t, i, d);
    double du = 0;
    for (int64_t o = 0; o < shape.out_dim; ++o) {
      const Sum v = factor(t, group(o), i);
      const double error = v.value == 0 ? 1 : v.magnitude / v.value, g = dy[t * shape.out_dim + o] * problem.scaling;
      const int64_t b = (i * shape.out_dim + o) * shape.rank + d;
      want.y[t * shape.out_dim + o].add(problem.scaling * v.value * B[b] * u, error);
      want.dB[b].add(g * v.value * u, error);
      dw[group(o) * shape.heads + i].add(g * B[b] * u);
      du += g * v.value * B[b];
    }
    return du * latent_mask(t, i, d);
  }

  // Adds to dA and dx. A latent of all heads is counted once.
  void shrink_backward(int64_t t, int64_t i, int64_t d, const std::vector<Sum>& dz) {
    if (shape.latents() == 1 && i > 0) return;
    double value = dz[latent(0, i, d)].value;
    if (problem.gradients_in) value += data.dz_in[latent(t, i, d)];
    const int64_t a = ((shape.A_per_head ? i : 0) * shape.rank + d) * shape.in_dim;
    for (int64_t c = 0; c < shape.in_dim; ++c) {
      want.dA[a + c].add(value * x[t * shape.in_dim + c] * x_mask(t, i, c), 2);
      want.dx[t * shape.in_dim + c].add(value * A[a + c] * x_mask(t, i, c), 2);
    }
  }

  void router_gradient(int64_t t, int64_t g, const std::vector<Sum>& dw) {
    Sum mean;
    for (int64_t i = 0; i < shape.heads; ++i) {
      const Sum w = factor(t, g, i), d = dw[g * shape.heads + i];
      mean.value += w.value * d.value;
      mean.magnitude += w.magnitude * d.magnitude;
    }
    for (int64_t i = 0; i < shape.heads; ++i) {
      const Sum w = factor(t, g, i), d = dw[g * shape.heads + i];
      const double value = w.value * (d.value - mean.value) / problem.routing.tau;
      const double error = w.magnitude * (d.magnitude + mean.magnitude) / problem.routing.tau;
      const int64_t row = (g * shape.heads + i) * shape.in_dim;
      for (int64_t c = 0; c < shape.in_dim; ++c) {
        want.dR[row + c].add(value * x[t * shape.in_dim + c]);
        want.dR[row + c].magnitude += error * std::fabs(x[t * shape.in_dim + c]);
        want.dx[t * shape.in_dim + c].add(value * R[row + c]);
        want.dx[t * shape.in_dim + c].magnitude += error * std::fabs(R[row + c]);
      }
    }
  }
};

inline void print(const HeadsProblem& problem) {
  const auto& [tokens, in_dim, out_dim, rank, heads, offset_rank, A_per_head, site] = problem.shape;
  std::printf(
      "    tokens %ld in_dim %ld out_dim %ld rank %ld heads %ld offset_rank %ld A_per_head %d site %ld p %g groups",
      long(tokens), long(in_dim), long(out_dim), long(rank), long(heads), long(offset_rank), A_per_head, long(site),
      problem.p);
  std::printf(" %ld top_k %ld\n", long(problem.routing.groups), long(problem.routing.top_k));
}

}  // namespace align::test
