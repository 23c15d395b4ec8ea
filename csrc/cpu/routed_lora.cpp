// As dropout_sum, and between shrink and expand the router: softmax over the logits of a block of rows; then, group
// of outputs by group, the factors w of the heads. Backward in the same order: group by group dw and du, then the
// softmax's backward, so that nothing of the size of all groups' heads times rank is ever stored.
#include "ops/routed_lora.h"

#include <cmath>

#include "cpu/heads.h"

namespace align::cpu {
namespace {

HeadsPlan plan_of(const HeadsShape& shape, const Routing& routing, bool dropout, bool backward) {
  return {shape, dropout, backward, /*routed=*/true, routing.groups};
}

// w = softmax(logits / tau) over the top_k largest, 0 elsewhere.
template <typename A>
void softmax(const A* logits, int64_t heads, int64_t top_k, double tau, A* w) {
  constexpr A kNotChosen = -1;
  std::fill_n(w, heads, kNotChosen);
  A largest = 0, sum = 0;
  for (int64_t chosen = 0; chosen < top_k; ++chosen) {
    int64_t best = -1;
    for (int64_t i = 0; i < heads; ++i) {
      if (w[i] == kNotChosen && (best < 0 || logits[i] > logits[best])) best = i;
    }
    if (chosen == 0) largest = logits[best];
    sum += w[best] = std::exp((logits[best] - largest) / A(tau));
  }
  for (int64_t i = 0; i < heads; ++i) w[i] = w[i] == kNotChosen ? 0 : w[i] / sum;
}

// The factors of one group's heads, of all rows.
template <typename A>
HeadFactors<A> factors_of(const A* w, const HeadsPlan& plan, int64_t group) {
  return {w + group * plan.shape.heads, plan.groups * plan.shape.heads};
}

template <typename T>
void route_rows(const Heads<T>& heads, const RoutedLoraForwardArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t count = heads.plan.shape.heads, groups = heads.plan.groups;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t g = 0; g < groups; ++g) {
      softmax(heads.scratch.logits.row(t) + g * count, count, args.routing.top_k, args.routing.tau,
              args.w + (t * groups + g) * count);
    }
  }
}

// dw of one group, where the logits were: scaling u_i . q_i plus what came in.
template <typename T>
void factor_gradient_rows(const Heads<T>& heads, const RoutedLoraBackwardArgs<T>& args, int64_t group, int64_t begin,
                          int64_t end) {
  const auto& s = heads.scratch;
  const int64_t count = heads.plan.shape.heads, rank = heads.plan.shape.rank;
  for (int64_t t = begin; t < end; ++t) {
    const Acc<T>*u = s.u.row(t), *q = s.q.row(t);
    for (int64_t i = 0; i < count; ++i) {
      Acc<T> dot = 0;
      for (int64_t j = i * rank; j < (i + 1) * rank; ++j) dot += u[j] * q[j];
      const int64_t column = group * count + i;
      const Acc<T> incoming = args.dw_in ? args.dw_in[t * heads.plan.groups * count + column] : 0;
      s.logits.row(t)[column] = Acc<T>(heads.inputs.scaling) * dot + incoming;
    }
  }
}

// The logits' gradient, in place of dw: w (dw - sum_j w_j dw_j) / tau.
template <typename T>
void softmax_gradient_rows(const Heads<T>& heads, const RoutedLoraBackwardArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t count = heads.plan.shape.heads, groups = heads.plan.groups;
  for (int64_t t = begin; t < end; ++t) {
    Acc<T>* row = heads.scratch.logits.row(t);
    std::fill(row + groups * count, row + heads.scratch.logits.stride, Acc<T>(0));
    for (int64_t g = 0; g < groups; ++g) {
      const Acc<T>* w = args.w + (t * groups + g) * count;
      Acc<T>* d = row + g * count;
      Acc<T> mean = 0;
      for (int64_t i = 0; i < count; ++i) mean += w[i] * d[i];
      for (int64_t i = 0; i < count; ++i) d[i] = w[i] * (d[i] - mean) / Acc<T>(args.routing.tau);
    }
  }
}

}  // namespace

int64_t routed_lora_forward_workspace(const HeadsShape& shape, const Routing& routing, bool dropout) {
  return heads_workspace(plan_of(shape, routing, dropout, /*backward=*/false));
}

int64_t routed_lora_backward_workspace(const HeadsShape& shape, const Routing& routing, bool dropout) {
  return heads_workspace(plan_of(shape, routing, dropout, /*backward=*/true));
}

template <typename T>
void routed_lora_forward(const RoutedLoraForwardArgs<T>& args) {
  const HeadsInputs<T>& inputs = args.heads.inputs;
  const HeadsPlan plan = plan_of(inputs.shape, args.routing, inputs.dropout.p > 0, /*backward=*/false);
  const Heads<T> heads = make_heads<T>(plan, inputs, args.R, args.heads.workspace);
  for_row_blocks(plan.shape.tokens, [&](int64_t begin, int64_t end) {
    shrink_rows(heads, args.heads.z, begin, end);
    head_rows(heads, args.heads.z, begin, end);
    route_rows(heads, args, begin, end);
    for (int64_t g = 0; g < plan.groups; ++g) {
      expand_rows(heads, args.heads, g, factors_of<Acc<T>>(args.w, plan, g), begin, end);
    }
  });
}

template <typename T>
void routed_lora_backward(const RoutedLoraBackwardArgs<T>& args) {
  const HeadsInputs<T>& inputs = args.heads.inputs;
  const HeadsPlan plan = plan_of(inputs.shape, args.routing, inputs.dropout.p > 0, /*backward=*/true);
  const Heads<T> heads = make_heads<T>(plan, inputs, args.R, args.heads.workspace);
  for_row_blocks(plan.shape.tokens, [&](int64_t begin, int64_t end) {
    head_rows(heads, args.heads.z, begin, end);
    for (int64_t g = 0; g < plan.groups; ++g) {
      pull_rows(heads, args.heads.dy, g, factors_of(args.w, plan, g), begin, end);
      factor_gradient_rows(heads, args, g, begin, end);
    }
    softmax_gradient_rows(heads, args, begin, end);
    latent_gradient_rows(heads, args.heads, begin, end);
  });
  a_gradient(heads, args.heads.dA, args.dR);
  b_gradient(heads, args.heads.dy, args.w, args.heads.dB);
}

#define ALIGN_INSTANTIATE(T)                                             \
  template void routed_lora_forward<T>(const RoutedLoraForwardArgs<T>&); \
  template void routed_lora_backward<T>(const RoutedLoraBackwardArgs<T>&);
ALIGN_INSTANTIATE(float)
ALIGN_INSTANTIATE(double)
ALIGN_INSTANTIATE(bfloat16)
ALIGN_INSTANTIATE(float16)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
