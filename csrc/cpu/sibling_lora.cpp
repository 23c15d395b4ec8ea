// On a CPU the layers follow one another: x is read by each of them, and dx is added to in place.
#include "ops/sibling_lora.h"

#include <algorithm>

#include "cpu/operands.h"

namespace align::cpu {
namespace {

// The largest of the layers' values.
template <typename Value>
int64_t most(const SiblingLoraShape& shape, const Value& value) {
  int64_t largest = 0;
  for (int i = 0; i < shape.count; ++i) largest = std::max(largest, value(shape.layers[i]));
  return largest;
}

// Calls body(args, i) for each layer i, with the workspace and a mask of its own.
template <typename Args, typename Body>
void for_layers(const Args& args, const Body& body) {
  for (int i = 0; i < args.count; ++i) {
    auto layer = args.layers[i];
    layer.dropout.mask = i, layer.dropout.masks = args.count;
    layer.workspace = args.workspace;
    body(layer, i);
  }
}

}  // namespace

int64_t sibling_lora_forward_workspace(const SiblingLoraShape& shape, bool dropout, int64_t acc_bytes) {
  return most(shape, [&](const auto& layer) { return grouped_lora_forward_workspace(layer, dropout, acc_bytes); });
}

int64_t sibling_lora_backward_workspace(const SiblingLoraShape& shape, bool dropout, int64_t acc_bytes) {
  return most(shape, [&](const auto& layer) { return grouped_lora_backward_workspace(layer, dropout, acc_bytes); });
}

template <typename T, typename TA>
void sibling_lora_forward(const SiblingLoraForwardArgs<T, TA>& args) {
  for_layers(args, [](const auto& layer, int) { grouped_lora_forward<T, TA>(layer); });
}

template <typename T, typename TA>
void sibling_lora_backward(const SiblingLoraBackwardArgs<T, TA>& args) {
  for_layers(args, [&](auto& layer, int i) {
    layer.dx = args.layers[0].dx;
    layer.dx_in = i == 0 ? args.layers[0].dx_in : layer.dx;
    grouped_lora_backward<T, TA>(layer);
  });
}

#define ALIGN_INSTANTIATE(T, TA)                                                   \
  template void sibling_lora_forward<T, TA>(const SiblingLoraForwardArgs<T, TA>&); \
  template void sibling_lora_backward<T, TA>(const SiblingLoraBackwardArgs<T, TA>&);
ALIGN_FOR_CPU_TYPES_AND_ADAPTERS(ALIGN_INSTANTIATE)

}  // namespace align::cpu
