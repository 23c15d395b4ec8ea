// dropout_sum is a projection without a router (cpu/projection.h).
#include "ops/dropout_sum.h"

#include "cpu/operands.h"
#include "cpu/projection.h"

namespace align::cpu {
namespace {

ProjectionPlan plan_of(const HeadsShape& shape, bool dropout, bool backward) {
  return {shape, dropout, backward, /*routed=*/false, /*groups=*/1};
}

}  // namespace

int64_t dropout_sum_forward_workspace(const HeadsShape& shape, bool dropout, int64_t acc_bytes) {
  return projection_workspace(plan_of(shape, dropout, /*backward=*/false), shape.tokens, acc_bytes);
}

int64_t dropout_sum_backward_workspace(const HeadsShape& shape, bool dropout, int64_t acc_bytes) {
  return projection_workspace(plan_of(shape, dropout, /*backward=*/true), shape.tokens, acc_bytes);
}

template <typename T, typename TA>
void dropout_sum_forward(const DropoutSumForwardArgs<T, TA>& args) {
  const HeadsInputs<T, TA>& inputs = args.inputs;
  const ProjectionPlan plan = plan_of(inputs.shape, inputs.dropout.p > 0, /*backward=*/false);
  project_forward(pack_projection<T, TA>(plan, inputs, nullptr, all_rows(inputs.shape.tokens), args.workspace), args);
}

template <typename T, typename TA>
void dropout_sum_backward(const DropoutSumBackwardArgs<T, TA>& args) {
  const HeadsInputs<T, TA>& inputs = args.inputs;
  const ProjectionPlan plan = plan_of(inputs.shape, inputs.dropout.p > 0, /*backward=*/true);
  project_backward(pack_projection<T, TA>(plan, inputs, nullptr, all_rows(inputs.shape.tokens), args.workspace), args);
}

#define ALIGN_INSTANTIATE(T, TA)                                                 \
  template void dropout_sum_forward<T, TA>(const DropoutSumForwardArgs<T, TA>&); \
  template void dropout_sum_backward<T, TA>(const DropoutSumBackwardArgs<T, TA>&);
ALIGN_FOR_CPU_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cpu
