// grouped_lora is a projection with one head for the rows of each group (cpu/projection.h).
#include "ops/grouped_lora.h"

#include <algorithm>

#include "cpu/operands.h"
#include "cpu/projection.h"

namespace align::cpu {
namespace {

ProjectionPlan plan_of(const GroupedLoraShape& shape, bool dropout, bool backward) {
  return {.shape = {.tokens = shape.tokens,
                    .in_dim = shape.in_dim,
                    .out_dim = shape.out_dim,
                    .rank = shape.rank,
                    .heads = 1,
                    .offset_rank = 0,
                    .A_per_head = false,
                    .site = DropoutSite::kInput},
          .dropout = dropout,
          .backward = backward,
          .routed = false,
          .groups = 1};
}

// Calls body(k, inputs, projection) for every group k, with its adapter and its rows.
template <typename T, typename TA, typename Args, typename Body>
void for_groups(const Args& args, bool backward, const Body& body) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = args.shape;
  const ProjectionPlan plan = plan_of(args.shape, args.dropout.p > 0, backward);
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t begin = args.row_groups.offsets[k], end = args.row_groups.offsets[k + 1];
    const HeadsInputs<T, TA> inputs{.shape = plan.shape,
                                    .dropout = args.dropout,
                                    .scaling = args.scaling,
                                    .offset_scaling = 0,
                                    .x = args.x,
                                    .A = args.A + k * rank * in_dim,
                                    .B = args.B + k * out_dim * rank,
                                    .A0 = nullptr,
                                    .B0 = nullptr};
    const RowBlock rows{.order = args.row_groups.rows, .first = begin, .count = end - begin, .end = end};
    body(k, inputs, pack_projection<T, TA>(plan, inputs, nullptr, rows, args.workspace));
  }
}

}  // namespace

int64_t grouped_lora_forward_workspace(const GroupedLoraShape& shape, bool dropout, int64_t acc_bytes) {
  return projection_workspace(plan_of(shape, dropout, /*backward=*/false), shape.tokens, acc_bytes);
}

int64_t grouped_lora_backward_workspace(const GroupedLoraShape& shape, bool dropout, int64_t acc_bytes) {
  return projection_workspace(plan_of(shape, dropout, /*backward=*/true), shape.tokens, acc_bytes);
}

template <typename T, typename TA>
void grouped_lora_forward(const GroupedLoraForwardArgs<T, TA>& args) {
  for_groups<T, TA>(args, /*backward=*/false, [&](int64_t, const auto& inputs, const auto& projection) {
    project_forward<T, TA>(projection, {.inputs = inputs,
                                        .y_in = args.y_in,
                                        .bias = args.bias,
                                        .z = args.z,
                                        .y = args.y,
                                        .workspace = args.workspace});
  });
}

template <typename T, typename TA>
void grouped_lora_backward(const GroupedLoraBackwardArgs<T, TA>& args) {
  const GroupedLoraShape& shape = args.shape;
  for_groups<T, TA>(args, /*backward=*/true, [&](int64_t k, const auto& inputs, const auto& projection) {
    project_backward<T, TA>(projection, {.inputs = inputs,
                                         .z = args.z,
                                         .dx_in = args.dx_in,
                                         .dy = args.dy,
                                         .dz_in = args.dz_in,
                                         .dx = args.dx,
                                         .dA = args.dA + k * shape.rank * shape.in_dim,
                                         .dB = args.dB + k * shape.out_dim * shape.rank,
                                         .workspace = args.workspace});
  });
}

void group_rows(const int64_t* group, int64_t tokens, int64_t groups, int64_t* rows, int64_t* offsets) {
  std::fill_n(offsets, groups + 1, int64_t(0));
  for (int64_t t = 0; t < tokens; ++t) ++offsets[group[t] + 1];
  for (int64_t k = 0; k < groups; ++k) offsets[k + 1] += offsets[k];
  for (int64_t t = 0; t < tokens; ++t) rows[offsets[group[t]]++] = t;
  // Filling moved every offset to the end of its group, the beginning of the next.
  for (int64_t k = groups; k > 0; --k) offsets[k] = offsets[k - 1];
  offsets[0] = 0;
}

#define ALIGN_INSTANTIATE(T, TA)                                                   \
  template void grouped_lora_forward<T, TA>(const GroupedLoraForwardArgs<T, TA>&); \
  template void grouped_lora_backward<T, TA>(const GroupedLoraBackwardArgs<T, TA>&);
ALIGN_FOR_CPU_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cpu
