// One head on the rows of each group (cpu/heads.h).
#include "ops/grouped_lora.h"

#include <algorithm>

#include "cpu/heads.h"
#include "cpu/operands.h"

namespace align::cpu {
namespace {

HeadsPlan plan_of(const GroupedLoraShape& shape, bool dropout, bool backward) {
  const HeadsShape one_head{shape.tokens,    shape.in_dim,       shape.out_dim, shape.rank, /*heads=*/1, 0,
                            /*A_per_head=*/false, DropoutSite::kInput};
  return {one_head, dropout, backward, /*routed=*/false, /*groups=*/1};
}

// Calls body(k, heads) for every group k, with its adapter and its rows.
template <typename T, typename W, typename Args, typename Body>
void for_groups(const Args& args, bool backward, const Body& body) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = args.shape;
  const HeadsPlan plan = plan_of(args.shape, args.dropout.p > 0, backward);
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t begin = args.row_groups.offsets[k], end = args.row_groups.offsets[k + 1];
    const HeadsInputs<T, W> inputs{
        plan.shape, args.dropout, args.scaling, 0, args.x, args.A + k * rank * in_dim, args.B + k * out_dim * rank,
        nullptr,    nullptr};
    body(k, inputs,
         prepare_heads<T, W>(plan, inputs, nullptr, {args.row_groups.rows, begin, end - begin, end}, args.workspace));
  }
}

}  // namespace

int64_t grouped_lora_forward_workspace(const GroupedLoraShape& shape, bool dropout, int64_t acc_bytes) {
  return heads_workspace(plan_of(shape, dropout, /*backward=*/false), shape.tokens, acc_bytes);
}

int64_t grouped_lora_backward_workspace(const GroupedLoraShape& shape, bool dropout, int64_t acc_bytes) {
  return heads_workspace(plan_of(shape, dropout, /*backward=*/true), shape.tokens, acc_bytes);
}

template <typename T, typename W>
void grouped_lora_forward(const GroupedLoraForwardArgs<T, W>& args) {
  for_groups<T, W>(args, /*backward=*/false, [&](int64_t, const HeadsInputs<T, W>& inputs, const Heads<T>& heads) {
    project_forward<T, W>(heads, {inputs, args.y_in, args.bias, args.z, args.y, args.workspace});
  });
}

template <typename T, typename W>
void grouped_lora_backward(const GroupedLoraBackwardArgs<T, W>& args) {
  const auto& [tokens, in_dim, out_dim, rank, groups] = args.shape;
  for_groups<T, W>(args, /*backward=*/true,
                   [&, in_dim = in_dim, out_dim = out_dim, rank = rank](int64_t k, const HeadsInputs<T, W>& inputs,
                                                                        const Heads<T>& heads) {
                     project_backward<T, W>(
                         heads, {inputs, args.z, args.dx_in, args.dy, args.dz_in, args.dx, args.dA + k * rank * in_dim,
                                 args.dB + k * out_dim * rank, args.workspace});
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

#define ALIGN_INSTANTIATE(T, W)                                                  \
  template void grouped_lora_forward<T, W>(const GroupedLoraForwardArgs<T, W>&); \
  template void grouped_lora_backward<T, W>(const GroupedLoraBackwardArgs<T, W>&);
ALIGN_EACH_TYPE_AND_ADAPTER(ALIGN_INSTANTIATE)
#undef ALIGN_INSTANTIATE

}  // namespace align::cpu
