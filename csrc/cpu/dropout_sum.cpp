// Forward: one region over blocks of rows, which shrinks and expands a block while it is in cache. Backward: one over
// blocks of rows (the latents' gradient, dx) and one each over the columns of dA and dB.
#include "ops/dropout_sum.h"

#include "cpu/heads.h"

namespace align::cpu {
namespace {

HeadsPlan plan_of(const HeadsShape& shape, bool dropout, bool backward) {
  return {shape, dropout, backward, /*routed=*/false, /*groups=*/1};
}

}  // namespace

int64_t dropout_sum_forward_workspace(const HeadsShape& shape, bool dropout) {
  return heads_workspace(plan_of(shape, dropout, /*backward=*/false));
}

int64_t dropout_sum_backward_workspace(const HeadsShape& shape, bool dropout) {
  return heads_workspace(plan_of(shape, dropout, /*backward=*/true));
}

template <typename T>
void dropout_sum_forward(const DropoutSumForwardArgs<T>& args) {
  const HeadsPlan plan = plan_of(args.inputs.shape, args.inputs.dropout.p > 0, /*backward=*/false);
  const Heads<T> heads = make_heads<T>(plan, args.inputs, nullptr, args.workspace);
  for_row_blocks(plan.shape.tokens, [&](int64_t begin, int64_t end) {
    shrink_rows(heads, args.z, begin, end);
    head_rows(heads, args.z, begin, end);
    expand_rows(heads, args, 0, {}, begin, end);
  });
}

template <typename T>
void dropout_sum_backward(const DropoutSumBackwardArgs<T>& args) {
  const HeadsPlan plan = plan_of(args.inputs.shape, args.inputs.dropout.p > 0, /*backward=*/true);
  const Heads<T> heads = make_heads<T>(plan, args.inputs, nullptr, args.workspace);
  for_row_blocks(plan.shape.tokens, [&](int64_t begin, int64_t end) {
    head_rows(heads, args.z, begin, end);
    pull_rows(heads, args.dy, 0, {}, begin, end);
    latent_gradient_rows(heads, args, begin, end);
  });
  a_gradient<T>(heads, args.dA, nullptr);
  b_gradient<T>(heads, args.dy, nullptr, args.dB);
}

#define ALIGN_INSTANTIATE(T)                                             \
  template void dropout_sum_forward<T>(const DropoutSumForwardArgs<T>&); \
  template void dropout_sum_backward<T>(const DropoutSumBackwardArgs<T>&);
ALIGN_INSTANTIATE(float)
ALIGN_INSTANTIATE(double)
ALIGN_INSTANTIATE(bfloat16)
ALIGN_INSTANTIATE(float16)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
