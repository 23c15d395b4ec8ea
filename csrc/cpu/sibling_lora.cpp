// On a CPU the layers follow one another: x is read by each of them, and dx is added to in place.
#include "ops/sibling_lora.h"

#include <algorithm>

#include "cpu/operands.h"
#include "ops/dropout_sum.h"

namespace align::cpu {
namespace {

// Calls body(layer, i) for each layer i, with the workspace and masks of its own.
template <typename Args, typename Body>
void for_layers(const Args& args, const Body& body) {
  for (int i = 0; i < args.count; ++i) {
    auto layer = args.layers[i];
    layer.projection.inputs.dropout = dropout_of(args, i);
    layer.projection.workspace = args.workspace;
    body(layer, i);
  }
}

// The largest of the layers' workspaces.
template <typename Args, typename Plain, typename Routed>
int64_t largest(const Args& args, int64_t acc_bytes, const Plain& plain, const Routed& routed) {
  int64_t bytes = 0;
  for_layers(args, [&](const auto& layer, int) {
    const HeadsShape& shape = layer.projection.inputs.shape;
    const bool dropout = layer.projection.inputs.dropout.p > 0;
    bytes = std::max(bytes, layer.routing.groups > 0 ? routed(shape, layer.routing, dropout, acc_bytes)
                                                     : plain(shape, dropout, acc_bytes));
  });
  return bytes;
}

}  // namespace

template <typename T, typename TA>
int64_t sibling_lora_workspace(const SiblingLoraForwardArgs<T, TA>& args) {
  return largest(args, sizeof(Acc<T>), dropout_sum_forward_workspace, routed_lora_forward_workspace);
}

template <typename T, typename TA>
int64_t sibling_lora_workspace(const SiblingLoraBackwardArgs<T, TA>& args) {
  return largest(args, sizeof(Acc<T>), dropout_sum_backward_workspace, routed_lora_backward_workspace);
}

template <typename T, typename TA>
void sibling_lora_forward(const SiblingLoraForwardArgs<T, TA>& args) {
  for_layers(args, [](const auto& layer, int) {
    if (layer.routing.groups > 0) {
      routed_lora_forward<T, TA>(layer);
    } else {
      dropout_sum_forward<T, TA>(layer.projection);
    }
  });
}

template <typename T, typename TA>
void sibling_lora_backward(const SiblingLoraBackwardArgs<T, TA>& args) {
  for_layers(args, [&](auto& layer, int i) {
    const auto& first = args.layers[0].projection;
    layer.projection.dx = first.dx;
    layer.projection.dx_in = i == 0 ? first.dx_in : first.dx;
    if (layer.routing.groups > 0) {
      routed_lora_backward<T, TA>(layer);
    } else {
      dropout_sum_backward<T, TA>(layer.projection);
    }
  });
}

#define ALIGN_INSTANTIATE(T, TA)                                                   \
  template int64_t sibling_lora_workspace(const SiblingLoraForwardArgs<T, TA>&);   \
  template int64_t sibling_lora_workspace(const SiblingLoraBackwardArgs<T, TA>&);  \
  template void sibling_lora_forward<T, TA>(const SiblingLoraForwardArgs<T, TA>&); \
  template void sibling_lora_backward<T, TA>(const SiblingLoraBackwardArgs<T, TA>&);
ALIGN_FOR_CPU_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cpu
