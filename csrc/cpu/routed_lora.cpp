// A projection with a router (cpu/projection.h). Between shrink and expand it computes the softmax over the logits of a
// block of rows; then expand takes one group of outputs after the other, with its weights w. The backward pass computes
// dw and du group by group, then the gradient of the softmax. So u is never stored for all groups at once.
#include "ops/routed_lora.h"

#include <cmath>

#include "cpu/operands.h"
#include "cpu/projection.h"

namespace align::cpu {
namespace {

ProjectionPlan plan_of(const HeadsShape& shape, const Routing& routing, bool dropout, bool backward) {
  return {shape, dropout, backward, /*routed=*/true, routing.groups};
}

// w = softmax(logits / tau) over the top_k largest, 0 elsewhere.
template <typename A>
void softmax(const A* logits, int64_t heads, int64_t top_k, double tau, A* w) {
  A largest = 0, sum = 0;
  if (top_k == heads) {
    largest = *std::max_element(logits, logits + heads);
    for (int64_t i = 0; i < heads; ++i) sum += w[i] = std::exp((logits[i] - largest) / A(tau));
    for (int64_t i = 0; i < heads; ++i) w[i] /= sum;
    return;
  }
  constexpr A kNotChosen = -1;
  std::fill_n(w, heads, kNotChosen);
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

// The weights of the heads for one group, for all rows.
template <typename A>
RowMajor<const A> factors_of(const A* w, const ProjectionPlan& plan, int64_t group) {
  return {w + group * plan.shape.heads, plan.logits()};
}

template <typename T, typename TA>
void route(const ProjectionBlock<T>& block, const RoutedLoraForwardArgs<T, TA>& args) {
  const ProjectionPlan& plan = block.plan;
  const int64_t count = plan.shape.heads;
  for (int64_t i = 0; i < block.rows.count; ++i) {
    const Acc<T>* logits = block.at(plan.router(), i);
    Acc<T>* w = args.w + block.rows.row(i) * plan.logits();
    for (int64_t g = 0; g < plan.groups; ++g) {
      softmax(logits + g * count, count, args.routing.top_k, args.routing.tau, w + g * count);
    }
  }
}

// Computes dw = scaling u_i . q_i + dw_in for one group, and stores it in the columns of the logits.
template <typename T, typename TA>
void factor_gradient(const ProjectionBlock<T>& block, const RoutedLoraBackwardArgs<T, TA>& args, int64_t group) {
  const ProjectionPlan& plan = block.plan;
  const int64_t count = plan.shape.heads, rank = plan.shape.rank;
  for (int64_t i = 0; i < block.rows.count; ++i) {
    const Acc<T>*u = block.scratch.u.row(i), *q = block.scratch.q.row(i);
    const Acc<T>* incoming = args.dw_in ? args.dw_in + block.rows.row(i) * plan.logits() + group * count : nullptr;
    Acc<T>* dw = block.at(plan.router(), i) + group * count;
    for (int64_t h = 0; h < count; ++h) {
      Acc<T> dot = 0;
      for (int64_t j = h * rank; j < (h + 1) * rank; ++j) dot += u[j] * q[j];
      dw[h] = block.projection.scaling * dot + (incoming ? incoming[h] : 0);
    }
  }
}

// Replaces dw by the gradient of the logits, w (dw - sum_j w_j dw_j) / tau.
template <typename T, typename TA>
void softmax_gradient(const ProjectionBlock<T>& block, const RoutedLoraBackwardArgs<T, TA>& args) {
  const ProjectionPlan& plan = block.plan;
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
  return projection_workspace(plan_of(shape, routing, dropout, /*backward=*/false), shape.tokens, acc_bytes);
}

int64_t routed_lora_backward_workspace(const HeadsShape& shape, const Routing& routing, bool dropout,
                                       int64_t acc_bytes) {
  return projection_workspace(plan_of(shape, routing, dropout, /*backward=*/true), shape.tokens, acc_bytes);
}

template <typename T, typename TA>
void routed_lora_forward(const RoutedLoraForwardArgs<T, TA>& args) {
  const HeadsInputs<T, TA>& inputs = args.projection.inputs;
  const ProjectionPlan plan = plan_of(inputs.shape, args.routing, inputs.dropout.p > 0, /*backward=*/false);
  const PackedProjection<T> projection =
      pack_projection<T, TA>(plan, inputs, args.R, all_rows(plan.shape.tokens), args.projection.workspace);
  for_blocks(projection, [&](const ProjectionBlock<T>& block) {
    block.shrink(args.projection.z);
    block.make_u(args.projection.z);
    route(block, args);
    for (int64_t g = 0; g < plan.groups; ++g)
      block.expand(g, factors_of<Acc<T>>(args.w, plan, g), args.projection.y_in, args.projection.bias,
                   args.projection.y);
  });
}

template <typename T, typename TA>
void routed_lora_backward(const RoutedLoraBackwardArgs<T, TA>& args) {
  const HeadsInputs<T, TA>& inputs = args.projection.inputs;
  const ProjectionPlan plan = plan_of(inputs.shape, args.routing, inputs.dropout.p > 0, /*backward=*/true);
  const PackedProjection<T> projection =
      pack_projection<T, TA>(plan, inputs, args.R, all_rows(plan.shape.tokens), args.projection.workspace);
  for_blocks(projection, [&](const ProjectionBlock<T>& block) {
    block.make_u(args.projection.z);
    for (int64_t g = 0; g < plan.groups; ++g) {
      block.expand_backward(args.projection.dy, g, factors_of(args.w, plan, g));
      factor_gradient(block, args, g);
    }
    softmax_gradient(block, args);
    block.make_u_backward(args.projection.dz_in);
    block.shrink_backward(args.projection.dx_in, args.projection.dx);
  });
  finish_gradients(projection, args.projection.dA, args.projection.dB, args.dR);
}

#define ALIGN_INSTANTIATE(T, TA)                                                 \
  template void routed_lora_forward<T, TA>(const RoutedLoraForwardArgs<T, TA>&); \
  template void routed_lora_backward<T, TA>(const RoutedLoraBackwardArgs<T, TA>&);
ALIGN_FOR_CPU_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cpu
