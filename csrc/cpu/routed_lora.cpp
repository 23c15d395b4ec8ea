// As dropout_sum, and between shrink and expand the router: softmax over the logits of a block of rows; then, group
// of outputs by group, the factors w of the heads. Backward in the same order: group by group dw and du, then the
// softmax's backward, so that nothing of the size of all groups' heads times rank is ever stored.
#include "ops/routed_lora.h"

#include <cmath>

#include "cpu/heads.h"
#include "cpu/operands.h"

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
Small<const A> factors_of(const A* w, const HeadsPlan& plan, int64_t group) {
  return {w + group * plan.shape.heads, plan.logits()};
}

template <typename T, typename W>
void route(const HeadsBlock<T>& block, const RoutedLoraForwardArgs<T, W>& args) {
  const HeadsPlan& plan = block.plan;
  const int64_t count = plan.shape.heads;
  for (int64_t i = 0; i < block.rows.count; ++i) {
    const Acc<T>* logits = block.at(plan.router(), i);
    Acc<T>* w = args.w + block.rows.row(i) * plan.logits();
    for (int64_t g = 0; g < plan.groups; ++g) {
      softmax(logits + g * count, count, args.routing.top_k, args.routing.tau, w + g * count);
    }
  }
}

// dw of one group, where the logits were: scaling u_i . q_i plus what came in.
template <typename T, typename W>
void factor_gradient(const HeadsBlock<T>& block, const RoutedLoraBackwardArgs<T, W>& args, int64_t group) {
  const HeadsPlan& plan = block.plan;
  const int64_t count = plan.shape.heads, rank = plan.shape.rank;
  for (int64_t i = 0; i < block.rows.count; ++i) {
    const Acc<T>*u = block.scratch.u.row(i), *q = block.scratch.q.row(i);
    const Acc<T>* incoming = args.dw_in ? args.dw_in + block.rows.row(i) * plan.logits() + group * count : nullptr;
    Acc<T>* dw = block.at(plan.router(), i) + group * count;
    for (int64_t h = 0; h < count; ++h) {
      Acc<T> dot = 0;
      for (int64_t j = h * rank; j < (h + 1) * rank; ++j) dot += u[j] * q[j];
      dw[h] = block.heads.scaling * dot + (incoming ? incoming[h] : 0);
    }
  }
}

// The logits' gradient, in place of dw: w (dw - sum_j w_j dw_j) / tau.
template <typename T, typename W>
void softmax_gradient(const HeadsBlock<T>& block, const RoutedLoraBackwardArgs<T, W>& args) {
  const HeadsPlan& plan = block.plan;
  const int64_t count = plan.shape.heads;
  for (int64_t i = 0; i < block.rows.count; ++i) {
    for (int64_t g = 0; g < plan.groups; ++g) {
      const Acc<T>* w = args.w + block.rows.row(i) * plan.logits() + g * count;
      Acc<T>* d = block.at(plan.router(), i) + g * count;
      Acc<T> mean = 0;
      for (int64_t h = 0; h < count; ++h) mean += w[h] * d[h];
      for (int64_t h = 0; h < count; ++h) d[h] = w[h] * (d[h] - mean) / Acc<T>(args.routing.tau);
    }
  }
}

}  // namespace

int64_t routed_lora_forward_workspace(const HeadsShape& shape, const Routing& routing, bool dropout,
                                      int64_t acc_bytes) {
  return heads_workspace(plan_of(shape, routing, dropout, /*backward=*/false), shape.tokens, acc_bytes);
}

int64_t routed_lora_backward_workspace(const HeadsShape& shape, const Routing& routing, bool dropout,
                                       int64_t acc_bytes) {
  return heads_workspace(plan_of(shape, routing, dropout, /*backward=*/true), shape.tokens, acc_bytes);
}

template <typename T, typename W>
void routed_lora_forward(const RoutedLoraForwardArgs<T, W>& args) {
  const HeadsInputs<T, W>& inputs = args.heads.inputs;
  const HeadsPlan plan = plan_of(inputs.shape, args.routing, inputs.dropout.p > 0, /*backward=*/false);
  const Heads<T> heads = prepare_heads<T, W>(plan, inputs, args.R, all_rows(plan.shape.tokens), args.heads.workspace);
  for_blocks(heads, [&](const HeadsBlock<T>& block) {
    block.shrink(args.heads.z);
    block.make_heads(args.heads.z);
    route(block, args);
    for (int64_t g = 0; g < plan.groups; ++g)
      block.expand(g, factors_of<Acc<T>>(args.w, plan, g), args.heads.y_in, args.heads.bias, args.heads.y);
  });
}

template <typename T, typename W>
void routed_lora_backward(const RoutedLoraBackwardArgs<T, W>& args) {
  const HeadsInputs<T, W>& inputs = args.heads.inputs;
  const HeadsPlan plan = plan_of(inputs.shape, args.routing, inputs.dropout.p > 0, /*backward=*/true);
  const Heads<T> heads = prepare_heads<T, W>(plan, inputs, args.R, all_rows(plan.shape.tokens), args.heads.workspace);
  for_blocks(heads, [&](const HeadsBlock<T>& block) {
    block.make_heads(args.heads.z);
    for (int64_t g = 0; g < plan.groups; ++g) {
      block.pull(args.heads.dy, g, factors_of(args.w, plan, g));
      factor_gradient(block, args, g);
    }
    softmax_gradient(block, args);
    block.latent_gradient(args.heads.dz_in);
    block.input_gradient(args.heads.dx_in, args.heads.dx);
  });
  finish_gradients(heads, args.heads.dA, args.heads.dB, args.dR);
}

#define ALIGN_INSTANTIATE(T, W)                                                \
  template void routed_lora_forward<T, W>(const RoutedLoraForwardArgs<T, W>&); \
  template void routed_lora_backward<T, W>(const RoutedLoraBackwardArgs<T, W>&);
ALIGN_EACH_TYPE_AND_ADAPTER(ALIGN_INSTANTIATE)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
