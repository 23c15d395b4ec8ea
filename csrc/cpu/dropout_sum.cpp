// A projection without a router (cpu/heads.h).
#include "ops/dropout_sum.h"

#include "cpu/heads.h"
#include "cpu/operands.h"

namespace align::cpu {
namespace {

HeadsPlan plan_of(const HeadsShape& shape, bool dropout, bool backward) {
  return {shape, dropout, backward, /*routed=*/false, /*groups=*/1};
}

}  // namespace

int64_t dropout_sum_forward_workspace(const HeadsShape& shape, bool dropout, int64_t acc_bytes) {
  return heads_workspace(plan_of(shape, dropout, /*backward=*/false), shape.tokens, acc_bytes);
}

int64_t dropout_sum_backward_workspace(const HeadsShape& shape, bool dropout, int64_t acc_bytes) {
  return heads_workspace(plan_of(shape, dropout, /*backward=*/true), shape.tokens, acc_bytes);
}

template <typename T, typename W>
void dropout_sum_forward(const DropoutSumForwardArgs<T, W>& args) {
  const HeadsInputs<T, W>& inputs = args.inputs;
  const HeadsPlan plan = plan_of(inputs.shape, inputs.dropout.p > 0, /*backward=*/false);
  project_forward(prepare_heads<T, W>(plan, inputs, nullptr, all_rows(inputs.shape.tokens), args.workspace), args);
}

template <typename T, typename W>
void dropout_sum_backward(const DropoutSumBackwardArgs<T, W>& args) {
  const HeadsInputs<T, W>& inputs = args.inputs;
  const HeadsPlan plan = plan_of(inputs.shape, inputs.dropout.p > 0, /*backward=*/true);
  project_backward(prepare_heads<T, W>(plan, inputs, nullptr, all_rows(inputs.shape.tokens), args.workspace), args);
}

#define ALIGN_INSTANTIATE(T, W)                                                \
  template void dropout_sum_forward<T, W>(const DropoutSumForwardArgs<T, W>&); \
  template void dropout_sum_backward<T, W>(const DropoutSumBackwardArgs<T, W>&);
ALIGN_EACH_TYPE_AND_ADAPTER(ALIGN_INSTANTIATE)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
